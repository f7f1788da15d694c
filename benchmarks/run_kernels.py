"""How fast kernels of few bits multiply beside plain matrices: ratios in one run.

    python benchmarks/run_kernels.py [--repeats 3] [--markdown FILE]

Plain matrices in bfloat16 and packed ones of the same shape take turns, with one thread and weights from memory; for
one token `torch.mv` besides, which is what a linear layer could be computed with. What is printed is the processor's
time of a plain product, the median, and that time by the others'.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from coterie.model.disk.encodings.kernel_matrix import KernelMatrix, this_isa
from coterie.run.kernels import PlainProjection, Projection, projection_of

#: Shape of the matrices, and how many of them take turns: more than processors keep.
ROWS, COLUMNS, COPIES = 1280, 1024, 96


def products(repeats: int) -> list[str]:
    """Return the lines of the table."""
    rows, columns, copies = ROWS, COLUMNS, COPIES
    isa = this_isa()
    plain = [torch.randn(rows, columns).to(torch.bfloat16) for _ in range(copies)]
    forms = {"8 bits": KernelMatrix(), "4 bits": KernelMatrix(bits=4, group=64, isa=isa)}
    kinds: dict[str, list[Projection]] = {"linear": [PlainProjection(matrix) for matrix in plain]}
    for name, encoding in forms.items():
        stored = encoding.pack(plain[0])
        kinds[name] = [
            projection_of(encoding, {key: each.clone() for key, each in stored.items()}) for _ in range(copies)
        ]
    lines = [
        f"| tokens | linear, µs | mv, x linear | 8 bits, x linear | 4 bits, x linear ({rows} x {columns}) |",
        "|---:|---:|---:|---:|---:|",
    ]
    with torch.no_grad():
        for tokens in (1, 4, 16, 64, 256):
            x = torch.randn(tokens, columns).to(torch.bfloat16)
            times: dict[str, list[float]] = {name: [] for name in ("linear", "mv", *forms)}
            for number in range(repeats * copies):
                for name in times:
                    if name == "mv" and tokens > 1:
                        continue
                    begun = time.thread_time()
                    if name == "mv":
                        torch.mv(plain[(number + copies // 2) % copies], x[0])
                    else:
                        kinds[name][number % copies](x)
                    times[name].append(time.thread_time() - begun)
            median = {name: statistics.median(each) for name, each in times.items() if each}
            linear = median["linear"]
            cells = [f"{linear / median[name]:.2f}" if name in median else "-" for name in ("mv", *forms)]
            lines.append("| " + " | ".join([str(tokens), f"{1e6 * linear:.0f}", *cells]) + " |")
    return lines


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="where the table goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = "\n".join([f"One thread of a processor with {this_isa()}.\n", *products(options.repeats)]) + "\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
