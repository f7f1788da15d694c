"""Generate from a model that is larger than memory, beside what people have for that: ratios in one run.

    python benchmarks/run.py [--size 4GB] [--work DIR] [--memory 1.75GiB 2.75GiB] [--tokens 16] [--repeats 2]
                             [--markdown FILE] [--json FILE]

A synthetic checkpoint (`make_large.py`) runs, each time in a process of its own, from a cold disk, in a control group
of Linux with so much memory, in which pages of files count too: the machine is as small as that.

* `coterie run` with that budget, with and without guesses of the next layer;
* the same with files that are mapped into memory in place of reads (`mmap`): the system decides what stays;
* transformers with what does not fit on the disk (`device_map="auto"`, `max_memory` of that memory less half a GiB for
  the program, `offload_folder`), where the package accelerate is installed, which it needs for that. "killed": it took
  more than there is.
* llama.cpp on the same numbers as a GGUF file (bfloat16), which it maps, where the package xllamacpp is installed.

At last `coterie run` with all experts in memory, without a limit. Memory is the largest resident size of the process,
of which pages of mapped files are a part. Seconds a token are those of tokens after the first. Bytes are those of
experts. Rows of one repeat run one after the other, so that what others do to the machine falls on all of them; the
mean and the smallest and largest ratio to `mmap`, to transformers and to llama.cpp are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coterie.amounts import parse_bytes
from coterie.export.run import export

HERE = Path(__file__).resolve().parent

#: What is left of a machine's memory for what is counted beside the process.
BESIDE = 2**26

Told = dict[str, Any]

COMMON = """
import json, mmap, os, sys, time, warnings
import torch
warnings.filterwarnings("ignore")
torch.set_num_threads(1)
from coterie.model.stream.memory import peak_bytes
settings = json.loads(sys.argv[1])
PROMPT = "The quick brown fox "

def tell(tokens, first, seconds, **more):
    each = (seconds - first) / (tokens - 1)
    print("RESULT " + json.dumps({"peak": peak_bytes(), "first": first, "each": each, "tokens": tokens, **more}))
    sys.stdout.flush()
    os._exit(0)
"""

COTERIE = """
from coterie.run.engine import Runtime, Sampling
runtime = Runtime(settings["model"], memory=settings["memory"], context=256, lookahead=settings["lookahead"])
made = runtime.generate(PROMPT, template=False, max_tokens=settings["tokens"], sampling=Sampling(temperature=0))
tell(made.tokens, made.first_seconds, made.seconds, hits=made.hits, bytes=made.bytes_read / made.tokens)
"""

MAPPED = """
import coterie.run.engine as engine
from coterie.run.engine import Runtime, Sampling
from coterie.run.leases import Counters

class Mapped:
    '''Experts are views of mapped files.'''
    counters = Counters()

    def __init__(self, arena, reader, records, policy):
        self.records, self.maps = records, {}
        for file in {piece.file for record in records.values() for piece in record.pieces}:
            self.maps[file] = mmap.mmap(os.open(file, os.O_RDONLY), 0, prot=mmap.PROT_READ)

    def acquire(self, layer, experts):
        return Views(self, [(layer, expert) for expert in dict.fromkeys(experts)])

class Views:
    def __init__(self, owner, keys):
        self.owner, self.keys = owner, keys
    def __iter__(self):
        return (View(self.owner, key) for key in self.keys)
    def release(self):
        pass

class View:
    def __init__(self, owner, key):
        self.maps, self.record, self.expert = owner.maps, owner.records[key], key[1]
    def piece(self, number):
        piece = self.record.pieces[number]
        return torch.frombuffer(self.maps[piece.file], dtype=torch.uint8, count=piece.num_bytes, offset=piece.begin)

arena = engine.Arena
engine.Arena, engine.Residency = lambda slots, size: arena(1, size), Mapped
runtime = Runtime(settings["model"], memory="64GiB", context=256)
made = runtime.generate(PROMPT, template=False, max_tokens=settings["tokens"], sampling=Sampling(temperature=0))
tell(made.tokens, made.first_seconds, made.seconds, hits=None, bytes=None)
"""

STOCK = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer
tokenizer = AutoTokenizer.from_pretrained(settings["model"])
model = AutoModelForCausalLM.from_pretrained(
    settings["model"], dtype=torch.bfloat16, device_map="auto", max_memory={"cpu": settings["memory"]},
    offload_folder=settings["offload"])

class First(BaseStreamer):
    calls, first = 0, None
    def put(self, value):
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()
    def end(self):
        pass

ids = tokenizer(PROMPT, return_tensors="pt").input_ids
streamer, begun = First(), time.perf_counter()
with torch.no_grad():
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=settings["tokens"], do_sample=False,
                          streamer=streamer, pad_token_id=0)
tell(made.shape[1] - ids.shape[1], streamer.first - begun, time.perf_counter() - begun, hits=None, bytes=None)
"""

LLAMA = """
import xllamacpp
common = xllamacpp.CommonParams()
common.model.path = settings["file"]
common.n_ctx, common.n_parallel, common.n_gpu_layers = 256, 1, 0
common.warmup, common.fit_params, common.verbosity = False, False, 0
common.cpuparams.n_threads = common.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(common)
said = server.handle_completions({"prompt": PROMPT, "n_predict": settings["tokens"], "temperature": 0,
                                  "ignore_eos": True, "cache_prompt": False})
times = (json.loads(said) if isinstance(said, str | bytes) else said)["timings"]
first = times["prompt_ms"] / 1000
tell(times["predicted_n"], first, first + times["predicted_ms"] / 1000, hits=None, bytes=None)
"""


def forget(model: Path) -> None:
    """Tell the system to forget the pages of a model's files, and of its GGUF file."""
    for file in (*model.glob("*.safetensors"), *model.parent.glob("*.gguf")):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@contextmanager
def small_machine(limit: int | None) -> Iterator[list[str]]:
    """Yield what a command begins with to run in a control group with so much memory; nothing without a limit.

    Raises:
        SystemExit: there are no control groups of memory (version 1 or 2) in which this user may make one.
    """
    if limit is None:
        yield []
        return
    first = Path("/sys/fs/cgroup/memory")
    root, name = (first, "memory.limit_in_bytes") if first.is_dir() else (first.parent, "memory.max")
    group = root / f"coterie-benchmark-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(limit))
    except OSError as error:
        raise SystemExit(f"a control group with a limit of memory cannot be made here: {error}") from None
    try:
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        time.sleep(0.5)  # until the last process is out of it
        group.rmdir()


def measured(program: str, model: Path, *, limit: int | None, **settings: Any) -> Told | None:
    """Run a program in a process of its own, on a machine as small as that, and return what it told; None if killed."""
    forget(model)
    with small_machine(limit) as prefix:
        content = json.dumps({"model": str(model), **settings})
        command = [*prefix, sys.executable, "-c", COMMON + program, content]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode in (-9, 137):
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"the process ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    told: Told = json.loads(lines[-1].removeprefix("RESULT "))
    return told


def table(rows: dict[str, list[Told | None]]) -> str:
    """Return the table as Markdown: means, and ratios in each repeat."""
    headers = (
        "memory", "run", "resident", "first token", "seconds a token", "experts read a token", "hits", "x mmap",
        "x transformers", "x llama.cpp",
    )  # fmt: skip
    lines = ["| " + " | ".join(headers) + " |", "|---|---|" + "---:|" * (len(headers) - 2)]

    def mean(name: str, key: str) -> float | None:
        values = [each[key] for each in rows[name] if each is not None and each[key] is not None]
        return statistics.mean(values) if values else None

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    def ratio(name: str, to: str) -> str:
        if to not in rows or name == to:
            return "-"
        pairs = zip(rows[name], rows[to], strict=True)
        ratios = [other["each"] / own["each"] for own, other in pairs if own is not None and other is not None]
        return f"{statistics.mean(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})" if ratios else "-"

    for name in rows:
        memory, _, run = name.partition(", ")
        resident, size = mean(name, "peak"), mean(name, "bytes")
        cells = (
            memory, run, "killed" if resident is None else f"{resident / 2**30:.2f} GiB",
            shown(mean(name, "first"), "{:.1f} s"), shown(mean(name, "each"), "{:.2f}"),
            "-" if size is None else f"{size / 1e6:.0f} MB", shown(mean(name, "hits"), "{:.0%}"),
            ratio(name, f"{memory}, mmap"), ratio(name, f"{memory}, transformers"),
            ratio(name, f"{memory}, llama.cpp"),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4GB", help="of the synthetic model")
    parser.add_argument("--work", type=Path, help="folder for the model; a temporary one when left out")
    parser.add_argument("--memory", nargs="+", default=["1.75GiB", "2.75GiB"], help="of the machine")
    parser.add_argument("--tokens", type=int, default=16, help="tokens that are made")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--markdown", type=Path, help="where the table goes")
    parser.add_argument("--json", type=Path, help="where all numbers go")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="run-"))
    model = work / f"model-{options.size}"
    if not model.exists():
        subprocess.run([sys.executable, HERE / "make_large.py", model, "--size", options.size], check=True)
    gguf = None if find_spec("xllamacpp") is None or find_spec("gguf") is None else model.with_suffix(".gguf")
    if gguf is not None and not gguf.exists():
        export(model, gguf)
    config = json.loads((model / "config.json").read_text())
    experts = config["num_hidden_layers"] * config.get("num_experts", config.get("num_local_experts"))
    rows: dict[str, list[Told | None]] = {}
    few = max(4, options.tokens // 4)

    def add(name: str, told: Told | None) -> None:
        rows.setdefault(name, []).append(told)
        print(name, "killed" if told is None else f"{told['each']:.2f} s a token", flush=True)

    try:
        for _ in range(options.repeats):
            for memory in options.memory:
                limit = parse_bytes(memory)
                ours: dict[str, Any] = {"limit": limit, "memory": limit - BESIDE, "tokens": options.tokens}
                add(f"{memory}, coterie", measured(COTERIE, model, lookahead=0, **ours))
                add(f"{memory}, coterie --lookahead 8", measured(COTERIE, model, lookahead=8, **ours))
                add(f"{memory}, mmap", measured(MAPPED, model, limit=limit, tokens=few))
                if find_spec("accelerate") is not None:
                    offload, most = work / "offload", f"{(limit - 2**29) // 2**20}MiB"
                    stock = measured(STOCK, model, limit=limit, memory=most, offload=str(offload), tokens=few)
                    add(f"{memory}, transformers", stock)
                    shutil.rmtree(offload, ignore_errors=True)
                if gguf is not None:
                    add(f"{memory}, llama.cpp", measured(LLAMA, model, limit=limit, file=str(gguf), tokens=few))
            whole = measured(COTERIE, model, limit=None, memory="64GiB", lookahead=0, tokens=options.tokens)
            add("no limit, coterie", whole)
            print(table(rows), flush=True)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    text = (
        f"A synthetic model of {options.size}, {experts} experts, one thread, {options.tokens} tokens.\n\n{table(rows)}"
    )
    if options.markdown:
        options.markdown.write_text(text)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
