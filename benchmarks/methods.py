"""Every method on two reference models: damage against bytes, with the spread over draws of the calibration text.

    python benchmarks/methods.py [--recipes NAME,NAME] [--routers plain map] [--removed 0.25 0.5 0.625 0.75]
                                 [--seeds 3] [--jobs 2] [--out methods] [--keep benchmarks/methods]

Runs `coterie bench` on the bundled OLMoE and GLM-4-MoE: every published method and `coterie`, at each size, on each
draw. It takes hours and may be ended at any time; the same command goes on. Tables, results and plots are then copied
to --keep with the endings .md, .json, .svg and .png. A model that is not there is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.bench.run import PLOT, RESULTS, Bench, bench
from coterie.compress.recipes import RECIPES

HERE = Path(__file__).resolve().parent.parent
MODELS = (HERE / "reference" / "model", HERE / "reference" / "glm4_moe")
CALIBRATION = HERE / "reference" / "text" / "calibration"
TEST = HERE / "reference" / "text" / "test"

#: What is published, and the default of `coterie compress`; its variants come with `--recipes all`.
RECIPES_HERE = tuple(
    name for name, recipe in RECIPES.items() if not name.startswith("coterie-") and recipe.quantiser is None
)


def run(models: Sequence[Path], out: Path, **settings: Any) -> Bench:
    """Run the bench on the models that are there."""
    available = [model for model in models if (model / "config.json").is_file()]
    for model in models:
        if model not in available:
            print(f"{model} is not there: left out", file=sys.stderr)
    return bench(available, out, text=CALIBRATION, test=TEST, **settings)


def header(results: dict[str, Any], arguments: Sequence[str]) -> str:
    """Say how it was measured, above the tables; `arguments` are those of the command."""
    settings, machine, code = results["settings"], results["environment"], results["code"]
    seeds = sorted({cell["seed"] for cell in results["cells"]})
    draws = f"{len(seeds)} draw{'s' if len(seeds) > 1 else ''}"
    command = shlex.join(["python", "benchmarks/methods.py", *arguments])
    test_tokens = "all" if settings["test_tokens"] is None else f"{settings['test_tokens']:,}"
    return (
        "# Methods\n\n"
        f"Made by `{command}`: {len(results['cells'])} compressions, each evaluated against the original "
        f"on {test_tokens} tokens of text that no method has seen. Calibration: {settings['tokens']:,} tokens "
        f"of the same kinds of text, {draws}; recipes that distil do so at effort {settings['effort']}. "
        f"One thread of {machine['device_name']}; torch {code['torch']}, transformers {code['transformers']}.\n\n"
        "![damage against bytes](methods.svg)\n\n"
    )


def compact(results: dict[str, Any]) -> str:
    """Return results as JSON with a line for each row and each cell; what cells say of domains is in the rows."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {key: rounded(entry) for key, entry in value.items()}
        return [rounded(entry) for entry in value] if isinstance(value, list) else value

    left_out = ("domains", "traceback", "model_digest")
    cells = [{key: value for key, value in cell.items() if key not in left_out} for cell in results["cells"]]
    parts = []
    for name, content in (results | {"cells": cells}).items():
        if isinstance(content, list):
            lines = ",\n".join(json.dumps(rounded(entry), ensure_ascii=False) for entry in content)
            parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
        else:
            parts.append(f"{json.dumps(name)}: {json.dumps(content, ensure_ascii=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def keep(measured: Bench, place: Path, arguments: Sequence[str] = ()) -> None:
    """Copy tables, results and plots to `place`, each with its ending; `arguments` are those of the command."""
    content = (measured.out / RESULTS).read_text(encoding="utf-8")
    text = header(json.loads(content), arguments).replace("methods.svg", f"{place.name}.svg")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.with_suffix(".md").write_text(text + measured.table, encoding="utf-8")
    place.with_suffix(".json").write_text(compact(json.loads(content)), encoding="utf-8")
    for ending in (".svg", ".png"):
        plot = measured.out / PLOT.replace(".svg", ending)
        if plot.exists():
            shutil.copyfile(plot, place.with_suffix(ending))


def main() -> None:
    """Measure what the command line asks for, print the tables and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, default=MODELS)
    parser.add_argument("--out", type=Path, default=HERE / "methods", help="folder of the bench")
    parser.add_argument("--keep", type=Path, default=HERE / "benchmarks" / "methods", help="where what it found goes")
    parser.add_argument("--recipes", default=",".join(RECIPES_HERE), help="names separated by commas, or all")
    parser.add_argument("--routers", nargs="+", default=["plain"])
    parser.add_argument("--removed", nargs="+", type=float, default=[0.25, 0.5, 0.625, 0.75])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65_536, help="calibration tokens")
    parser.add_argument("--test-tokens", type=int, default=20_480)
    parser.add_argument("--questions", type=int, default=200, help="questions with exact answers")
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--jobs", type=int, default=2)
    options = vars(parser.parse_args())
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("coterie.bench").setLevel(logging.INFO)
    place = options.pop("keep")
    measured = run(options.pop("models"), options.pop("out"), **options)
    print(measured.summary)
    keep(measured, place, sys.argv[1:])


if __name__ == "__main__":
    main()
