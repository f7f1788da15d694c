"""``coterie serve``: a model that is larger than memory behind the OpenAI API."""

from typing import Annotated

import typer

from coterie.cli import options
from coterie.cli.output import print_json, print_text


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
    context: Annotated[int, typer.Option(help="Tokens of a sequence, prompt and answer.")] = 4096,
    policy: Annotated[
        str, typer.Option(help="Which experts stay in memory: decay, lru, lfu, lcu or edgemoe.")
    ] = "decay",
    lanes: Annotated[int, typer.Option(help="Threads that read experts.")] = 2,
    lookahead: Annotated[
        int, typer.Option(help="Experts of the next layer to guess, and read ahead when threads are idle.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say the memory that it would take, and load nothing.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Serve a model of any size by the OpenAI API.

    What every token passes stays in memory, and as many experts as there is room for, as with `run`.
    One request is answered at a time, the others wait. It listens at this machine's own address unless told otherwise,
    and ends with Ctrl-C.
    """
    if dry_run:
        from coterie.run.engine import default_memory
        from coterie.run.prepare import prepare

        budget = prepare(model, memory=default_memory() if memory is None else memory, context=context).budget
        budget.check()
        if json:
            print_json(budget.to_json())
        else:
            print_text(str(budget))
        return
    from coterie.serve.run import serve as answer

    answer(
        model, memory=memory, host=host, port=port, api_key=api_key, queue=queue, context=context, policy=policy,
        lanes=lanes, lookahead=lookahead,
    )  # fmt: skip
