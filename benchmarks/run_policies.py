"""Hits of all policies on the routing of three trained models, replayed.

    python benchmarks/run_policies.py [--markdown FILE]

The traces are those that come with the package (`python reference/traces.py`): five domains of 512 tokens each, one
after the other. Nothing is timed, so every machine prints the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from coterie.run.forecast import hit_rate
from coterie.run.policies import Decay, shape_of
from coterie.run.prepare import CHUNK
from coterie.run.replay import replay
from coterie.run.trace import bundled_traces
from printed import Printed

POLICIES = ("lru", "decay", "follow", "lcu", "edgemoe", "lfu", "belady")
SHARES = (0.125, 0.25, 0.5, 0.75)
HALF_LIVES = (12.0, 16.0, 20.0, 24.0, 32.0)


def hit_rows() -> Iterator[str]:
    """Yield the lines of the table of hits."""
    for name, trace in bundled_traces().items():
        steps = trace.steps()
        asked = sum(len(entry.experts) for entry in steps)
        for share in SHARES:
            rates = [replay(steps, round(share * trace.most), policy) / asked for policy in POLICIES]
            own, gain = rates[POLICIES.index("follow")], 100 * (rates[POLICIES.index("follow")] - rates[0])
            cells = " | ".join(f"{100 * rate:.1f}" for rate in rates)
            yield f"| {name} | {100 * share:g} % | {cells} | {gain:+.1f} | {own / rates[-1]:.1%} |"


def half_life_rows() -> Iterator[str]:
    """Yield the lines of the table of half-lives."""
    for name, trace in bundled_traces().items():
        steps = trace.steps()
        asked = sum(len(entry.experts) for entry in steps)
        shape = shape_of((entry.layer, expert) for entry in steps for expert in entry.experts)
        for share in (0.125, 0.25, 0.5):
            slots = round(share * trace.most)
            hits = [replay(steps, slots, Decay(shape, half_life=each)) for each in HALF_LIVES]
            yield f"| {name} | {100 * share:g} % | {' | '.join(f'{100 * each / asked:.1f}' for each in hits)} |"


def prompt_rows() -> Iterator[str]:
    """Yield the lines of the table of hits behind a prompt."""
    for name, trace in bundled_traces().items():
        for share in (0.25, 0.5):
            rates = {
                (chunk, policy): hit_rate(trace, share, policy, chunk=chunk)
                for chunk in (CHUNK, 1)
                for policy in ("lru", "decay", "follow", "belady")
            }
            cells = " | ".join(f"{100 * rate:.1f}" for rate in rates.values())
            yield f"| {name} | {100 * share:g} % | {cells} | {rates[CHUNK, 'follow'] / rates[CHUNK, 'belady']:.1%} |"


def main() -> None:
    """Replay, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="where it goes as well")
    options = parser.parse_args()
    printed = Printed()
    say = printed.say

    say(
        "Hits in a hundred, by the share of all experts that is in memory; follow over lru in points, and as a "
        "share of belady.", "",
        f"| routing of | in memory | {' | '.join(POLICIES)} | over lru | of belady |",
        f"| --- | ---: |{' ---: |' * (len(POLICIES) + 2)}", *hit_rows(), "",
        "Hits of decay, by the tokens after which a use counts half.", "",
        f"| routing of | in memory | {' | '.join(f'{each:g}' for each in HALF_LIVES)} |",
        f"| --- | ---: |{' ---: |' * len(HALF_LIVES)}", *half_life_rows(), "",
        f"Behind the first half of each text, which is a prompt: one that passes in chunks of {CHUNK} tokens, as "
        "in a run, and one that passes token by token; follow in chunks as a share of belady.", "",
        "| routing of | in memory | chunks: lru | decay | follow | belady | tokens: lru | decay | follow | belady "
        "| of belady |",
        f"| --- | ---: |{' ---: |' * 9}", *prompt_rows(), "",
    )  # fmt: skip
    printed.keep(options.markdown)


if __name__ == "__main__":
    main()
