"""``coterie run``: generate from a model that is larger than memory."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from coterie.cli import options
from coterie.cli.output import print_json, print_text
from coterie.errors import InputError


def run(
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; read from standard input when left out.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory that the run may take, like 6GiB; refused beforehand when it needs more.",
            show_default="three quarters of what is free",
        ),
    ] = None,
    context: options.RunContext = 4096,
    max_tokens: Annotated[int, typer.Option(help="Tokens that are made at most.")] = 256,
    answers: Annotated[
        int, typer.Option(help="Answers to the prompt, made at once: a step reads an expert once for all of them.")
    ] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="Above 1 for more variety, 0 for the likeliest token each time.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this probability.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens of this share of the likeliest one's probability.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 makes what was there already less likely.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on with the text as it is, without the model's chat template.")
    ] = False,
    policy: options.Policy = "follow",
    lanes: options.Lanes = 2,
    lookahead: options.Lookahead = 0,
    draft: options.Draft = "off",
    route: options.Route = None,
    only_misses: options.OnlyMisses = False,
    kv: options.Kv = "auto",
    sessions: options.Sessions = None,
    sessions_size: options.SessionsSize = None,
    dry_run: options.MemoryDryRun = False,
    save_trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="Keep which experts each token chose, for coterie inspect --run --trace."
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Generate text from a model that is larger than memory.

    What every token passes stays in memory, and as many experts as there is room for; others are read when they are
    needed. The result is the same with any budget.
    """
    from coterie.run.answers import Answers, generate_answers
    from coterie.run.engine import Generated, Runtime, Sampling, default_memory
    from coterie.run.prepare import MOST_BATCH
    from coterie.run.session_store import SIZE
    from coterie.run.trace import check_trace_path, recording

    if sessions is None:
        options.only_with("--sessions", {"--sessions-size": sessions_size})
    elif save_trace is not None:
        raise typer.BadParameter("a trace is of the whole text, and --sessions skips what is known of it",
                                 param_hint="--save-trace")  # fmt: skip

    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )
    sampling.check()
    if save_trace is not None:
        check_trace_path(save_trace)
        if answers != 1 or draft != "off":
            raise InputError("--save-trace keeps one text, token by token; leave --answers and --draft out")
    limit = default_memory() if memory is None else memory
    batch = min(answers, MOST_BATCH)
    if dry_run:
        print_memory(model, limit, context, policy, batch, draft, kv, json=json)
        return
    text = sys.stdin.read() if prompt is None else prompt

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    with Runtime(
        model, memory=limit, context=context, policy=policy, lanes=lanes, lookahead=lookahead, batch=batch, draft=draft,
        route=route, only_misses=only_misses, kv=kv, sessions=sessions, sessions_size=sessions_size or SIZE,
    ) as runtime:  # fmt: skip
        with nullcontext() if save_trace is None else recording(runtime.model, runtime.layers) as recorder:
            generated: Generated | Answers
            if answers == 1:
                generated = runtime.generate(
                    text, max_tokens=max_tokens, sampling=sampling, template=not raw, on_text=None if json else show
                )
            else:
                generated = generate_answers(
                    runtime, text, answers=answers, max_tokens=max_tokens, sampling=sampling, template=not raw
                )
        if save_trace is not None and recorder is not None:
            recorder.trace(model=runtime.digest, name=runtime.path.name).save(save_trace)
        if json:
            print_json(generated.to_json())
            return
        if isinstance(generated, Answers):
            show("\n\n".join(f"--- {number} ---\n{each}" for number, each in enumerate(generated.texts, 1)))
        show("\n")
        typer.echo(f"{generated}; {runtime.peak()}", err=True)


def print_memory(
    model: str, memory: int | str, context: int, policy: str, batch: int, draft: str, kv: str, *, json: bool
) -> None:
    """Print the memory that a run would take; raises NotEnoughMemory where it is too much."""
    from coterie.run.prepare import prepare

    budget = prepare(model, memory=memory, context=context, policy=policy, batch=batch, draft=draft, kv=kv).budget
    budget.check()
    if json:
        print_json(budget.to_json())
    else:
        print_text(str(budget))
