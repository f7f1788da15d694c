"""The program ``coterie``: its commands, its exit codes, and how it says what went wrong.

Exit codes: 0 done; 1 cannot be done, and the message says why; 2 the command line is not understood; 130 interrupted.
Run it as ``coterie`` or ``python -m coterie.cli.main``. Nothing heavy is imported here: commands import what they need.
"""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from coterie import __version__
from coterie.cli import command
from coterie.cli.bench import bench
from coterie.cli.calibrate import calibrate
from coterie.cli.card import card
from coterie.cli.compress import compress
from coterie.cli.evaluate import evaluate
from coterie.cli.export import export
from coterie.cli.families import families
from coterie.cli.frontier import frontier
from coterie.cli.imatrix import imatrix
from coterie.cli.inspect import inspect
from coterie.cli.pack import pack
from coterie.cli.plan import plan
from coterie.cli.price import price
from coterie.cli.profile import profile
from coterie.cli.push import push
from coterie.cli.recipes import recipes
from coterie.cli.report import report
from coterie.cli.route import route
from coterie.cli.run import run
from coterie.cli.serve import serve
from coterie.errors import CoterieError

_LONGEST = 2000  # characters of a message


class Program(TyperGroup):
    """Commands whose foreseen errors end in one message instead of a traceback."""

    def invoke(self, ctx: Any) -> object:
        """Run the command; turn errors raised on purpose, and those of the file system, into a message and code 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of our output has gone; typer ends quietly
        except (CoterieError, OSError) as error:
            if ctx.meta.get("debug"):
                raise
            _say(f"error: {_message(error)}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="coterie",
    cls=Program,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    # Plain help: typer's boxes cost twice the time that the rest of the program takes to start.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for function in (
    inspect, calibrate, profile, price, frontier, plan, compress, export, imatrix, route, pack, run, serve, evaluate,
    card, push, bench, report, recipes, families,
):  # fmt: skip
    app.command(cls=command.Command)(function)


def _print_version(show: bool) -> None:
    if show:
        typer.echo(f"coterie {__version__}")
        raise typer.Exit


@app.callback()
def options(
    quiet: command.Quiet = False,
    verbose: command.Verbose = False,
    debug: command.Debug = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make Mixture-of-Experts language models fit the machine you have."""


def _message(error: Exception) -> str:
    text = _message_text(error)
    # What a person typed, or a file is named, may hold control characters and be of any length.
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST // 2]} ... {shown[-_LONGEST // 2 :]}"


def _message_text(error: Exception) -> str:
    # An OSError puts its number in front of its text, which helps nobody.
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def main() -> None:
    """Run the program."""
    sys.exit(app(prog_name="coterie"))


if __name__ == "__main__":
    main()
