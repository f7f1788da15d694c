"""What a profile with gradients holds, unit by unit: does memory grow with the number of layers?

    OMP_NUM_THREADS=1 python benchmarks/memory_units.py [--layers 12] [--tokens 2048] [--markdown FILE]

A synthetic checkpoint of layers that are all alike is measured (`make_large.py`, with fewer experts). For every unit,
forward and backward, the table has the peak of the resident memory while it was in memory, what was left of it when it
was gone, and how much of that the C library's heap holds in use. What is left grows where something is kept for every
layer; a peak that varies without that is what the heap keeps for later between two trims. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coterie.amounts import format_bytes
from coterie.evaluate.speed import reset_peak
from coterie.model.stream.memory import peak_bytes
from coterie.model.stream.stream import Stream
from coterie.profile.run import profile
from make_large import Shape, make_large

#: Layers of 63 MB in float32, whose outputs are as large as those of the layers of `make_large.py`.
SHAPE = Shape(num_experts=4, top_k=1, num_heads=4, num_key_value_heads=1)


class Heap(ctypes.Structure):
    """What mallinfo2 of glibc returns."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                     "keepcost")
    )  # fmt: skip


def heap_in_use() -> int:
    """Return the bytes that the program holds of the C library's heap."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = Heap
    heap = library.mallinfo2()
    return int(heap.uordblks) + int(heap.hblkhd)


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def watched(empty: Callable[[Stream, Any], None], rows: list[tuple[str, ...]]) -> Callable[[Stream, Any], None]:
    """Return `Stream._empty` such that each call of it adds a row."""

    def call(stream: Stream, unit: Any) -> None:
        peak = peak_bytes()
        empty(stream, unit)
        rows.append((unit.name, format_bytes(peak), format_bytes(resident()), format_bytes(heap_in_use())))
        reset_peak()

    return call


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--markdown", type=Path, help="where the table goes as well")
    options = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory(prefix="coterie-memory-") as folder:
        model = Path(folder) / "model"
        text = make_large(model, layers=options.layers, shape=SHAPE)
        Stream._empty = watched(Stream._empty, rows)  # type: ignore[method-assign]
        reset_peak()
        profile(model, Path(folder) / "out", text=text, tokens=options.tokens, seq_len=256, gradients=True)
    headers = ("unit", "peak", "left", "heap in use")
    lines = [headers, ("---", "---:", "---:", "---:"), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    print(table)
    if options.markdown:
        options.markdown.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
