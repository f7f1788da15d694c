"""``coterie serve``: a model that is larger than memory behind the OpenAI API."""

from typing import Annotated

import typer

from coterie.cli import options
from coterie.cli.run import print_memory


def serve(
    model: options.Model,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory that the server may take, like 6GiB; refused beforehand when it needs more.",
            show_default="three quarters of what is free",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; one that other machines reach needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 for any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar="COTERIE_API_KEY", help="Key that clients have to send as bearer token."),
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that wait at most; more are sent away with status 429.")] = 8,
    context: options.RunContext = 4096,
    policy: options.Policy = "follow",
    lanes: options.Lanes = 2,
    lookahead: options.Lookahead = 0,
    draft: options.Draft = "off",
    route: options.Route = None,
    only_misses: options.OnlyMisses = False,
    kv: options.Kv = "auto",
    sessions: options.Sessions = None,
    sessions_size: options.SessionsSize = None,
    batch: Annotated[
        int,
        typer.Option(help="Answers that are made at once, at most; a step reads an expert once for all of them."),
    ] = 1,
    dry_run: options.MemoryDryRun = False,
    json: options.Json = False,
) -> None:
    """Serve a model of any size by the OpenAI API.

    What every token passes stays in memory, and as many experts as there is room for, as with `run`.
    One request is answered at a time, or several in a batch; the others wait. It listens at this machine's own
    address unless told otherwise, and ends with Ctrl-C.
    """
    if sessions is None:
        options.only_with("--sessions", {"--sessions-size": sessions_size})
    if dry_run:
        from coterie.run.engine import default_memory

        limit = default_memory() if memory is None else memory
        print_memory(model, limit, context, policy, batch, draft, kv, json=json)
        return
    from coterie.run.session_store import SIZE
    from coterie.serve.run import serve as answer

    answer(
        model, memory=memory, host=host, port=port, api_key=api_key, queue=queue, context=context, policy=policy,
        lanes=lanes, lookahead=lookahead, batch=batch, draft=draft, route=route, only_misses=only_misses, kv=kv,
        sessions=sessions, sessions_size=sessions_size or SIZE,
    )  # fmt: skip
