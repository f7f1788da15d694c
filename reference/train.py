"""Train a reference model on the reference corpus: a small OLMoE, or another family of families/ with `--model`.

    python reference/train.py --steps 2400                 # starts, or resumes from reference/run/checkpoint.pt
    python reference/train.py --export reference/model     # writes the weights of the last checkpoint
    python reference/train.py --plot                       # reference/training.png from the log

What differs between the models is in families/: config, training pass, balancing, names of files. They share the
tokenizer and the tokens in reference/run; the run of a family such as glm4_moe is in reference/run/glm4_moe, its
weights in reference/glm4_moe. The logs of the runs that made the weights are kept as reference/training.jsonl and
reference/training-glm4_moe.jsonl.

Rates warm up, stay, and fall linearly to zero over the last quarter of the steps; the last quarter also doubles the
sequence length. With `--minutes` it is the last quarter of that time, at whatever pace, so that the run ends in time,
after `--steps` at most. Both may change on a resume before that quarter has begun. On SIGTERM it writes a checkpoint
and ends.

On a CPU the batch is shared out over `--threads` Python threads, each of which runs the operators on one core: the
threads then meet once a step, not at every matrix product, which matters when others use the machine too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ALLOCATOR = {  # keep freed memory: giving 100 MB back and faulting it in again costs a third of a step
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "OMP_NUM_THREADS": "1",
    # Every number of rows that an expert gets is a shape of its own, and making its kernel costs more than running it.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "30000",
}
if __name__ == "__main__" and "COTERIE_ALLOCATOR" not in os.environ:  # read at start only, hence the second start
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR, "COTERIE_ALLOCATOR": "set"})

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import GenerationConfig, PreTrainedModel  # noqa: E402

import data  # noqa: E402
import fast  # noqa: E402
from families import FAMILIES, find_log  # noqa: E402
from optim import Optimizer  # noqa: E402

HERE = Path(__file__).resolve().parent
RUN = HERE / "run"
NUM_WINDOWS = 16  # 16 windows of 512 tokens a step
MICRO_WINDOWS = 4
WARM_UP_STEPS = 60
DECAY_SHARE = 0.25
SHORT, LONG = 256, data.WINDOW  # sequence length before and during the decay
MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 0.02, 4e-3, 0.1
SHARES = {"math": 0.15}


def rate_scale(step: int, done: float) -> float:
    """Warm-up, stable, linear decay to zero; `step` counts from 0, `done` is the share of the run that is over."""
    return min((step + 1) / WARM_UP_STEPS, decay_scale(done))


def decay_scale(done: float) -> float:
    """One, then linear decay to zero over the last quarter."""
    return min(1.0, max(0.0, (1 - done) / DECAY_SHARE))


class Trainer:
    """Everything that a checkpoint holds, and one step of training."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = arguments.device
        self.family = FAMILIES[arguments.model]
        self.run = HERE / self.family.RUN
        self.steps, self.minutes = arguments.steps, arguments.minutes
        self.step, self.seconds = 0, 0.0
        self.run.mkdir(parents=True, exist_ok=True)
        texts = {path.stem: data.read_documents(path) for path in sorted((HERE / "corpus" / "train").glob("*.txt"))}
        if not texts:
            raise SystemExit("reference/corpus/train has no text: run reference/build_corpus.py first")
        self.tokenizer = data.load_tokenizer(RUN / "tokenizer", texts)
        tokens = {d: data.load_tokens(RUN / f"{d}.bin", self.tokenizer, texts[d]) for d in texts}
        sizes = {domain: len(ids) for domain, ids in tokens.items()}
        weights = data.choose_weights(sizes, self.steps * NUM_WINDOWS * data.WINDOW, SHARES)
        self.windows = data.Windows(tokens, weights, data.SEED)
        self.validation = {domain: self.load_validation(domain) for domain in texts}
        self.model = self.family.build(self.tokenizer.eos_token_id, self.device)
        self.named = dict(self.model.named_parameters())
        self.optimizer = Optimizer(self.named, MUON_RATE, ADAM_RATE, WEIGHT_DECAY)
        blocks = fast.moe_blocks(self.model)
        num_experts = blocks[0].gate.num_experts
        even = self.model.config.num_experts_per_tok / num_experts
        self.load_LE = torch.full((len(blocks), num_experts), even, device=self.device)
        self.pool = ThreadPoolExecutor(arguments.threads if self.device == "cpu" else 1)
        plan = {"steps": self.steps, "budget": self.minutes}
        self.write_line({"event": "start", "tokens_by_domain": sizes, "weights": weights} | plan)

    def load_validation(self, domain: str) -> Tensor:
        """The first windows of the calibration text of a domain, each from another place in it."""
        documents = data.read_documents(HERE / "text" / "calibration" / f"{domain}.txt")
        ids = torch.from_numpy(data.encode(self.tokenizer, documents).astype("int64"))
        stride = (len(ids) - data.WINDOW - 1) // MICRO_WINDOWS
        return torch.stack([ids[i * stride : i * stride + data.WINDOW + 1] for i in range(MICRO_WINDOWS)])

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * NUM_WINDOWS * data.WINDOW

    @property
    def length(self) -> int:
        """Sequence length of the present step."""
        return LONG if self.in_decay else SHORT

    @property
    def done(self) -> float:
        """Share of the run that is over: of its steps or of its minutes, whichever is more."""
        return max(self.step / self.steps, self.seconds / 60 / self.minutes if self.minutes else 0.0)

    @property
    def in_decay(self) -> bool:
        """Whether the last quarter has begun; the plan is then fixed."""
        return self.done >= 1 - DECAY_SHARE

    def compute(self, windows: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Gradients, loss, mean router probability and load of one micro-batch."""
        inputs, labels = data.split(windows.to(self.device), self.length)
        with torch.enable_grad():
            loss, prob_LE, load_LE = self.family.training_pass(self.model, inputs, labels)
            total = loss + self.family.BALANCE * fast.balance_loss(self.load_LE, prob_LE)
            grads = torch.autograd.grad(total, list(self.named.values()))
        return list(grads), loss.detach(), prob_LE.detach(), load_LE

    def train_step(self) -> dict[str, float]:
        """One step of the optimizer over NUM_WINDOWS windows.

        The balancing loss uses the load of the whole previous batch, not of the few sequences of a micro-batch: an
        even load within each sequence would forbid experts to specialise (arXiv:2501.11873).
        """
        scale = rate_scale(self.step, self.done)
        parts = list(self.windows.draw(NUM_WINDOWS).split(MICRO_WINDOWS))
        results = list(self.pool.map(self.compute, parts))
        grads, losses, probs, loads = zip(*results, strict=True)
        self.load_LE = torch.stack(loads).mean(0)
        balance = fast.balance_loss(self.load_LE, torch.stack(probs).mean(0)).item()
        loss = torch.stack(losses).mean().item()
        if not loss < 100:
            raise SystemExit(f"step {self.step}: loss {loss}; lower MUON_RATE or ADAM_RATE and start again")

        def update(item: tuple[str, tuple[Tensor, ...]]) -> None:
            self.optimizer.update(item[0], list(item[1]), scale, self.step + 1)

        items = sorted(zip(self.named, zip(*grads, strict=True), strict=True), key=lambda item: -item[1][0].numel())
        list(self.pool.map(update, items))
        self.family.adjust(self.model, self.load_LE, decay_scale(self.done))
        self.step += 1
        share_LE = self.load_LE / self.load_LE.sum(1, keepdim=True)
        entropy_L = -(share_LE * share_LE.clamp_min(1e-9).log()).sum(1) / torch.tensor(float(share_LE.shape[1])).log()
        return {
            "loss": loss + self.family.BALANCE * balance,
            "lm_loss": loss,
            "balance_loss": balance,
            "rate": MUON_RATE * scale,
            "least_share": share_LE.min().item() * share_LE.shape[1],
            "most_share": share_LE.max().item() * share_LE.shape[1],
            "entropy": entropy_L.min().item(),
        }

    def validate(self) -> dict[str, float]:
        """Mean loss by domain on a fixed slice of the calibration text."""

        def measure(windows: Tensor) -> float:
            inputs, labels = data.split(windows.to(self.device), self.length)
            with torch.no_grad():
                return self.family.training_pass(self.model, inputs, labels)[0].item()

        losses = self.pool.map(measure, self.validation.values())
        return dict(zip(self.validation, losses, strict=True))

    def save(self) -> None:
        """Checkpoint and stock folder, each put in place whole."""
        state = {
            "step": self.step,
            "steps": self.steps,
            "minutes": self.minutes,
            "seconds": self.seconds,
            "drawn": self.windows.drawn,
            "weights": self.windows.weights,
            "load": self.load_LE,
            "optimizer": self.optimizer.state,
            "rng": torch.get_rng_state(),
            "buffers": dict(self.model.named_buffers()),
        }
        torch.save(state, self.run / "checkpoint.tmp")
        (self.run / "checkpoint.tmp").replace(self.run / "checkpoint.pt")
        export(self.model, self.tokenizer, self.run / "model")

    def resume(self, steps: int, minutes: float | None) -> None:
        """Goes on from the checkpoint; the plan changes only before the decay has begun."""
        state = torch.load(self.run / "checkpoint.pt", map_location=self.device)
        self.step, self.seconds = state["step"], state["seconds"]
        self.steps, self.minutes = state["steps"], state["minutes"]
        self.windows.drawn, self.windows.weights = state["drawn"], state["weights"]
        self.load_LE = state["load"]
        self.optimizer.load(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        buffers = dict(self.model.named_buffers())
        for name, saved in state.get("buffers", {}).items():  # a correction bias changes in training
            buffers[name].copy_(saved)
        if (steps, minutes) != (self.steps, self.minutes):
            if self.in_decay:
                print(f"the decay has begun at step {self.step}: --steps {steps}, --minutes {minutes} are ignored")
            else:  # a plan whose decay should have begun before begins it now
                self.steps = max(steps, math.ceil(self.step / (1 - DECAY_SHARE)))
                self.minutes = minutes and max(minutes, self.seconds / 60 / (1 - DECAY_SHARE))
        self.write_line({"event": "resume", "step": self.step, "steps": self.steps, "budget": self.minutes})

    def write_line(self, record: dict[str, object]) -> None:
        """Appends to the log and tells it to stdout."""
        line = json.dumps(record)
        with (self.run / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def export(model: PreTrainedModel, tokenizer: data.PreTrainedTokenizerFast, folder: Path) -> None:
    """Stock folder: safetensors, config, tokenizer, generation config. Files that are already there are replaced."""
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=end, eos_token_id=end, pad_token_id=end, max_new_tokens=128, do_sample=False
    )
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    folder.mkdir(parents=True, exist_ok=True)
    for path in staging.iterdir():
        path.chmod(0o644)
        path.replace(folder / path.name)
    staging.rmdir()


def read_log(path: Path) -> Iterator[dict[str, object]]:
    """Records of a log; those of steps that a resume repeated come once, the later ones."""
    records: dict[int, dict[str, object]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if "lm_loss" in record:
            records[record["step"]] = records.get(record["step"], {}) | record
    yield from (records[step] for step in sorted(records))


def train(arguments: argparse.Namespace) -> None:
    """The whole run."""
    begin = time.monotonic()
    torch.set_num_threads(1)
    if arguments.compile:
        fast.compile_kernels(fast.KERNELS, FAMILIES[arguments.model].KERNELS)
    trainer = Trainer(arguments)
    if (trainer.run / "checkpoint.pt").exists():
        trainer.resume(arguments.steps, arguments.minutes)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    saved_at = tick = time.monotonic()
    compiled, ticked = None, trainer.step
    while trainer.done < 1 and not stopped:
        if arguments.device == "cpu" and arguments.compile and compiled != trainer.length:
            compiled = trainer.length  # compile on one thread, before the others need it
            trainer.compute(next(iter(trainer.validation.values())))
            ticked, tick = trainer.step, time.monotonic()
        length = trainer.length
        record = {"step": trainer.step + 1, "tokens": trainer.tokens + NUM_WINDOWS * data.WINDOW}
        record |= trainer.train_step()
        now = time.monotonic()
        trainer.seconds, begin = trainer.seconds + now - begin, now  # all that is done here counts
        ends = trainer.done >= 1
        if trainer.step % 10 == 0 or trainer.step < 5 or ends:
            record["tokens_per_second"] = (trainer.step - ticked) * NUM_WINDOWS * data.WINDOW / (now - tick)
            if trainer.step % 100 == 0 or ends:
                record["validation"] = {domain: round(loss, 4) for domain, loss in trainer.validate().items()}
            record |= {"done": min(1.0, trainer.done), "minutes": trainer.seconds / 60, "length": length}
            trainer.write_line({key: round(v, 5) if isinstance(v, float) else v for key, v in record.items()})
            ticked, tick = trainer.step, time.monotonic()
        if time.monotonic() - saved_at > 60 * arguments.save_minutes:
            trainer.save()
            saved_at = time.monotonic()
    trainer.save()
    if trainer.done >= 1:
        export(trainer.model, trainer.tokenizer, arguments.export or trainer.run / "model")
    trainer.write_line({"event": "end", "step": trainer.step, "steps": trainer.steps, "minutes": trainer.seconds / 60})


def plot(family: ModuleType) -> None:
    """Loss curves of the log as reference/training.png, or as the model's own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = list(read_log(find_log(family)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    left.plot([r["tokens"] / 1e6 for r in records], [r["lm_loss"] for r in records], linewidth=0.8)
    left.set(title="Training", xlabel="million tokens", ylabel="loss (nats per token)")
    measured = [r for r in records if "validation" in r]
    for domain in measured[0]["validation"] if measured else []:
        losses = [r["validation"][domain] for r in measured]
        right.plot([r["tokens"] / 1e6 for r in measured], losses, label=domain, linewidth=1.2)
    right.set(title="Validation by domain", xlabel="million tokens")
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(HERE / f"{family.LOG}.png", dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=FAMILIES, default="olmoe")
    parser.add_argument("--steps", type=int, help="length of the run, 8192 tokens each, at most")
    parser.add_argument(
        "--minutes", type=float, help="length of the run in time, where that is less; beginning and saving count"
    )
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--export", type=Path, metavar="DIR", help="stock folder; without --steps, export and end")
    parser.add_argument("--plot", action="store_true", help="draw the log as reference/training*.png and end")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    family = FAMILIES[arguments.model]
    if arguments.plot:
        plot(family)
    elif arguments.steps:
        train(arguments)
    elif arguments.export:
        tokenizer = data.AutoTokenizer.from_pretrained(RUN / "tokenizer", trust_remote_code=False)
        model = family.MODEL.from_pretrained(HERE / family.RUN / "model", dtype=torch.bfloat16, trust_remote_code=False)
        export(model, tokenizer, arguments.export)
    else:
        parser.error("give --steps, --export or --plot")


if __name__ == "__main__":
    main()
