"""What `coterie inspect --run` foretells beside what `coterie run` then does; and hits of all policies on real routing.

    python benchmarks/run_forecast.py [--models reference/model] [--size 2GB] [--shares 0.25 0.5] [--tokens 100]
                                      [--repeats 1] [--markdown FILE]

Each model runs with room for a share of its experts, from reads past the page cache and from ordinary ones. A forecast
and a run take turns, and means are compared, so that what others do to the machine falls on both. Runs go on with text
that is not in the trace. A synthetic checkpoint (`make_large.py`), whose routing is that of noise, has its own trace,
recorded on other text; the bundled models have theirs, and beside it stands what those of the other two would say.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from coterie.amounts import parse_bytes
from coterie.run.engine import Runtime, Sampling
from coterie.run.forecast import forecast, hit_rate
from coterie.run.prepare import CHUNK
from coterie.run.replay import replay
from coterie.run.trace import RoutingTrace, bundled_traces, record
from make_large import Shape, make_large

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
POLICIES = ("lru", "decay", "lcu", "edgemoe", "lfu", "belady")
SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
CONTEXT, PROMPT = 1024, 256


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run did: share of hits behind the prompt, tokens a second, seconds to the first token."""

    hits: float
    tokens_per_second: float
    first: float


def measured(model: Path, prompt: str, num_slots: int, tokens: int, *, direct: bool) -> Measured:
    """Run a model with room for so many experts."""
    counters = []  # before every layer

    def note() -> bool:
        counters.append(runtime.residency.counters)
        return False

    with Runtime(model, memory="64GiB", context=CONTEXT, most_experts=num_slots, direct=direct) as runtime:
        runtime.generate("a", max_tokens=1, template=False)  # what is done once in a process is no time of a prompt
        ids = runtime.tokenizer(prompt).input_ids[:PROMPT]
        made = runtime.generate(
            runtime.tokenizer.decode(ids), max_tokens=tokens, template=False,
            sampling=Sampling(temperature=1.0, seed=0),
            cancelled=note,
        )  # fmt: skip
        first, last = counters[-len(runtime.layers) * (made.tokens - 1)], runtime.residency.counters
    hits, misses = last.hits - first.hits, last.misses - first.misses
    return Measured(hits=hits / (hits + misses), tokens_per_second=made.tokens_per_second, first=made.first_seconds)


def rows(
    name: str,
    model: Path,
    trace: RoutingTrace,
    prompt: str,
    options: argparse.Namespace,
    others: Sequence[RoutingTrace],
) -> Iterator[str]:
    """Yield the lines of a model."""
    for share in options.shares:
        slots = round(share * trace.most)
        for direct in (True, False):
            told, seen = [], []
            for _ in range(options.repeats):
                told.append(
                    forecast(
                        model, memory="64GiB", context=CONTEXT, prompt_tokens=PROMPT, trace=trace, most_experts=slots,
                        direct=direct,
                    )
                )  # fmt: skip
                seen.append(measured(model, prompt, slots, options.tokens, direct=direct))
            speeds = [each.own.tokens_per_second for each in told]
            speed, rate = fmean(each.expected for each in speeds), fmean(each.tokens_per_second for each in seen)
            first, took = fmean(each.first_token.expected for each in told), fmean(each.first for each in seen)
            foreign = fmean(hit_rate(other, share, "decay", chunk=CHUNK) for other in others) if others else None
            yield " | ".join([
                f"| {name}", f"{share:.0%}", "direct" if direct else "buffered",
                f"{told[0].disk.bytes_per_second / 1e9:.2f}", f"{told[0].hits.rate.expected:.1%}",
                "-" if foreign is None else f"{foreign:.1%}", f"{fmean(each.hits for each in seen):.1%}",
                f"{fmean(each.low for each in speeds):.1f} to {fmean(each.high for each in speeds):.1f}",
                f"{speed:.1f}", f"{rate:.1f}", f"{speed / rate:.2f}", f"{first:.2f}", f"{took:.2f}",
                f"{first / took:.2f} |",
            ])  # fmt: skip


def hit_rows() -> Iterator[str]:
    """Yield the lines of the table of hits."""
    for name, trace in bundled_traces().items():
        steps = trace.steps()
        asked = sum(len(experts) for _, _, experts in steps)
        for share in SHARES:
            rates = [replay(steps, round(share * trace.most), policy) / asked for policy in POLICIES]
            gain, of_most = 100 * (rates[1] - rates[0]), rates[1] / rates[-1]
            cells = " | ".join(f"{100 * rate:.1f}" for rate in rates)
            yield f"| {name} | {100 * share:g} % | {cells} | {gain:+.1f} | {of_most:.1%} |"


def prompt_rows() -> Iterator[str]:
    """Yield the lines of the table of hits behind a prompt."""
    for name, trace in bundled_traces().items():
        for share in (0.25, 0.5):
            cells = [
                f"{100 * hit_rate(trace, share, policy, chunk=chunk):.1f}"
                for chunk in (CHUNK, 1)
                for policy in ("lru", "decay", "belady")
            ]
            yield f"| {name} | {100 * share:g} % | {' | '.join(cells)} |"


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = [REFERENCE / name for name in ("model", "glm4_moe", "qwen3_moe")]
    parser.add_argument("--models", type=Path, nargs="*", default=bundled)
    parser.add_argument("--size", default="2GB", help="bytes of the synthetic checkpoint; 0 for none")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="where it goes as well")
    options = parser.parse_args()
    lines: list[str] = []

    def say(*more: str) -> None:
        lines.extend(more)
        print(*more, sep="\n", flush=True)

    say(
        "Hits in a hundred, by the share of all experts that is in memory; decay over lru in points, and as a share of "
        "belady.", "",
        f"| routing of | in memory | {' | '.join(POLICIES)} | over lru | of belady |",
        f"| --- | ---: |{' ---: |' * (len(POLICIES) + 2)}", *hit_rows(), "",
    )  # fmt: skip
    say(
        f"Behind the first half of each text, which is a prompt: one that passes in chunks of {CHUNK} tokens, as in "
        "a run, and one of which policies see every token.", "",
        "| routing of | in memory | chunks: lru | decay | belady | tokens: lru | decay | belady |",
        f"| --- | ---: |{' ---: |' * 6}", *prompt_rows(), "",
    )  # fmt: skip
    say(
        f"Foretold and measured: {options.tokens} tokens behind {PROMPT} of a prompt, means of {options.repeats}.",
        "",
        "| model | in memory | reads | GB/s | hits foretold | by others' traces | hits | tokens/s: band | foretold "
        "| measured | ratio | first token, s: foretold | measured | ratio |",
        f"| --- | ---: | --- |{' ---: |' * 11}",
    )
    traces = bundled_traces()
    text = (REFERENCE / "text" / "test" / "python.txt").read_text(encoding="utf-8")[40_000:44_000]
    if options.size != "0":
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "large"
            texts = make_large(model, layers=Shape().layers_in(parse_bytes(options.size)))
            words = "".join(file.read_text(encoding="utf-8") for file in sorted(texts.glob("*.txt")))
            with Runtime(model, memory="64GiB", context=CONTEXT) as runtime:
                trace = record(runtime, {"text": words[:2000]}, tokens=512)
            for line in rows(f"synthetic, {options.size}", model, trace, words[4000:6000], options, []):
                say(line)
    for model in options.models:
        others = [trace for name, trace in traces.items() if name != model.name]
        for line in rows(model.name, model, traces[model.name], text, options, others):
            say(line)
    if options.markdown is not None:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
