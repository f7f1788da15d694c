"""Generate from a model that is larger than its memory, beside what people have for that: ratios in one run.

    python benchmarks/run.py [--size 4GB] [--work DIR] [--shares 0.25 0.5] [--tokens 24] [--repeats 2]
                             [--markdown FILE] [--json FILE]

A synthetic checkpoint (`make_large.py`) runs, each time in a process of its own, from a cold disk:

* `coterie run` with room for a share of the experts, with and without guesses of the next layer;
* the same with files that are mapped into memory in place of reads, as many experts of them kept (`mmap`): the system
  is told to forget what the policy drops, so that the memory is the same;
* transformers with what does not fit on the disk (`device_map="auto"`, `max_memory`, `offload_folder`), where the
  package accelerate is installed, which it needs for that;
* `coterie run` with all experts in memory.

Memory is the largest resident size of the process. Seconds a token are those of tokens after the first. Bytes are those
of experts. Rows of one repeat run one after the other, so that what others do to the machine falls on all of them; the
mean and the smallest and largest ratio to `mmap` and to transformers are printed.
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

COMMON = """
import json, mmap, os, sys, time
import torch
torch.set_num_threads(1)
from coterie.model.stream.memory import peak_bytes
settings = json.loads(sys.argv[1])
PROMPT = "The quick brown fox "

def tell(tokens, first, seconds, **more):
    each = (seconds - first) / (tokens - 1)
    print("RESULT " + json.dumps({"peak": peak_bytes(), "first": first, "each": each, "tokens": tokens, **more}))
"""

COTERIE = (
    COMMON
    + """
from coterie.run.engine import Runtime, Sampling
with Runtime(settings["model"], memory="64GiB", context=256, most_experts=settings["experts"],
             lookahead=settings["lookahead"]) as runtime:
    made = runtime.generate(PROMPT, template=False, max_tokens=settings["tokens"], sampling=Sampling(temperature=0))
    tell(made.tokens, made.first_seconds, made.seconds, hits=made.hits, bytes=made.bytes_read / made.tokens)
"""
)

MAPPED = (
    COMMON
    + """
from coterie.run import residency as module
from coterie.run.engine import Runtime, Sampling

class Mapped(module.Residency):
    '''Slots are ranges of mapped files: reading is to touch them, to evict is to tell the system to forget them.'''

    def __init__(self, arena, reader, records, policy):
        super().__init__(arena, reader, records, policy)
        self._maps = {}
        for record in records.values():
            for piece in record.pieces:
                if piece.file not in self._maps:
                    file = os.open(piece.file, os.O_RDONLY)
                    mapped = mmap.mmap(file, 0, prot=mmap.PROT_READ)
                    mapped.madvise(mmap.MADV_RANDOM)
                    self._maps[piece.file] = (file, mapped)
        self._kept, self._touched = set(), 0

    def acquire(self, layer, experts):
        return Touched(self, layer, list(dict.fromkeys(experts)))

class Touched:
    def __init__(self, owner, layer, experts):
        self.owner, self.layer, self.experts = owner, layer, experts
    def __iter__(self):
        owner = self.owner
        owner._note(self.layer, self.experts)
        for expert in self.experts:
            key = (self.layer, expert)
            if key in owner._kept:
                owner.counts["hits"] = owner.counts.get("hits", 0) + 1
            else:
                while len(owner._kept) >= settings["experts"]:
                    import numpy as np
                    may_go = np.zeros(module.shape_of(owner.records), dtype=bool)
                    for each in owner._kept:
                        may_go[each] = each[0] != self.layer or each[1] not in self.experts
                    [gone] = owner.policy.victims(may_go, 1)
                    owner._kept.remove(gone)
                    for piece in owner.records[gone].pieces:
                        file, mapped = owner._maps[piece.file]
                        begin = piece.begin // 4096 * 4096
                        mapped.madvise(mmap.MADV_DONTNEED, begin, piece.end - begin)
                        os.posix_fadvise(file, begin, piece.end - begin, os.POSIX_FADV_DONTNEED)
                owner._kept.add(key)
                owner._touched += owner.records[key].num_bytes
            yield View(owner, key)
    def release(self):
        pass

class View:
    def __init__(self, owner, key):
        self.owner, self.record, self.expert = owner, owner.records[key], key[1]
    def piece(self, number):
        piece = self.record.pieces[number]
        _, mapped = self.owner._maps[piece.file]
        return torch.frombuffer(mapped, dtype=torch.uint8, count=piece.num_bytes, offset=piece.begin)

import coterie.run.engine as engine
Mapped.counts = {}
engine.Residency = Mapped
import warnings
warnings.filterwarnings("ignore")
arena = engine.Arena
engine.Arena = lambda slots, size: arena(1, size)
runtime = Runtime(settings["model"], memory="64GiB", context=256, most_experts=settings["experts"])
made = runtime.generate(PROMPT, template=False, max_tokens=settings["tokens"], sampling=Sampling(temperature=0))
tell(made.tokens, made.first_seconds, made.seconds, hits=None, bytes=runtime.residency._touched / made.tokens)
sys.stdout.flush()
os._exit(0)
"""
)

STOCK = (
    COMMON
    + """
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
sys.stdout.flush()
os._exit(0)
"""
)


def forget(model: Path) -> None:
    """Tell the system to forget the pages of a model's files."""
    for file in model.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measured(program: str, model: Path, **settings: Any) -> dict[str, Any]:
    """Run a program in a process of its own and return what it told."""
    forget(model)
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps({"model": str(model), **settings})], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"the process ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return told


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table as Markdown: means, and ratios in each repeat."""
    lines = ["| run | memory | first token | seconds a token | experts read a token | hits | x mmap | x transformers |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip

    def mean(name: str, key: str) -> float | None:
        values = [each[key] for each in rows[name] if each[key] is not None]
        return statistics.mean(values) if values else None

    def ratio(name: str, to: str | None) -> str:
        if to is None or to not in rows or name == to:
            return "-"
        ratios = [other["each"] / own["each"] for own, other in zip(rows[name], rows[to], strict=True)]
        return f"{statistics.mean(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"

    for name in rows:
        share = name.partition(",")[0]
        size, hits = mean(name, "bytes"), mean(name, "hits")
        lines.append(
            f"| {name} | {(mean(name, 'peak') or 0) / 2**30:.2f} GiB | {mean(name, 'first'):.1f} s "
            f"| {mean(name, 'each'):.2f} | {'-' if size is None else f'{size / 1e6:.0f} MB'} "
            f"| {'-' if hits is None else f'{hits:.0%}'} | {ratio(name, f'{share}, mmap')} "
            f"| {ratio(name, 'transformers')} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4GB", help="of the synthetic model")
    parser.add_argument("--work", type=Path, help="folder for the model; a temporary one when left out")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.25, 0.5], help="of the experts that are in memory"
    )
    parser.add_argument("--tokens", type=int, default=24, help="tokens that are made")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--markdown", type=Path, help="where the table goes")
    parser.add_argument("--json", type=Path, help="where all numbers go")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="run-"))
    model = work / f"model-{options.size}"
    if not model.exists():
        subprocess.run([sys.executable, HERE / "make_large.py", model, "--size", options.size], check=True)
    config = json.loads((model / "config.json").read_text())
    experts = config["num_hidden_layers"] * config.get("num_experts", config.get("num_local_experts"))
    rows: dict[str, list[dict[str, Any]]] = {}
    try:
        for _ in range(options.repeats):
            for share in options.shares:
                settings = {"experts": int(share * experts), "tokens": options.tokens}
                told = measured(COTERIE, model, lookahead=0, **settings)
                rows.setdefault(f"{share:.0%}, coterie", []).append(told)
                guessing = measured(COTERIE, model, lookahead=config["num_experts_per_tok"], **settings)
                rows.setdefault(f"{share:.0%}, coterie --lookahead", []).append(guessing)
                rows.setdefault(f"{share:.0%}, mmap", []).append(measured(MAPPED, model, **settings))
                if share == options.shares[0] and find_spec("accelerate") is not None:
                    offload = work / "offload"
                    limit = f"{told['peak'] // 2**20}MiB"  # what coterie took in all
                    stock = measured(
                        STOCK, model, memory=limit, offload=str(offload), tokens=max(4, options.tokens // 4)
                    )
                    rows.setdefault("transformers", []).append(stock)
                    shutil.rmtree(offload, ignore_errors=True)
            whole = measured(COTERIE, model, lookahead=0, experts=experts, tokens=options.tokens)
            rows.setdefault("all, coterie", []).append(whole)
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
