"""Arguments and options that several commands share, and what they must fulfil together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from coterie.amounts import parse_share
from coterie.cli.complete import complete_recipe
from coterie.errors import InputError
from coterie.model.arch.run_settings import CacheType, Running
from coterie.model.device import check_device_name
from coterie.model.disk.manifest import RouterForm
from coterie.profile import sources

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model folder or GGUF file, or a hub id: ORG/NAME or ORG/NAME@REVISION.")
]


def _share(text: str) -> float:
    try:
        return parse_share(text)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


Keep = Annotated[
    float | None,
    typer.Option(
        help="Share of the experts, or of the width of each, to keep in each layer, like 0.5 or 50%.",
        parser=_share,
        metavar="SHARE",
    ),
]
Experts = Annotated[int | None, typer.Option(help="Number of experts to keep in each layer.")]
Width = Annotated[int | None, typer.Option(help="Hidden neurons to keep in each expert; for recipes that slim them.")]
Budget = Annotated[str | None, typer.Option(help="Size of all weights at most, like 12GiB or 800MB.")]
Params = Annotated[
    str | None,
    typer.Option(
        metavar="COUNT", help="Parameters in all at most, like 15B; for recipes that change experts' number or width."
    ),
]
ActiveParams = Annotated[
    str | None, typer.Option(metavar="COUNT", help="Parameters that one token uses at most, like 2B; for the same.")
]
Bits = Annotated[
    float | None,
    typer.Option(help="Most bits of a number, scales counted, like 4.5; for recipes that store weights in fewer."),
]
Type = Annotated[
    str | None,
    typer.Option(
        help="Type that weights are stored in: as in llama.cpp, like Q4_K; INT4 and INT8 for compressed-tensors; or, "
        "with --target packed, PLANES4 and PLANES3, whose first bytes are the same in fewer bits."
    ),
]
#: The recipe that is taken where none is named, in the words of the help.
USUAL_RECIPE = (
    "coterie; with --budget or --bits coterie-bits, for --target packed coterie-bits-width; with --type or --target "
    "compressed-tensors gptaq"
)
Recipe = Annotated[
    str | None,
    typer.Option(
        help="How experts are chosen, merged or stored; see `coterie recipes`. Or module:attribute of your own.",
        show_default=USUAL_RECIPE,
        autocompletion=complete_recipe,
    ),
]
ROUTER_HELP = (
    "plain: rows of the experts that stay. mean: the mean of the rows of merged ones. refit: rows fitted to the "
    "output. map: the router stays whole; stock loaders load that result with trust_remote_code only."
)
Router = Annotated[RouterForm, typer.Option(help=ROUTER_HELP)]
Tokens = Annotated[int, typer.Option(help="Tokens of text in all, shared equally by the domains.")]
SequenceLength = Annotated[int, typer.Option("--seq-len", help="Tokens in a sequence.")]
SampleTokens = Annotated[int, typer.Option(help="Tokens of each layer's sample.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="Where the model runs, like cpu or cuda.", callback=check_device_name)]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="Memory that the run may take, like 8GiB; it is refused beforehand when it needs more."),
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read weights stored as pickles (*.bin) too; only from a source you trust."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what would be written, and the memory, time and disk it takes; write nothing."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")]


#: How a model runs that is larger than memory.
RunContext = Annotated[int, typer.Option(help="Tokens of a sequence, prompt and answer.")]
Policy = Annotated[str, typer.Option(help="Which experts stay in memory: follow, decay, lru, lfu, lcu or edgemoe.")]
Lanes = Annotated[int, typer.Option(help="Threads that read experts.")]
Route = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.json",
        help="How many experts a token gets: a policy that `coterie route` wrote. What it leaves out is neither read "
        "nor computed, which changes what the model says.",
    ),
]
OnlyMisses = Annotated[
    bool, typer.Option("--only-misses", help="Leave out what --route says only where it is not in memory.")
]
Lookahead = Annotated[
    int, typer.Option(help="Experts of the next layer to guess, and read ahead when threads are idle.")
]
Draft = Annotated[
    str,
    typer.Option(
        metavar="WHO",
        help="Who guesses tokens, for one pass to check several: off, lookup (the text so far), resident (the model "
        "with the experts in memory; resident:0.5 with half of a token's), or a smaller model of the same tokens.",
    ),
]
Kv = Annotated[
    str,
    typer.Option(
        metavar="FORMAT",
        help="How keys and values are kept: full, int8, int4, window:N (the first 4 tokens and the last N), or auto: "
        "full, or int8 where memory is short.",
    ),
]
Sessions = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Keep keys and values there, so that a text that goes on is not read anew; it holds what was asked.",
    ),
]
SessionsSize = Annotated[
    str | None, typer.Option(help="For --sessions: bytes that the folder may take.", show_default="1GiB")
]
MemoryDryRun = Annotated[bool, typer.Option("--dry-run", help="Say the memory that it would take, and load nothing.")]


def names(listed: str) -> list[str]:
    """Return names that are separated by commas."""
    return [name.strip() for name in listed.split(",") if name.strip()]


def one_target(**targets: Any) -> dict[str, Any]:
    """Return the options that say how small the result is to be; raise a usage error unless exactly one does."""
    from coterie.compress.target import option_of

    given = [option_of(name) for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise typer.BadParameter(
            f"say how small with exactly one of them; got {' and '.join(given) or 'none'}",
            param_hint=", ".join(map(option_of, targets)),
        )
    return targets


MultipleOf = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="The number of experts or their width, whichever is lowered, is the nearest multiple of this.",
    ),
]
ExpertsOnly = Annotated[
    bool,
    typer.Option(
        "--experts-only",
        help="With weights in fewer bits: leave all but routed experts as they are; --bits are theirs then.",
    ),
]
_TARGET_HELP = (
    "Who reads weights in fewer bits. gguf: llama.cpp, by `coterie export`. packed: what loads the result itself; "
    "smaller where rows are no multiple of 256."
)
Target = Annotated[
    Literal["gguf", "packed", "compressed-tensors"] | None,
    typer.Option(
        help=f"{_TARGET_HELP} compressed-tensors: transformers and vLLM; integers of 4 or 8 bits.", show_default="gguf"
    ),
]
#: Of types that can be priced.
BlocksTarget = Annotated[Literal["gguf", "packed"] | None, typer.Option(help=_TARGET_HELP, show_default="gguf")]
BudgetFor = Annotated[
    Literal["file", "memory"],
    typer.Option(help="What --budget is for: the weights, or all memory that the result takes when llama.cpp runs it."),
]
Context = Annotated[
    int | None, typer.Option(help="For --budget-for memory: tokens of a sequence.", show_default="8192")
]
Batch = Annotated[int | None, typer.Option(help="For --budget-for memory: sequences at once.", show_default="1")]
KvType = Annotated[
    Literal["f16", "q8_0"] | None,
    typer.Option(help="For --budget-for memory: how keys and values are stored.", show_default="f16"),
]


def only_with(option: str, others: Mapping[str, object]) -> None:
    """Raise a usage error where options are given that mean nothing without another one."""
    if names := [name for name, value in others.items() if value is not None]:
        raise typer.BadParameter(f"it is for {option}", param_hint=names[0])


def running(
    budget: str | None, budget_for: str, context: int | None, batch: int | None, kv_type: CacheType | None
) -> Running | None:
    """Return how the result is to run, where the budget is for the memory of that; a usage error for half of it."""
    if budget_for == "file":
        given = {"--context": context, "--batch": batch, "--kv-type": kv_type}
        if names := [name for name, value in given.items() if value is not None]:
            raise typer.BadParameter("it is for --budget-for memory", param_hint=names[0])
        return None
    if budget is None:
        raise typer.BadParameter("it says what --budget is for, which is not given", param_hint="--budget-for")
    usual = Running()
    how = Running(
        context=usual.context if context is None else context,
        batch=usual.batch if batch is None else batch,
        kv_type=kv_type or usual.kv_type,
    )
    how.check()
    return how


Domains = Annotated[
    str | None, typer.Option(help="Only these domains, like math,python; with weights, like math=2,python=1.")
]
Prices = Annotated[
    Path | None,
    typer.Option(
        help="Folder of what types cost (`coterie price`), for a recipe that chooses them; compress measures it where "
        "there is none yet.",
    ),
]
FORMATS = "*.txt, *.jsonl (text, messages, or prompt and completion), either as .gz, or *.parquet, one file a domain"
TEXT_HELP = f"Folder with calibration text: {FORMATS}; hf:NAME, a data set; or self: the model writes it."
On = Annotated[
    sources.On,
    typer.Option(help="Tokens that count in statistics and losses: all, or answers (messages of the assistant) only."),
]
Mtp = Annotated[
    Literal["keep", "drop"] | None,
    typer.Option(
        help="Prediction layers (MTP), run by other programs: keep, with experts as in the last layer, or drop.",
        show_default="keep",
    ),
]
