"""How far off the nearest numbers of block types are: their mean square error, as a share of the mean square.

    python benchmarks/block_types.py [--types TURBO2 IQ2_XXS ...] [--rows 64] [--blocks 4] [--markdown FILE]

Rows of numbers are drawn from a normal, a Laplace and a Student distribution of three degrees of freedom, whose tails
are heavy; columns weigh the same, and nothing is known of what is multiplied with them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import Laplace, Normal, StudentT

from coterie.model.disk.encodings.ggml import SIZES, bits_of, get_type
from coterie.model.disk.encodings.ggml.rounding import round_to_nearest

DISTRIBUTIONS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "normal": lambda shape: Normal(0.0, 1.0).sample(shape),
    "Laplace": lambda shape: Laplace(0.0, 1.0).sample(shape),
    "Student t, 3": lambda shape: StudentT(3.0).sample(shape),
}
TYPES = ("TURBO2", "IQ2_XXS", "TURBO3", "IQ3_XXS", "TURBO4", "IQ4_XS")


def error(name: str, sample: Callable[[tuple[int, ...]], Tensor], rows: int, blocks: int) -> float:
    """Return the share of the mean square that is lost when random rows are rounded."""
    torch.manual_seed(0)
    weight_1RC = sample((1, rows, blocks * 256))
    _, value_1RC = round_to_nearest(weight_1RC, torch.ones(1, blocks * 256), get_type(name))
    return float((value_1RC - weight_1RC).square().mean() / weight_1RC.square().mean())


def main() -> None:
    """Round and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=SIZES, default=TYPES, metavar="TYPE")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=4, help="of 256 numbers, in a row")
    parser.add_argument("--markdown", type=Path, help="where the table goes as well")
    options = parser.parse_args()
    lines = [f"| type | bits | {' | '.join(DISTRIBUTIONS)} |", f"| --- |{' ---: |' * (1 + len(DISTRIBUTIONS))}"]
    for name in options.types:
        errors = [error(name, sample, options.rows, options.blocks) for sample in DISTRIBUTIONS.values()]
        lines.append(f"| {name} | {bits_of(name):.2f} | {' | '.join(f'{value:.2g}' for value in errors)} |")
    shown = "\n".join(lines) + "\n"
    print(shown, end="")  # the result
    if options.markdown is not None:
        options.markdown.write_text(shown, encoding="utf-8")


if __name__ == "__main__":
    main()
