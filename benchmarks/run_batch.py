"""What several answers at once read, and what guesses bring, with room for part of the experts.

    python benchmarks/run_batch.py [--models reference/model reference/qwen3_moe] [--shares 0.25 0.5] [--tokens 40]
                                   [--markdown FILE]

Answers: the same eight to a prompt, each drawn with a seed of its own, one after the other and 2, 4 and 8 at once; what
is counted comes behind the prompt.

Guesses: the same tokens are drawn with and without them (that is asserted), in turns of one text each, so that what
others do to the machine falls on all. Once four are made a pass, come what may, and once as many as are worth it,
behind a text on which that is tried, which is not counted. The sibling is the model itself with half of its experts
(`coterie compress --keep 0.5 --recipe reap`), which takes memory of its own, on top of that for the experts. In
float32, so that what is drawn is the same.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import coterie
from coterie.run.batch import Wanted
from coterie.run.engine import Runtime, Sampling
from coterie.run.stop_rule import FixedLength
from printed import Printed

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
CONTEXT, PROMPT = 512, 64
BATCHES = (1, 2, 4, 8)
#: Texts that go on: of these domains, from these characters.
TEXTS = (("python", 40_000), ("english_prose", 9_000))
#: Tokens of a text before them, on which it is tried what guesses are worth.
TRIED = 64


@dataclass
class Taken:
    """What was taken, and what for."""

    tokens: int = 0
    seconds: float = 0.0
    num_bytes: int = 0
    misses: int = 0
    asked: int = 0
    chosen: int = 0
    texts: list[list[int]] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def prompts(runtime: Runtime) -> list[torch.Tensor]:
    """Return the ids of texts to go on with."""
    texts = []
    for name, begin in TEXTS:
        text = (REFERENCE / "text" / "test" / f"{name}.txt").read_text(encoding="utf-8")
        texts.append(runtime.ids(text[begin : begin + 400], template=False)[:, :PROMPT])
    return texts


def answered(runtime: Runtime, ids_1S: torch.Tensor, seeds: Sequence[int], tokens: int, taken: Taken) -> None:
    """Make answers to a prompt at once; add what they took behind it."""
    begun: list[tuple[float, int, int, int, int]] = []

    def now() -> tuple[float, int, int, int, int]:
        counters = runtime.residency.counters
        asked = counters.hits + counters.misses
        return time.perf_counter(), counters.num_bytes, counters.misses, asked, runtime.experts.num_chosen

    def note(token: int, scores_V: torch.Tensor) -> bool:
        if not begun:
            begun.append(now())
        return False

    outcomes = runtime.generate_batch([
        Wanted(ids_1S=ids_1S, max_tokens=tokens, sampling=Sampling(temperature=1.0, seed=seed), on_token=note)
        for seed in seeds
    ])  # fmt: skip
    first, last = begun[0], now()
    taken.tokens += sum(len(each.ids) - 1 for each in outcomes)
    taken.texts += [each.ids for each in outcomes]
    taken.seconds += last[0] - first[0]
    taken.num_bytes += last[1] - first[1]
    taken.misses += last[2] - first[2]
    taken.asked += last[3] - first[3]
    taken.chosen += last[4] - first[4]


def opened(model: Path, share: float, *, batch: int = 1, draft: str = "off") -> Runtime:
    """Return a runtime with room for a share of the experts."""
    options = {"memory": "64GiB", "context": CONTEXT, "dtype": torch.float32, "batch": batch, "draft": draft}
    with Runtime(model, **options) as whole:
        most = whole.budget.most
    return Runtime(model, most_experts=round(share * most), **options)


def batch_rows(model: Path, share: float, tokens: int) -> Iterator[str]:
    """Yield the lines of a model's answers."""
    taken = {count: Taken() for count in BATCHES}
    with opened(model, share, batch=max(BATCHES)) as runtime:
        texts = prompts(runtime)
        for ids_1S in texts:
            answered(runtime, ids_1S, range(max(BATCHES)), tokens, Taken())  # so that all find what they leave behind
            for count in BATCHES:
                for begin in range(0, max(BATCHES), count):
                    answered(runtime, ids_1S, range(begin, begin + count), tokens, taken[count])
    one = taken[1]
    for count, each in taken.items():
        size, alone = each.num_bytes / each.tokens, one.num_bytes / one.tokens
        yield " | ".join([
            f"| {model.name}", f"{share:.0%}", f"{count}", f"{each.chosen / each.asked:.2f}",
            f"{each.misses / each.tokens:.2f}", f"{size / 1e3:,.0f} kB", f"{size / alone:.2f}",
            f"{each.per_second:.1f}", f"{each.per_second / one.per_second:.2f} |",
        ])  # fmt: skip


def draft_rows(model: Path, share: float, tokens: int, sibling: Path) -> Iterator[str]:
    """Yield the lines of a model's guesses."""
    drafts = [("off", None), *((name, four) for name in ("lookup", "resident", "resident:0.5", str(sibling))
                               for four in (True, False))]  # fmt: skip
    runtimes = {each: opened(model, share, draft=each[0]) for each in drafts}
    taken = {each: Taken() for each in drafts}
    for (_, four), runtime in runtimes.items():
        if four:
            runtime.speculation.rule = FixedLength(4)
        answered(runtime, prompts(runtime)[0], [99], 8 if four or four is None else TRIED, Taken())
    before = {each: runtime.speculation and runtime.speculation.drafted for each, runtime in runtimes.items()}
    for seed, ids_1S in enumerate(prompts(next(iter(runtimes.values())))):
        for each, runtime in runtimes.items():
            answered(runtime, ids_1S, [seed], tokens, taken[each])
    off = taken["off", None]
    for (name, four), each in taken.items():
        assert each.texts == off.texts, f"{name} drew another text"
        runtime = runtimes[name, four]
        named = "sibling" if name == str(sibling) else name
        how = "-" if four is None else "four" if four else "as it pays"
        cells = ["-", "1.00"]
        if runtime.speculation is not None:
            drafted = runtime.speculation.drafted.since(before[name, four])
            cells = [
                f"{drafted.right / drafted.guesses:.0%}" if drafted.guesses else "-",
                f"{drafted.tokens / drafted.passes:.2f}",
            ]  # fmt: skip
        yield (
            f"| {model.name} | {share:.0%} | {named} | {how} | {' | '.join(cells)} | {each.misses / each.tokens:.2f} "
            f"| {each.num_bytes / max(off.num_bytes, 1) * off.tokens / each.tokens:.2f} | {each.per_second:.1f} "
            f"| {each.per_second / off.per_second:.2f} |"
        )
        runtime.close()


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = [REFERENCE / "model", REFERENCE / "qwen3_moe"]
    parser.add_argument("--models", type=Path, nargs="*", default=bundled)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--markdown", type=Path, help="where it goes as well")
    options = parser.parse_args()
    printed = Printed()
    say = printed.say

    say(
        f"Eight answers of {options.tokens} tokens to each of {len(TEXTS)} prompts; ratios are those to one at a time.",
        "",
        "| model | in memory | at once | tokens an expert serves | misses a token | bytes a token | ratio | tokens/s "
        "| ratio |",
        f"| --- |{' ---: |' * 8}",
    )  # fmt: skip
    for model in options.models:
        for share in options.shares:
            say(*batch_rows(model, share, options.tokens))
    say(
        "",
        f"Guesses: {len(TEXTS)} texts of {options.tokens} tokens, drawn at temperature 1; ratios are those to none.",
        "",
        "| model | in memory | who guesses | how many | right | tokens a pass | misses a token | bytes, ratio "
        "| tokens/s | ratio |",
        f"| --- | ---: | --- | --- |{' ---: |' * 6}",
    )  # fmt: skip
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            text = {"text": REFERENCE / "text" / "calibration", "tokens": 8192, "seq_len": 256}
            sibling = coterie.compress(model, Path(folder) / "half", keep=0.5, recipe="reap", **text).out
            for share in options.shares:
                say(*draft_rows(model, share, options.tokens, sibling))
    printed.keep(options.markdown)


if __name__ == "__main__":
    main()
