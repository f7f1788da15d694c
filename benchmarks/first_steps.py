"""The commands of the README on the bundled model, and what they print.

    python benchmarks/first_steps.py [--markdown benchmarks/first_steps.md]

Runs `COMMANDS` as a newcomer would, in a folder where nothing is but `reference/`, and prints them with their results
(what goes to standard output: progress and forecasts are not part of it), 80 columns wide.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
COMMANDS = (
    "coterie inspect reference/model --budget 8MB",
    "coterie compress reference/model run/small --budget 8MB --text reference/text/calibration --tokens 32768",
    "coterie evaluate run/small --against reference/model --text reference/text/test --tokens 20480"
    " --out run/scorecard.json",
    "coterie report run",
)


def run_commands(folder: Path) -> list[str]:
    """Run the commands in an empty folder that is given `reference/`; return what each printed.

    Raises:
        subprocess.CalledProcessError: one of them failed; what it said went to standard error.
    """
    (folder / "reference").symlink_to(HERE / "reference", target_is_directory=True)
    environment = os.environ | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    printed = []
    for command in COMMANDS:
        _, *arguments = command.split()
        done = subprocess.run(
            [sys.executable, "-m", "coterie.cli.main", *arguments],
            cwd=folder, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=True,
        )  # fmt: skip
        printed.append(done.stdout.rstrip())
    return printed


def main() -> None:
    """Run the commands, print them with their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="where it goes as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        printed = run_commands(Path(folder))
    shown = "\n\n".join(f"$ {command}\n{result}" for command, result in zip(COMMANDS, printed, strict=True))
    print(shown)  # the result
    if options.markdown is not None:
        options.markdown.write_text(f"```text\n{shown}\n```\n", encoding="utf-8")


if __name__ == "__main__":
    main()
