"""`make demo`: bring the bundled model to a quarter of its bytes, and halve its experts; show what each of it costs.

    python benchmarks/demo.py [--model reference/model] [--out demo] [--share 0.25] [--keep 0.5]
                              [--tokens 40960] [--test-tokens 20480]
                              [--questions 100]

Compresses the model to a share of its bytes with `PRECISE`, profiles it on the calibration text, compresses it with
`SHOWN` to a share of its experts, evaluates all results against the original
on the test text, prints the tables (in Markdown: OUT/tables.md) and writes the report. At the end a second model goes
the way to llama.cpp: in fewer bits, exported as GGUF, and a real llama.cpp goes on with `PROMPTS`; and the first result
goes on with the last of them in little more than the least memory that a run takes, which has no room for all experts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coterie.amounts import format_bytes
from coterie.compress.apply import compress
from coterie.compress.recipes import RECIPES
from coterie.evaluate.run import evaluate
from coterie.evaluate.scorecard import Scorecard
from coterie.export.run import export
from coterie.model.arch.inspect import inspect
from coterie.outputs import check_output
from coterie.profile.run import profile
from coterie.report.page import report

HERE = Path(__file__).resolve().parent.parent
#: A file in OUT that says that the demo made the folder, which it removes before it starts again.
MARK = ".demo"
MODEL = HERE / "reference" / "model"
CALIBRATION = HERE / "reference" / "text" / "calibration"
TEST = HERE / "reference" / "text" / "test"

#: Recipe and router form of every result: our own, and some methods of the literature of each kind. `coterie bench`
#: compares them all.
SHOWN = (
    ("coterie", "plain"),
    ("heapr", "plain"),
    ("reap", "plain"),
    ("hc-smoe", "plain"),
    ("hc-smoe", "map"),
    ("mergemoe", "plain"),
    ("mergemoe", "map"),
    ("frequency", "plain"),
)

#: Recipes that store weights in fewer bits, and for whom (None: for GGUF files): our own, and what one would take
#: instead. Like `SHOWN` they are not trained here, which takes minutes and less than halves what they cost.
PRECISE = (("coterie-bits-width", "packed"), ("coterie-bits", None), ("gptq", None), ("nearest", None))

#: The one that goes to llama.cpp.
FOR_GGUF = "coterie-bits"

#: A model of a family that llama.cpp computes as transformers does, and what it is to go on with.
FOR_LLAMA = HERE / "reference" / "qwen3_moe"
PROMPTS = ("Q: 37 + 58 = ?\nA:", "import os\nimport re\n\n\ndef ", "The king ")

HEADERS = ("model", "size", "KL", "perplexity", "top-1 agreement", "exact answers", "speed", "seconds to make")


def rows(base: Scorecard, cards: dict[str, tuple[Scorecard, float]]) -> list[tuple[str, ...]]:
    """Return the table's rows: the original first, then the results from the least to the most damage."""

    def row(name: str, card: Scorecard, seconds: float | None) -> tuple[str, ...]:
        overall = card.overall
        accuracy = overall["accuracy"]
        return (
            name,
            format_bytes(card.num_bytes),
            f"{overall['kl']:.4f}",
            f"{overall['perplexity']:.2f}",
            f"{overall['agreement']:.1%}",
            "-" if accuracy is None else f"{accuracy:.1%}",
            "-" if card.speed_ratio is None else f"{card.speed_ratio:.2f}x",
            "-" if seconds is None else f"{seconds:.1f}",
        )

    ordered = sorted(cards.items(), key=lambda entry: float(entry[1][0].overall["kl"] or 0))
    return [row("original", base, None), *(row(name, card, seconds) for name, (card, seconds) in ordered)]


def domain_rows(cards: dict[str, tuple[Scorecard, float]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headers and rows of the table of KL by domain."""
    domains = tuple(next(iter(cards.values()))[0].domains)
    ordered = sorted(cards.items(), key=lambda entry: float(entry[1][0].overall["kl"] or 0))
    body = [(name, *(f"{card.domains[domain]['kl']:.4f}" for domain in domains)) for name, (card, _) in ordered]
    return ("model", *domains), body


def show(console: Console, title: str, headers: tuple[str, ...], body: list[tuple[str, ...]]) -> None:
    """Print one table."""
    table = Table(title=title, title_justify="left")
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index == 0 else "right")
    for line in body:
        table.add_row(*line)
    console.print(table)


def markdown(headers: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    """Return a table as Markdown."""
    lines = [headers, ("---", *("---:" for _ in headers[1:])), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def run_in_llama(console: Console, out: Path, share: float, tokens: int, seed: int) -> None:
    """Bring `FOR_LLAMA` to a share of its bytes, export it, and let a real llama.cpp write text with it."""
    if find_spec("xllamacpp") is None or find_spec("gguf") is None:
        console.print("for the way to llama.cpp: pip install gguf xllamacpp, and run the demo again")
        return
    folder, file = out / FOR_LLAMA.name, out / f"{FOR_LLAMA.name}.gguf"
    budget = int(share * inspect(FOR_LLAMA).file_bytes)
    console.print(f"compressing {FOR_LLAMA.name} with {FOR_GGUF} to {format_bytes(budget)}, for llama.cpp")
    compress(
        FOR_LLAMA, folder, budget=budget, recipe=FOR_GGUF, text=CALIBRATION, tokens=tokens, seed=seed, effort="fast"
    )
    export(folder, file)
    console.print(f"{file.relative_to(out)}: {format_bytes(file.stat().st_size)}; llama.cpp goes on with it:")
    for prompt, text in zip(PROMPTS, continued(file, PROMPTS), strict=True):
        shown = escape(repr(prompt + text))
        console.print(f"  {shown}", highlight=False)


def continued(file: Path, prompts: Sequence[str], num_tokens: int = 24) -> list[str]:
    """Return what llama.cpp writes after each prompt, always the likeliest token."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 512, 1, 0
    settings.warmup, settings.fit_params, settings.verbosity = False, False, 0
    server = xllamacpp.Server(settings)
    texts = []
    for prompt in prompts:
        answer = server.handle_completions({"prompt": prompt, "n_predict": num_tokens, "temperature": 0})
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        texts.append(str(answer["choices"][0]["text"]))
    return texts


def run_within_memory(console: Console, folder: Path) -> None:
    """Let a result write text in the smallest budget that works: a program of its own, since all it takes counts."""
    program = [sys.executable, "-m", "coterie.cli.main"]
    told = subprocess.run(
        [*program, "inspect", folder, "--run", "--memory", "1GiB", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    memory = f"{json.loads(told.stdout)['smallest'] // 2**20 + 8}MiB"  # what a process takes differs a little
    console.print(f"coterie run {folder.name} --memory {memory}, in which not all of its experts have room:")
    line = [*program, "run", folder, PROMPTS[-1], "--memory", memory, "--max-tokens", "24", "--temperature", "0"]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    for shown in done.stdout.strip().splitlines():
        console.print(f"  {escape(shown)}", highlight=False)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "demo", help="folder for everything that is made")
    parser.add_argument("--model", type=Path, default=MODEL, help="the model to halve")
    parser.add_argument("--share", type=float, default=0.25, help="share of the bytes, for recipes of fewer bits")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the experts to keep")
    parser.add_argument("--tokens", type=int, default=40_960, help="calibration tokens")
    parser.add_argument("--test-tokens", type=int, default=20_480, help="test tokens")
    parser.add_argument("--questions", type=int, default=100, help="questions with exact answers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--markdown", type=Path, help="where the tables go, OUT/tables.md by default")
    options = parser.parse_args()

    console = Console(width=None if sys.stdout.isatty() else 140)
    started = time.perf_counter()
    check_output(options.out, kind="demo", accepts=lambda place: (place / MARK).is_file(), folder=True)
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    (options.out / MARK).touch()
    results: dict[str, tuple[Path, float]] = {}
    budget = int(options.share * inspect(options.model).file_bytes)
    for recipe, target in PRECISE:
        name = f"{recipe}, {options.share:.0%}"
        console.print(f"compressing with {recipe} to {format_bytes(budget)}")
        begin = time.perf_counter()
        out = options.out / recipe
        compress(
            options.model, out, budget=budget, recipe=recipe, target=target, effort="fast", text=CALIBRATION,
            tokens=options.tokens, seed=options.seed, device=options.device,
        )  # fmt: skip
        results[name] = (out, time.perf_counter() - begin)
    console.print(f"profiling {options.model.name} on {options.tokens} tokens of {CALIBRATION.relative_to(HERE)}")
    profile_folder = options.out / "profile"
    measured = profile(
        options.model, profile_folder, text=CALIBRATION, tokens=options.tokens, seed=options.seed,
        device=options.device, gradients=True,
    )  # fmt: skip
    for recipe, router in SHOWN:
        name = f"{recipe} ({router})" if RECIPES[recipe].merges else recipe
        console.print(f"compressing with {name}")
        begin = time.perf_counter()
        out = options.out / f"{recipe}-{router}"
        compress(
            options.model, out, keep=options.keep, recipe=recipe, router=router, profile=measured, text=CALIBRATION,
            tokens=options.tokens, seed=options.seed, device=options.device, effort="fast",
        )  # fmt: skip
        results[name] = (out, time.perf_counter() - begin)
    console.print(f"evaluating {len(results)} results on {options.test_tokens} tokens of {TEST.relative_to(HERE)}")
    base, *cards = evaluate(
        [options.model, *(out for out, _ in results.values())],
        against=options.model,
        text=TEST,
        tokens=options.test_tokens,
        seed=options.seed,
        device=options.device,
        questions=options.questions,
        batch_size=4,
        speed_seconds=1.5,
    )
    for card, folder in zip((base, *cards), ("original", *(out.name for out, _ in results.values())), strict=True):
        card.save(options.out / "scorecards" / f"{folder}.json")
    scored = {name: (card, seconds) for card, (name, (_, seconds)) in zip(cards, results.items(), strict=True)}

    share_text = f"{options.keep:.0%} of the experts' bytes kept, or so much of all bytes"
    show(console, f"What each recipe costs, {share_text}", HEADERS, rows(base, scored))
    headers, body = domain_rows(scored)
    show(console, "KL to the original by domain", headers, body)
    tables = markdown(HEADERS, rows(base, scored)) + "\nKL to the original by domain:\n\n" + markdown(headers, body)
    (options.markdown or options.out / "tables.md").write_text(tables)
    page = report(options.out)
    console.print(f"report: {page}")
    run_in_llama(console, options.out, options.share, options.tokens, options.seed)
    run_within_memory(console, options.out / PRECISE[0][0])
    console.print(f"all in {time.perf_counter() - started:.0f} seconds; now to your own model:")
    console.print("  coterie inspect  MODEL --budget 12GiB")
    console.print("  coterie compress MODEL OUT --budget 12GiB --text DIR")
    console.print("  coterie evaluate OUT --against MODEL --text DIR")
    console.print("  coterie export   OUT FILE.gguf")
    console.print("  coterie run      OUT PROMPT --memory 6GiB")


if __name__ == "__main__":
    main()
