"""The memory that a result takes when llama.cpp runs it: what `--budget-for memory` foretells beside what is reserved.

    python benchmarks/run_memory.py [--model reference/qwen3_moe] [--types bf16 Q4_K] [--markdown FILE]

The model is exported as it is, and compressed to one type first; llama.cpp, from the package xllamacpp, loads the file
in a process of its own and says what it reserves: weights, keys and values, buffers. Weights are read, not mapped, and
no type is laid out anew for the CPU (``--no-repack``): pages of the file, which can be given back at any time, would be
counted beside the copy that was made of them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import coterie
from coterie.compress.memory_budget import memory_budget
from coterie.model.arch.inspect import read_headers
from coterie.model.arch.run_memory import run_memory
from coterie.model.arch.run_settings import Running
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.quantized import dequantized

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
RUNS = (
    Running(context=1024), Running(context=8192), Running(context=32768), Running(context=8192, batch=4),
    Running(context=32768, kv_type="q8_0"),
)  # fmt: skip
#: Seconds after which a process that loads a model is given up.
PATIENCE = 120

_LOAD = """
import os, sys, xllamacpp
file, context, batch, kv_type = sys.argv[1:]
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_gpu_layers, settings.verbosity = file, 0, 5
settings.n_ctx, settings.n_parallel = int(context) * int(batch), int(batch)
settings.warmup, settings.fit_params = False, False
settings.load_mode, settings.no_extra_bufts = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE, True
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.cache_type_k = settings.cache_type_v = getattr(xllamacpp.ggml_type, "GGML_TYPE_" + kv_type.upper())
server = xllamacpp.Server(settings)
sys.stdin.read()  # its log is written by a thread of its own: who reads it says when all was said
os._exit(0)  # a server that has not begun to wait for requests does not end
"""
#: What it says last.
_LOADED = "model loaded"


def reserved(file: Path, running: Running) -> dict[str, float]:
    """Load a GGUF file in a process of its own; return the bytes of what llama.cpp says that it reserves, by kind.

    Raises:
        RuntimeError: it said nothing of it.
    """
    command = [sys.executable, "-c", _LOAD, str(file), str(running.context), str(running.batch), running.kv_type]
    said: list[str] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace") as child:
        given_up = threading.Timer(PATIENCE, child.kill)
        given_up.start()
        for line in child.stderr or ():
            said.append(line)
            if _LOADED in line:
                break
        given_up.cancel()
        child.kill()
    found = re.findall(r"(model|KV|RS|compute|output) buffer size += +([\d.]+) MiB", "".join(said))
    if not said or _LOADED not in said[-1]:
        raise RuntimeError(f"llama.cpp did not load {file}: {''.join(said)[-500:]}")
    kinds = dict.fromkeys(("model", "KV", "RS", "compute", "output"), 0.0)
    for kind, amount in found:
        kinds[kind] += float(amount) * 2**20
    return kinds


def rows(model: Path, types: Sequence[str], folder: Path) -> list[str]:
    """Return the lines of the table."""
    lines = [
        "| weights | context | sequences | keys and values | foretold: weights | cache | buffers | all "
        "| llama.cpp: weights | cache | buffers | all | off |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in types:
        source, file = model, folder / f"{kind}.gguf"
        if kind != "bf16":
            settings = {"text": REFERENCE / "text" / "calibration", "tokens": 2048}
            source = coterie.compress(model, folder / kind, type=kind, **settings).out
        coterie.export(source, file)
        headers = read_headers(dequantized(Checkpoint.open(source)))
        growth = memory_budget(model, "1TiB", Running()).growth
        weights = Checkpoint.open(source).num_bytes + growth
        for running in RUNS:
            told, seen = run_memory(headers, running), reserved(file, running)
            expected = (weights, told.cache_bytes, told.buffer_bytes)
            measured = (seen["model"], seen["KV"] + seen["RS"], seen["compute"] + seen["output"])
            off = sum(expected) / sum(measured) - 1
            cells = [f"{amount / 2**20:.2f}" for part in (expected, measured) for amount in (*part, sum(part))]
            how = f"| {kind} | {running.context:,} | {running.batch} | {running.kv_type} "
            lines.append(f"{how}| {' | '.join(cells)} | {100 * off:+.1f} % |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE / "qwen3_moe")
    parser.add_argument("--types", nargs="+", default=["bf16", "Q4_K"])
    parser.add_argument("--markdown", type=Path, help="where it goes as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = rows(options.model, options.types, Path(folder))
    text = f"{options.model.name}, MiB; micro-batches of 512 tokens, attention fused.\n\n" + "\n".join(lines) + "\n"
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
