"""How long choosing codes takes, type by type, and what more threads are worth.

    python benchmarks/quantise_speed.py [--types Q4_K IQ3_XXS ...] [--threads 2] [--repeats 3] [--markdown FILE]

Matrices like those of experts (4 of 1024 x 1024) are rounded with GPTQ by one thread and by several, in turns, and the
best of the turns counts: machines are shared. "s/GB" is what a GB of the original in bfloat16 takes with all threads,
"times as fast" what they are worth beside one; factoring the Hessians is in both, summing them up is not.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

from coterie.compress.moments import Inputs
from coterie.compress.quantisers.gptq import gptq
from coterie.model.disk.encodings.ggml import SIZES, bits_of, get_type

TYPES = ("Q8_0", "Q6_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S")
MATRICES, SIZE = 4, 1024


def problem() -> tuple[torch.Tensor, Inputs]:
    """Return matrices (N, R, C) and the products of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mix_CC = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5 + 0.5 * torch.eye(SIZE)
    input_NTC = torch.randn(MATRICES, 2 * SIZE, SIZE, generator=generator) @ mix_CC
    weight_NRC = torch.randn(MATRICES, SIZE, SIZE, generator=generator) / SIZE**0.5
    tokens = (2 * SIZE,) * MATRICES
    return weight_NRC, Inputs(hessian_NCC=input_NTC.mT @ input_NTC, missed_NCC=None, num_tokens=tokens)


def seconds(name: str, weight_NRC: torch.Tensor, inputs: Inputs, threads: int) -> float:
    """Return how long a turn takes."""
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    gptq(weight_NRC, inputs, get_type(name))
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=SIZES, default=TYPES, metavar="TYPE")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="where the table goes as well")
    options = parser.parse_args()
    weight_NRC, inputs = problem()
    heads = ("type", "bits", "s/GB", f"times as fast with {options.threads} threads")
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for name in options.types:
        turns = [
            [seconds(name, weight_NRC, inputs, threads) for threads in (1, options.threads)]
            for _ in range(options.repeats)
        ]
        one, several = (min(each) for each in zip(*turns, strict=True))
        per_gb = several / weight_NRC.numel() * 1e9 / 2
        lines.append(f"| {name} | {bits_of(name):.2f} | {per_gb:.0f} | {one / several:.2f} |")
    shown = "\n".join(lines) + "\n"
    print(shown, end="")  # the result
    if options.markdown is not None:
        options.markdown.write_text(shown, encoding="utf-8")


if __name__ == "__main__":
    main()
