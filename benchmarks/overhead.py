"""What profiling costs over a plain forward pass, and where compressing spends its time.

    python benchmarks/overhead.py [--repeats 5] [--tokens 16384] [--large-size 1GB] [--device cpu] [--markdown FILE]

On the bundled reference model and on a synthetic one of a gigabyte (`make_large.py`; left out with --large-size 0), a
plain run and `coterie.profile` take turns in one process. The plain run reads and tokenizes the same text, loads the
stock model and passes the same tokens through it, without the output head, which no profile needs, and in the number
format that Coterie works in on the device. The time of a profile is that of the whole call: statistics, the proof of
each layer and writing too. Two ratios, both of neighbours in time, with median and range:

- all: the profile against the plain run as a whole;
- pass: what the profile takes beside tokenizing (so with reading the weights) against the forward pass alone.

Then `coterie.compress` halves the model with that profile, once with each recipe of --recipes, and says by stage how
long it took. All in Markdown.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from coterie.amounts import format_bytes, parse_bytes
from coterie.compress.apply import compress
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.model.stream.stream import working_dtype
from coterie.profile.calibration import tokenize
from coterie.profile.run import profile
from make_large import Shape, make_large

HERE = Path(__file__).resolve().parent.parent
MODEL = HERE / "reference" / "model"
TEXT = HERE / "reference" / "text" / "calibration"

BATCH_SIZE = 8
TARGET = 1.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A model and the text that runs through it."""

    name: str
    model: Path
    text: Path
    tokens: int
    seq_len: int
    device: str

    def batches(self) -> list[Tensor]:
        """Return the token ids (B, S) that a profile of this task sees."""
        tokenizer = load_tokenizer(self.model)
        token_set = tokenize(tokenizer, self.text, seq_len=self.seq_len, tokens=self.tokens, seed=0)
        return [ids for _, ids in token_set.batches(BATCH_SIZE)]

    def load(self) -> Any:
        """Load the model as stock transformers does."""
        dtype = working_dtype(Checkpoint.open(self.model), torch.device(self.device))
        model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype, trust_remote_code=False)
        return model.eval().to(self.device)

    def profile(self, out: Path) -> None:
        """Profile it, as a user would."""
        profile(
            self.model, out, text=self.text, tokens=self.tokens, seq_len=self.seq_len, device=self.device,
            batch_size=BATCH_SIZE,
        )  # fmt: skip


def forward(model: Any, batches: Sequence[Tensor]) -> None:
    """Run all batches through a model without its head, and wait until that is done."""
    with torch.no_grad():
        for ids in batches:
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def take_turns(task: Task, repeats: int, work: Path) -> dict[str, list[float]]:
    """Return the seconds of every turn: of reading the text, of loading, of the forward pass, and of the profile."""
    times: dict[str, list[float]] = {"text": [], "load": [], "forward": [], "profile": []}
    for turn in range(repeats + 1):
        shutil.rmtree(work / "profile", ignore_errors=True)
        laps, (batches, model) = plain_run(task)
        del batches, model  # the profile has the memory to itself, as it has for a user
        started = time.perf_counter()
        task.profile(work / "profile")
        laps["profile"] = time.perf_counter() - started
        if turn:  # the first turn warms caches and kernels up
            for name, value in laps.items():
                times[name].append(value)
    return times


def plain_run(task: Task) -> tuple[dict[str, float], tuple[list[Tensor], Any]]:
    """Return the seconds of each part of a plain run, and what it held."""
    start = time.perf_counter()
    batches = task.batches()
    tokenized = time.perf_counter()
    model = task.load()
    loaded = time.perf_counter()
    forward(model, batches)
    end = time.perf_counter()
    return {"text": tokenized - start, "load": loaded - tokenized, "forward": end - loaded}, (batches, model)


def stages(task: Task, recipe: str, work: Path) -> dict[str, float]:
    """Compress the model and return the seconds of each stage."""
    out = work / f"result-{recipe}"
    result = compress(task.model, out, keep=0.5, recipe=recipe, profile=work / "profile", device=task.device)
    shutil.rmtree(out)
    return {"read the profile" if name == "profile" else name: value for name, value in result.seconds.items()}


def spread(values: Sequence[float], unit: str) -> str:
    """Write the median of some values and their range."""
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


def markdown(headers: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [headers, ("---", *("---:" for _ in headers[1:])), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def overhead_row(task: Task, times: dict[str, list[float]]) -> tuple[str, ...]:
    """Return the row of a task in the table of overheads."""
    turns = [dict(zip(times, values, strict=True)) for values in zip(*times.values(), strict=True)]
    overall = [turn["profile"] / (turn["text"] + turn["load"] + turn["forward"]) for turn in turns]
    passes = [(turn["profile"] - turn["text"]) / turn["forward"] for turn in turns]
    return (task.name, *(spread(values, " s") for values in times.values()), spread(overall, "x"), spread(passes, "x"))


def where(device: str) -> str:
    """Say what the figures were measured on."""
    name = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, threads: {torch.get_num_threads()}"
    )
    return f"{name}; torch {torch.__version__}, transformers {transformers.__version__}"


def measure(tasks: Sequence[Task], repeats: int, recipes: Sequence[str]) -> str:
    """Measure all tasks; return the tables."""
    rows, stage_rows, names = [], [], ["total"]
    for task in tasks:
        with tempfile.TemporaryDirectory(prefix="coterie-overhead-") as folder:
            rows.append(overhead_row(task, take_turns(task, repeats, Path(folder))))
            for recipe in recipes:
                laps = stages(task, recipe, Path(folder))
                names = list(dict.fromkeys((*laps, *names)))
                stage_rows.append((f"{task.name}, {recipe}", laps | {"total": sum(laps.values())}))
    headers = ("model", "text", "load", "forward", "profile", "ratio: all", "ratio: pass")
    body = [(name, *(f"{laps[stage]:.2f}" if stage in laps else "-" for stage in names)) for name, laps in stage_rows]
    return "\n".join(
        [
            f"Profile against a forward pass, median of {repeats} turns (target: at most {TARGET}x). "
            f"Measured on {where(tasks[0].device)}.\n",
            markdown(headers, rows),
            "Seconds of compress by stage, half of the experts kept.\n",
            markdown(("model, recipe", *names), body),
        ]
    )


def main() -> None:
    """Measure what the command line asks for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--large-size", default="1GB", help="bytes of the synthetic model; 0 for none")
    parser.add_argument("--recipes", nargs="+", default=["reap", "mergemoe"])
    parser.add_argument("--work", type=Path, help="folder for the synthetic model; a temporary one by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--markdown", type=Path, help="where the tables go as well")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    common = {"tokens": options.tokens, "seq_len": options.seq_len, "device": options.device}
    tasks = [Task(name="reference model", model=MODEL, text=TEXT, **common)]
    with tempfile.TemporaryDirectory(prefix="coterie-large-", dir=options.work) as folder:
        if options.large_size != "0":
            model = Path(folder) / "model"
            layers = Shape().layers_in(parse_bytes(options.large_size))
            text = make_large(model, layers=layers)
            size = format_bytes(Shape().num_bytes(layers))
            tasks.append(Task(name=f"synthetic, {size}", model=model, text=text, **common))
        tables = measure(tasks, options.repeats, options.recipes)
    print(tables)
    if options.markdown:
        options.markdown.write_text(tables)


if __name__ == "__main__":
    main()
