"""What all commands have in common: help in groups, and how much they say, which is told before or after their name."""

import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from coterie import __version__, progress

log = logging.getLogger(__name__)

#: Groups of the help, in order, and the options in each; an option has the same place in every command.
PANELS: dict[str, tuple[str, ...]] = {
    "How small": (
        "keep", "experts", "width", "budget", "budget_for", "context", "batch", "kv_type", "params", "active_params",
        "bits", "dense", "group", "type", "removed", "multiple_of", "target", "experts_only", "plan", "budgets",
    ),
    "How": (
        "recipe", "recipes", "router", "routers", "effort", "train_tokens", "search", "inputs", "output_dtype", "mtp",
        "statistics", "gradients", "profile", "prices", "number_type", "seed", "seeds", "temperature", "first_token",
        "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "answers", "raw", "policy", "lookahead", "draft",
        "experts_per_token", "rule", "renormalise", "route", "only_misses", "kv", "sessions", "sessions_size",
    ),
    "Text": (
        "text", "test", "generate", "domains", "on", "tokens", "test_tokens", "seq_len", "sample_tokens", "questions",
    ),
    "What to measure": (
        "run", "trace", "prompt_tokens", "against", "speed", "tasks", "include_path", "limit", "scorecard",
    ),
    "The hub": ("push_to_hub", "private", "base_model"),
    "The server": ("host", "port", "api_key", "queue"),
    "Limits": ("device", "jobs", "lanes", "memory", "max_memory", "allow_pickle"),
    "Output": (
        "out", "file", "picture", "dry_run", "save_trace", "keep_results", "write_card", "check", "verify", "json",
    ),
}  # fmt: skip
_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}


def _note(ctx: typer.Context, param: typer.CallbackParam, value: bool) -> None:
    """Keep what is asked for in what a command shares with the program, so that either may be told."""
    ctx.meta[str(param.name)] = value or bool(ctx.meta.get(str(param.name)))


def _shared_option(*names: str, help: str, envvar: str | None = None) -> Any:
    return typer.Option(*names, callback=_note, is_eager=True, expose_value=False, envvar=envvar, help=help)


Quiet = Annotated[
    bool, _shared_option("--quiet", "-q", help="Say only results, warnings and errors: no notes, no progress bars.")
]
Verbose = Annotated[
    bool,
    _shared_option(
        "--verbose", "-v",
        help="Say more, each line with the seconds since the start and the part of Coterie that says it.",
    ),
]  # fmt: skip
Debug = Annotated[bool, _shared_option("--debug", envvar="COTERIE_DEBUG", help="Show the traceback of an error.")]
#: What the program takes, and with it every command.
_SHARED = ("quiet", "verbose", "debug")


class Command(TyperCommand):
    """A command with help in groups, which takes the program's own options too."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the command's own parameters, then those of the program, then the one for help."""
        own = super().get_params(ctx)
        program = ctx.find_root().command
        shared = [] if program is self else [each for each in program.params if each.name in _SHARED]
        return [*self.params, *shared, *own[len(self.params) :]]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options group by group; those that all commands have come last."""
        for panel, records in _panels(self.get_params(ctx), ctx):
            with formatter.section(panel):
                formatter.write_dl(records)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, saying as much as is asked for."""
        if ctx.meta.get("quiet") and ctx.meta.get("verbose"):
            ctx.fail("--quiet and --verbose say the opposite; give one of them")
        set_up_messages(quiet=bool(ctx.meta.get("quiet")), verbose=bool(ctx.meta.get("verbose")))
        log.debug("coterie %s, Python %s: %s", __version__, sys.version.split()[0], shlex.join(sys.argv[1:]))
        return super().invoke(ctx)


def _panels(parameters: list[Any], ctx: Any) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the groups of a command's help that are not empty, each with its lines."""
    records: dict[str, list[tuple[str, str]]] = {panel: [] for panel in ("Arguments", *PANELS, "Options")}
    for parameter in parameters:
        record = parameter.get_help_record(ctx)
        if record is not None:
            is_argument = parameter.param_type_name == "argument"
            records["Arguments" if is_argument else _PANEL_OF.get(parameter.name, "Options")].append(record)
    yield from ((panel, lines) for panel, lines in records.items() if lines)


def set_up_messages(*, quiet: bool, verbose: bool) -> None:
    """Let the library's messages through to stderr: notes and warnings, only warnings, or all with the time."""
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    # Python prints what nobody handles through this handler, to stderr.
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Words(with_origin=verbose))
        logging.lastResort.setLevel(level)
    logging.getLogger("coterie").setLevel(level)
    progress.show_bars(not quiet)
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when a hub is first asked


class _Words(logging.Formatter):
    """Messages as sentences: what is only told stands by itself, a warning says that it is one."""

    def __init__(self, *, with_origin: bool) -> None:
        super().__init__()
        self._with_origin = with_origin
        self._start = time.time()

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"warning: {text}"
        return f"{record.created - self._start:8.1f} s  {record.name}: {text}" if self._with_origin else text
