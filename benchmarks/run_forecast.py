"""What `coterie inspect --run` foretells beside what `coterie run` then does, and how near to its bound a run comes.

    python benchmarks/run_forecast.py [--models reference/model] [--size 1GB] [--shares 0.25 0.5] [--tokens 32]
                                      [--repeats 3] [--markdown FILE]

Each model runs with room for a share of its experts, from reads past the page cache and from ordinary ones. A forecast
and a run take turns, and medians are compared, so that what others do to the machine falls on both. What is foretold is
a run: its trace is of prompts and what the model made of them, recorded with other prompts than those of the runs. A
synthetic checkpoint (`make_large.py`), whose weights mean nothing, has enough bytes for the disk to matter.

The bound is the longer of reading what a token misses, at the most bytes a second that the probe of the same turn saw,
and of computing, as that probe measured it with nothing else to do.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from coterie.amounts import format_bytes, parse_bytes
from coterie.run.engine import Runtime, Sampling
from coterie.run.forecast import Forecast, forecast, hit_rate
from coterie.run.prepare import CHUNK
from coterie.run.trace import RoutingTrace, bundled_traces, recording
from make_large import Shape, make_large
from printed import Printed

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
CONTEXT, PROMPT = 1024, 128


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run did.

    Attributes:
        hits: share of what tokens behind the prompt chose that was in memory.
        read: bytes that one of them read.
        seconds: how long one of them took.
        first: seconds to the first token.
    """

    hits: float
    read: float
    seconds: float
    first: float


def measured(
    model: Path, prompt: str, num_slots: int, tokens: int, *, direct: bool, seed: int, lookahead: int = 0
) -> Measured:
    """Run a model with room for so many experts."""
    counters = []  # before every layer

    def note() -> bool:
        counters.append(runtime.residency.counters)
        return False

    settings = {"most_experts": num_slots, "direct": direct, "lookahead": lookahead}
    with Runtime(model, memory="64GiB", context=CONTEXT, **settings) as runtime:
        runtime.generate("a", max_tokens=1, template=False)  # what is done once in a process is no time of a prompt
        made = runtime.generate(
            runtime.tokenizer.decode(runtime.tokenizer(prompt).input_ids[:PROMPT]), max_tokens=tokens, template=False,
            sampling=Sampling(temperature=1.0, seed=seed), cancelled=note,
        )  # fmt: skip
        first, last = counters[-len(runtime.layers) * (made.tokens - 1)], runtime.residency.counters
    hits, misses = last.hits - first.hits, last.misses - first.misses
    return Measured(
        hits=hits / (hits + misses), read=(last.num_bytes - first.num_bytes) / (made.tokens - 1),
        seconds=1 / made.tokens_per_second, first=made.first_seconds,
    )  # fmt: skip


def trace_of_runs(model: Path, prompts: Sequence[str], tokens: int) -> RoutingTrace:
    """Return what tokens chose in runs: as many of the end of a prompt as were made behind it, and these."""
    with Runtime(model, memory="64GiB", context=CONTEXT) as runtime:
        with recording(runtime.model, runtime.layers) as recorder:
            for number, prompt in enumerate(prompts):
                recorder.begin(str(number))
                ids_1S = runtime.tokenizer(prompt, return_tensors="pt").input_ids[:, :PROMPT]
                runtime.generate_ids(ids_1S, max_tokens=tokens + 1, sampling=Sampling(temperature=1.0, seed=number))
        whole = recorder.trace(model=runtime.digest, name=model.name)
    ends = {name: chosen_TLK[PROMPT - tokens :] for name, chosen_TLK in whole.chosen.items()}
    return RoutingTrace(
        model=whole.model, name=whole.name, layers=whole.layers, num_experts=whole.num_experts, chosen=ends
    )


def rows(
    name: str, model: Path, prompts: Sequence[str], text_trace: RoutingTrace | None, shares: Sequence[float],
    options: argparse.Namespace,
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """Yield the lines of a model in the table of forecasts, and in that of bounds."""
    trace = trace_of_runs(model, prompts[:3], options.tokens)
    guesses = max(chosen_TLK.shape[2] for chosen_TLK in trace.chosen.values())
    for share in shares:
        slots = round(share * trace.most)
        for direct in (True, False):
            told: list[Forecast] = []
            seen: list[Measured] = []
            ahead: list[Measured] = []
            for turn in range(options.repeats):
                told.append(
                    forecast(
                        model, memory="64GiB", context=CONTEXT, prompt_tokens=PROMPT, trace=trace, most_experts=slots,
                        direct=direct, disk_seconds=1.5,
                    )
                )  # fmt: skip
                run = partial(measured, model, prompts[3 + turn], slots, options.tokens, direct=direct, seed=turn)
                seen.append(run())
                if share == min(shares) and direct:
                    ahead.append(run(lookahead=guesses))
            speeds = [each.own.tokens_per_second for each in told]
            speed = median(each.expected for each in speeds)
            rate = median(1 / each.seconds for each in seen)
            first, took = median(each.first_token.expected for each in told), median(each.first for each in seen)
            text = None if text_trace is None else hit_rate(text_trace, share, "follow", chunk=CHUNK)
            forecasts = " | ".join([
                f"| {name}", f"{share:.0%}", "direct" if direct else "buffered",
                f"{median(each.disk.bytes_per_second for each in told) / 1e9:.2f}",
                "-" if text is None else f"{text:.1%}", f"{told[0].hits.rate.expected:.1%}",
                f"{np.mean([each.hits for each in seen]):.1%}",
                f"{median(each.low for each in speeds):.1f} to {median(each.high for each in speeds):.1f}",
                f"{speed:.1f}", f"{rate:.1f}", f"{speed / rate:.2f}", f"{first:.2f}", f"{took:.2f}",
                f"{first / took:.2f} |",
            ])  # fmt: skip
            bounds = "" if not ahead else "\n".join(
                bound(f"| {name} | {share:.0%} | {kind}", told, runs)
                for kind, runs in (("-", seen), (f"--lookahead {guesses}", ahead))
            )  # fmt: skip
            yield forecasts, bounds


def bound(label: str, told: Sequence[Forecast], seen: Sequence[Measured]) -> str:
    """Return a line of the table of bounds."""
    reading = [run.read / said.disk.bytes_per_second for said, run in zip(told, seen, strict=True)]
    computing = [said.alone["experts"] + said.alone["rest"] for said in told]
    shares = [max(read, compute) / run.seconds for read, compute, run in zip(reading, computing, seen, strict=True)]
    cells = (
        f"{median(run.read for run in seen) / 1e6:.1f} MB", f"{1000 * median(reading):.1f}",
        f"{1000 * median(computing):.1f}", f"{1000 * median(run.seconds for run in seen):.1f}",
        f"{median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})",
    )  # fmt: skip
    return f"{label} | {' | '.join(cells)} |"


def prefill_row(name: str, model: Path, text: str, num_chunks: int) -> str:
    """Return a line of the table of bytes that a prompt reads."""
    with Runtime(model, memory="64GiB", context=CONTEXT) as runtime:
        most = len(runtime.residency.records)
    with Runtime(model, memory="64GiB", context=CONTEXT, most_experts=round(0.25 * most)) as runtime:
        ids_1S = runtime.tokenizer(text, return_tensors="pt").input_ids[:, : num_chunks * CHUNK]
        runtime.generate_ids(ids_1S, max_tokens=1)
        counters, records = runtime.residency.counters, runtime.residency.records.values()
    all_of_them = sum(record.num_bytes for record in records)
    asked = (counters.hits + counters.misses) * all_of_them / len(records)
    cells = (
        f"{ids_1S.shape[1]}", format_bytes(counters.num_bytes),
        f"{counters.num_bytes / (num_chunks * all_of_them):.2f}",
        f"{counters.num_bytes / asked:.2f}",
    )  # fmt: skip
    return f"| {name} | 25% | {' | '.join(cells)} |"


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = [REFERENCE / name for name in ("model", "glm4_moe", "qwen3_moe")]
    parser.add_argument("--models", type=Path, nargs="*", default=bundled)
    parser.add_argument("--size", default="1GB", help="bytes of the synthetic checkpoint; 0 for none")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5], help="bundled ones take the first")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="where it goes as well")
    options = parser.parse_args()
    printed = Printed()
    say = printed.say

    say(
        f"Foretold and measured: {options.tokens} tokens behind {PROMPT} of a prompt, medians of {options.repeats} "
        "turns.", "",
        "| model | in memory | reads | GB/s | hits of text | foretold | measured | tokens/s: band | foretold "
        "| measured | ratio | first token, s: foretold | measured | ratio |",
        f"| --- | ---: | --- |{' ---: |' * 11}",
    )  # fmt: skip
    prose = (REFERENCE / "text" / "test" / "python.txt").read_text(encoding="utf-8")[40_000:]
    prompts = [prose[start : start + 1500] for start in range(0, 1500 * (3 + options.repeats), 1500)]
    bounds, prefills = [], []

    def add(*of_a_model: tuple[str, str]) -> None:
        for forecasts, more in of_a_model:
            say(forecasts)
            bounds.extend([more] if more else [])

    with tempfile.TemporaryDirectory() as folder:
        if options.size != "0":
            model = Path(folder) / "large"
            texts = make_large(model, layers=Shape().layers_in(parse_bytes(options.size)))
            words = "".join(file.read_text(encoding="utf-8") for file in sorted(texts.glob("*.txt")))
            own = [words[start : start + 200] for start in range(0, 200 * (3 + options.repeats), 200)]
            for line in rows(f"synthetic, {options.size}", model, own, None, options.shares, options):
                add(line)
            prefills.append(prefill_row(f"synthetic, {options.size}", model, words, 2))
        for model in options.models:
            for line in rows(model.name, model, prompts, bundled_traces()[model.name], options.shares[:1], options):
                add(line)
            prefills.append(prefill_row(model.name, model, prose, 3))
    say(
        "", "Decode beside its bound, reads past the page cache, milliseconds a token: the longer of reading and "
        "computing, each alone.", "",
        "| model | in memory | guesses | read a token | reading | computing | measured | share of the bound |",
        f"| --- | ---: | --- |{' ---: |' * 5}", *bounds,
        "", f"Bytes that a prompt reads in chunks of {CHUNK} tokens: beside those of all experts for each chunk, and "
        "beside those of the experts that its tokens chose.", "",
        "| model | in memory | tokens | read | of all experts a chunk | of those chosen |",
        f"| --- | ---: |{' ---: |' * 4}", *prefills,
    )  # fmt: skip
    printed.keep(options.markdown)


if __name__ == "__main__":
    main()
