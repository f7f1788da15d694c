"""What packing costs and gives: how far predictions move, and how fast packed models run beside plain ones, in ratios.

    python benchmarks/run_pack.py [--model reference/qwen3_moe] [--tokens 2560] [--size 1.5GB] [--new 16] [--repeats 3]
                                  [--work DIR] [--markdown FILE]

Predictions: a model is packed (`coterie pack`) with experts alone in few bits, and with linear layers besides; all run
in the runtime, with the kernels that it computes with, on held-out text, equally much of every domain, in windows of
256 tokens. "KL" is the mean divergence from the plain model in float32, in nats a token; bfloat16 is the plain model as
it runs otherwise.

Speed: a synthetic checkpoint (`make_large.py`) plain and packed, with all experts in memory and with room for a quarter
of them, all open in one process with one thread. They take turns with the same prompt, so that what others do to the
machine falls on all of them; the median over repeats of plain time by packed time is printed, with the smallest and the
largest. "processor" is the time of the processor that computes, which others hardly change; "token" and "prompt" are
what passes: for a token, and until the first token behind a prompt of 128, whose experts are read as well. Single
products are in `run_kernels.py`.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coterie.amounts import format_bytes, parse_bytes
from coterie.model.disk.encodings.kernel_matrix import this_isa
from coterie.run.engine import Runtime, Sampling
from coterie.run.pack import PackedModel, pack
from make_large import Shape, make_large

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
WINDOW, PROMPT = 256, 128

#: (bits of experts, bits of linear layers, columns of a group).
FORMS: tuple[tuple[int, int | None, int | None], ...] = (
    (8, None, None), (8, 8, None), (4, None, 32), (4, None, 64), (4, 8, 64), (4, 4, 64),
)  # fmt: skip


def name_of(bits: int, dense: int | None, group: int | None) -> str:
    """Return the options that make such a pack."""
    parts = [f"--bits {bits}", *([] if dense is None else [f"--dense {dense}"])]
    return " ".join([*parts, *([] if group is None else [f"--group {group}"])])


# --- predictions ----------------------------------------------------------------------------------------------------


def windows_of(runtime: Runtime, folder: Path, tokens: int) -> list[Tensor]:
    """Return windows (1, S) of held-out text, as many of each domain."""
    files = sorted(folder.glob("*.txt"))
    count = max(1, tokens // (WINDOW * len(files)))
    windows = []
    for file in files:
        ids = torch.tensor(runtime.tokenizer(file.read_text(encoding="utf-8")[: 12 * WINDOW * count]).input_ids)
        windows += [ids[None, start : start + WINDOW] for start in range(0, WINDOW * count, WINDOW)]
    return windows


def logits_of(model: Path, windows: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Return the logarithms of probabilities (S, V) of each window."""
    with Runtime(model, memory="64GiB", context=WINDOW, dtype=dtype) as runtime, torch.no_grad():
        return [runtime.model(ids).logits[0].float().log_softmax(-1) for ids in windows]


def quality(model: Path, text: Path, tokens: int, work: Path) -> list[str]:
    """Return the lines of the first table."""
    with Runtime(model, memory="64GiB", context=WINDOW) as runtime:
        windows = windows_of(runtime, text, tokens)
    expected = logits_of(model, windows, torch.float32)
    lines = [
        f"{model.name}, {WINDOW * len(windows)} tokens of held-out text.",
        "",
        "| packed with | weights | packed weights changed by | KL | same token |",
        "|---|---:|---:|---:|---:|",
    ]

    def add(name: str, size: str, changed: str, got: Sequence[Tensor]) -> None:
        pairs = list(zip(expected, got, strict=True))
        divergence = statistics.fmean(float((a.exp() * (a - b)).sum(-1).mean()) for a, b in pairs)
        same = statistics.fmean(float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in pairs)
        lines.append(f"| {name} | {size} | {changed} | {divergence:.5f} | {same:.1%} |")
        print(lines[-1], flush=True)

    add("plain, in bfloat16", "-", "-", logits_of(model, windows, torch.bfloat16))
    for bits, dense, group in FORMS:
        out = work / f"quality-{bits}-{dense}-{group}"
        packed = pack(model, out, bits=bits, dense=dense, group=group)
        changed = f"{packed.rounding.relative:.2%}"
        add(name_of(bits, dense, group), format_bytes(packed.num_bytes), changed, logits_of(out, windows, None))
        shutil.rmtree(out)
    return lines


# --- speed ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model that is open: what it is called, and what it takes of memory and disk."""

    name: str
    share: float
    runtime: Runtime
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds to the first token, of each that follows, the processor's for that, and bytes of experts that it read."""

    first: float
    each: float
    worked: float
    num_bytes: float


def generate(runtime: Runtime, prompt: str, new: int) -> Times:
    """Go on with a prompt that passes the model at once."""
    moments: list[float] = []  # of the processor, before every layer

    def note() -> bool:
        moments.append(time.thread_time())
        return False

    told = runtime.generate(
        prompt, max_tokens=new, template=False, sampling=Sampling(temperature=0), cancelled=note
    )  # fmt: skip
    worked = (time.thread_time() - moments[len(runtime.layers)]) / (told.tokens - 1)
    each = (told.seconds - told.first_seconds) / (told.tokens - 1)
    return Times(first=told.first_seconds, each=each, worked=worked, num_bytes=told.bytes_read / told.tokens)


def spread(values: Sequence[float]) -> str:
    """Return a median with the smallest and the largest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def speed(size: str, new: int, repeats: int, work: Path) -> list[str]:
    """Return the lines of the second table."""
    model = work / f"model-{size}"
    if not model.exists():
        make_large(model, layers=Shape().layers_in(parse_bytes(size)))
    forms: list[tuple[int, int | None]] = [(8, None), (8, 8), (4, None), (4, 4)]
    folders = {"plain": model}
    for bits, dense in forms:
        name = name_of(bits, dense, None)
        folders[name] = work / f"packed-{size}-{bits}-{dense}"
        if not folders[name].exists():
            begun = time.perf_counter()
            packed: PackedModel = pack(model, folders[name], bits=bits, dense=dense)
            print(f"{name}: {packed} ({time.perf_counter() - begun:.0f} s)", flush=True)
    prompt = "The quick brown fox jumps over the lazy dog. " * 3
    with ExitStack() as stack:
        cases = []
        for share in (1.0, 0.25):
            for name, folder in folders.items():
                runtime = Runtime(
                    folder, memory="64GiB", context=256,
                    most_experts=math.ceil(share * Shape().num_experts * _layers(model)),
                )  # fmt: skip
                stack.enter_context(runtime)
                resident = runtime.budget.resident + runtime.budget.num_slots * runtime.budget.slot
                cases.append(Case(name=name, share=share, runtime=runtime, num_bytes=resident))
        times: list[list[Times]] = [[] for _ in cases]
        for case in cases:
            generate(case.runtime, prompt[:PROMPT], 4)
        for repeat in range(repeats):
            for case, told in zip(cases, times, strict=True):
                told.append(generate(case.runtime, f"{repeat}{prompt}"[:PROMPT], new))
            print(f"repeat {repeat + 1} of {repeats}", flush=True)
    lines = [
        "| experts in memory | packed with | in memory | read a token | processor, ms a token "
        "| x plain | token, x plain | prompt, x plain |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case, told in zip(cases, times, strict=True):
        plain = next(each for other, each in zip(cases, times, strict=True) if other.share == case.share)
        ratios = [
            "-"
            if told is plain
            else spread([getattr(a, name) / getattr(b, name) for a, b in zip(plain, told, strict=True)])
            for name in ("worked", "each", "first")
        ]
        read, worked = (statistics.median(getattr(each, name) for each in told) for name in ("num_bytes", "worked"))
        cells = (
            f"{case.share:.0%}", case.name, format_bytes(case.num_bytes), f"{read / 1e6:.0f} MB",
            f"{1000 * worked:.0f}", *ratios,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _layers(model: Path) -> int:
    return len(list(model.glob("*.safetensors"))) - 1


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE / "qwen3_moe")
    parser.add_argument("--text", type=Path, default=REFERENCE / "text" / "test")
    parser.add_argument("--tokens", type=int, default=2_560, help="of the text, at least a window of each domain")
    parser.add_argument("--size", default="1.5GB", help="of the synthetic model")
    parser.add_argument("--new", type=int, default=16, help="tokens that are made each time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for models; a temporary one when left out")
    parser.add_argument("--markdown", type=Path, help="where the tables go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = options.work or Path(tempfile.mkdtemp(prefix="run-pack-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        parts = [
            *quality(options.model, options.text, options.tokens, work),
            f"\nA synthetic model of {options.size}, one thread of a processor with {this_isa()}, {options.new} tokens "
            f"made, {options.repeats} repeats.\n",
            *speed(options.size, options.new, options.repeats, work),
        ]
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    text = "\n".join(parts) + "\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
