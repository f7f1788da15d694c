"""``coterie evaluate``: what did it cost."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli import options
from coterie.cli.output import number, percent, print_json, print_table, print_text, with_error

if TYPE_CHECKING:
    from coterie.evaluate.scorecard import Scorecard
    from coterie.evaluate.sums import Scores

#: Time to spend on each model's speed.
_SPEED_SECONDS = 20.0


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Model folders, GGUF files or hub ids.")],
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help=f"Folder with test text: {options.FORMATS}, and *.qa.jsonl of questions; or hf:NAME, a data set.",
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(help="The model to compare with, usually the original.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens in all, shared equally by the domains; the whole text when left out.")
    ] = None,
    seq_len: options.SequenceLength = 512,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    questions: Annotated[
        int | None, typer.Option(help="Questions of each domain at most; all when left out, none with 0.")
    ] = None,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed",
            help="Measure speed and memory too. This loads each model, and the one that it is compared with, into "
            "memory as a whole; refused beforehand where they do not fit.",
        ),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of the lm-evaluation-harness, separated by commas (pip install 'coterie[eval]'). This loads "
            "each model into memory as a whole."
        ),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files (YAML) of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each task at most.")] = None,
    on: options.On = "all",
    route: Annotated[
        Path | None,
        typer.Option(help="How many experts a token gets: a policy that `coterie route` wrote, for all but --against."),
    ] = None,
    max_memory: options.MaxMemory = None,
    allow_pickle: options.AllowPickle = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the scorecards go: a file (*.json) for one model, or a folder.")
    ] = None,
    write_card: Annotated[
        bool,
        typer.Option(
            "--write-card", help="Write what was measured into the model card (README.md) of each result of Coterie."
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """Measure what a smaller model costs.

    Perplexity, KL divergence, agreement and exact answers by domain, with one layer in memory at a time; bytes, and on
    request memory, speed and tasks of the lm-evaluation-harness.
    """
    from coterie.profile.data_sets import local_place

    texts = [] if text is None else [local_place(text)]
    files = [] if out is None else _files(out, models, {"model folder": [*models, against], "text folder": texts})
    from coterie.evaluate.card import card as write
    from coterie.evaluate.card import check_card
    from coterie.evaluate.run import evaluate as run

    if write_card:
        for model in models:
            check_card(model)
    cards = run(
        models,
        against=against,
        text=text,
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        device=device,
        questions=questions,
        speed_seconds=_SPEED_SECONDS if speed else None,
        max_memory=max_memory,
        allow_pickle=allow_pickle,
        tasks=() if tasks is None else options.names(tasks),
        include_path=include_path,
        limit=limit,
        on=on,
        route=route,
    )
    for card, file in zip(cards, files, strict=False):
        card.save(file)
    written = [write(model, scorecard=card) for model, card in zip(models, cards, strict=True)] if write_card else []
    if json:
        print_json([dataclasses.asdict(card) for card in cards])
        return
    if cards[0].domains:
        _print_scores(cards)
    for card in cards:
        if card.tasks:
            _print_tasks(card)
    _print_cost(cards)
    for file in files:
        print_text(f"scorecard written to {file}")
    for path in written:
        print_text(f"card written to {path}")


def _files(out: Path, models: list[str], reads: Mapping[str, Sequence[str | Path | None]]) -> list[Path]:
    """Return the file for each model's scorecard; raise before anything is computed where one cannot go."""
    from coterie.model.disk.files import name_of_model
    from coterie.outputs import check_output

    if out.suffix == ".json":
        if len(models) > 1:
            raise typer.BadParameter(
                f"{len(models)} models have {len(models)} scorecards: name a folder", param_hint="--out"
            )
        files = [out]
    else:
        names = [name_of_model(model) for model in models]
        files = [out / f"scorecard-{name.replace('/', '--')}.json" for name in names]
        if len(set(files)) < len(files):
            raise typer.BadParameter(f"the models {', '.join(names)} need distinct names", param_hint="MODEL")
    for file in files:
        check_output(file, kind="scorecard", reads=reads, makes_parents=file is not out)
    return files


def _print_scores(cards: "Sequence[Scorecard]") -> None:
    """Print tables of all models, the base among them: domain by domain, and over all."""
    base = next((card for card in cards if card.base is not None), None)
    overall = cards[0].overall
    names = ", ".join(card.model for card in cards)
    print_text(names if base is None else f"{names} against {base.base}")
    sequences = f" in {overall['sequences']:,} sequences" if overall["sequences"] else ""
    print_text(f"{overall['tokens']:,} tokens{sequences}, {overall['questions']:,} questions")
    print_text()
    joint = base is not None or len(cards) > 1
    compared = ("KL (nats)", "agreement") if base is not None else ()
    rows = [
        (domain, *((name,) if joint else ()), number(scores["perplexity"], 3),
         *(_compared(scores, is_base) if base is not None else ()), percent(scores["accuracy"]))
        for domain in cards[0].domains
        for name, scores, is_base in _rows(cards, domain, base)
    ]  # fmt: skip
    print_table(("domain", *(("model:",) if joint else ()), "perplexity", *compared, "exact answers"), rows)
    print_text()
    print_table(
        ("all domains", "perplexity", *(("rise", *compared) if base is not None else ()), "exact answers"),
        [
            (name, number(scores["perplexity"], 3),
             *((_rise(scores, is_base), *_compared(scores, is_base)) if base is not None else ()),
             percent(scores["accuracy"]))
            for name, scores, is_base in _rows(cards, None, base)
        ],
    )  # fmt: skip
    print_text()


def _rows(
    cards: "Sequence[Scorecard]", domain: str | None, base: "Scorecard | None"
) -> "Iterator[tuple[str, Scores, bool]]":
    """Yield name and scores of each model in a domain, or over all where that is None, and whether it is the base.

    The base's own, as it is in the scorecard `base` of another, come first where it is not among the models.
    """
    if base is not None and base.base_digest not in [card.model_digest for card in cards]:
        own = base.base_overall if domain is None else base.base_domains.get(domain)
        if base.base is not None and own is not None:
            yield base.base, own, True
    for card in cards:
        scores = card.overall if domain is None else card.domains[domain]
        yield card.model, scores, card.model_digest == card.base_digest


def _rise(scores: "Scores", is_base: bool) -> str:
    rise = with_error(scores["perplexity_rise"], scores["perplexity_rise_error"], 3, sign=True)
    return "-" if is_base else rise


def _compared(scores: "Scores", is_base: bool) -> tuple[str, str]:
    return ("-", "-") if is_base else (with_error(scores["kl"], scores["kl_error"], 4), percent(scores["agreement"]))


def _print_tasks(card: "Scorecard") -> None:
    rows = []
    for task, metrics in card.tasks.items():
        for name, value in metrics.items():
            metric, _, chosen = name.partition(" ")
            if metric.endswith("_stderr") or name == "examples":
                continue
            error = metrics.get(f"{metric}_stderr {chosen}".rstrip())
            rows.append((task, name, number(value, 4), number(error, 4), number(metrics.get("examples"), 0)))
    print_text(card.model)
    print_text()
    print_table(("task", "metric:", "value", "standard error", "examples"), rows)
    print_text()


def _print_cost(cards: "list[Scorecard]") -> None:
    from coterie.amounts import format_bytes

    columns = ["model", "bytes", "of base"]
    rows = [[card.model, format_bytes(card.num_bytes), percent(card.bytes_ratio)] for card in cards]
    if any(card.tokens_per_second is not None for card in cards):
        columns += ["memory", "peak memory", "tokens/s", "of base"]
        for row, card in zip(rows, cards, strict=True):
            sizes = (card.memory_bytes, card.peak_memory_bytes)
            row += ["-" if size is None else format_bytes(size) for size in sizes]
            row += ["-" if card.tokens_per_second is None else f"{card.tokens_per_second:,.0f}"]
            row += [percent(card.speed_ratio)]
    print_table(columns, rows)
