"""What keys and values in fewer bytes cost, and what it saves to keep them from turn to turn.

    python benchmarks/run_kv.py [--models reference/model] [--windows 10] [--prefix 384] [--behind 48] [--size 1GB]
                                [--turns 3] [--markdown FILE]

Loss: held-out text of the bundled models, a prefix that passes in chunks as in a run, then token by token behind it.
Beside each other: the rise of the negative log-likelihood and the divergence (KL) from the scores with all keys and
values, in thousandths of a nat, with the standard error over texts; how often the likeliest token is the same; bytes a
token as they are in memory behind the text, in 32 bits where they are whole. "int4 by token" is what ZipCache's form is
compared with: a smallest number and a scale for each token and head, and the same last tokens whole. A window of so
many tokens is beside the first 4.

Speed: tokens behind 4096 others of a model with heads as large as those of real ones, in 16 bits, all formats in turns;
the ratio to full in the same round, mean and range.

Reuse: a synthetic checkpoint (`make_large.py`) with a quarter of its experts in memory. Seconds to the first token of a
prompt that is new, that was there before, of a next turn of 16 more tokens, and of the same prompt in a new process
that finds it on the disk; each also in units of a token's time, in the same runs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from coterie.amounts import parse_bytes
from coterie.model.arch.load import load_model
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.run.cache_layers import num_bytes
from coterie.run.chunks import new_cache
from coterie.run.engine import Runtime, Sampling
from coterie.run.kv import BLOCK, KVFormat, ZipLayer, from_int4, to_int4
from coterie.run.prepare import CHUNK
from coterie.testing import tiny_checkpoint
from make_large import Shape, make_large

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
MODELS = (REFERENCE / "model", REFERENCE / "qwen3_moe", REFERENCE / "glm4_moe")
FORMATS = ("int8", "int4", "int4 by token", "window:256", "window:128", "window:64", "window:32")
GREEDY = Sampling(temperature=0)

#: Of the model whose speed is measured: tokens before, and how many are timed in a round.
CONTEXT, TIMED = 4096, 8


class TokenInt4Layer(ZipLayer):
    """The plain rival of ZipCache's form: a smallest number and a scale for each token and head, in the same blocks."""

    def _round(self, keys: Tensor, values: Tensor) -> None:
        self.widths = keys.shape[-1], values.shape[-1]
        for name, states in (("key", keys), ("value", values)):
            codes, lows, scales = to_int4(states, dim=-1)
            self.append(**{f"{name}s": codes, f"{name}_lows": lows, f"{name}_scales": scales})

    def _block(self, number: int) -> tuple[Tensor, Tensor]:
        own = slice(number * BLOCK, (number + 1) * BLOCK)
        keys, values = (
            from_int4(*(self.get(f"{name}{part}")[:, :, own] for part in ("s", "_lows", "_scales")), width)
            for name, width in zip(("key", "value"), self.widths, strict=True)
        )
        return keys.to(self.dtype), values.to(self.dtype)


def cache_of(model: nn.Module, name: str) -> Cache:
    """Return an empty cache of a format."""
    layers = range(model.config.num_hidden_layers)
    if name != "int4 by token":
        return new_cache(model, KVFormat.parse(name), layers)
    cache = new_cache(model)
    cache.layers = [TokenInt4Layer() for _ in layers]
    return cache


def windows(model: Path, count: int, length: int) -> Tensor:
    """Return pieces (N, S) of held-out text, as many of each file."""
    tokenizer, files = load_tokenizer(model), sorted((REFERENCE / "text" / "test").glob("*.txt"))
    rows = []
    for number in range(count):
        ids = tokenizer(files[number % len(files)].read_text(encoding="utf-8")[:200_000]).input_ids
        begin = number // len(files) * 3 * length
        rows.append(ids[begin : begin + length])
    return torch.tensor(rows)


def scores_behind(model: nn.Module, ids_NS: Tensor, prefix: int, cache: Cache) -> Tensor:
    """Return log-probabilities (N, T, V) of tokens behind a prefix."""
    rows = []
    with torch.no_grad():
        for begin in range(0, prefix, CHUNK):
            output = model(input_ids=ids_NS[:, begin : min(begin + CHUNK, prefix)], past_key_values=cache)
        for place in range(prefix, ids_NS.shape[1]):
            rows.append(output.logits[:, -1].float().log_softmax(-1))
            output = model(input_ids=ids_NS[:, place : place + 1], past_key_values=cache)
    return torch.stack(rows, 1)


def loss_rows(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of a model."""
    model = load_model(folder, dtype=torch.float32)
    ids_NS = windows(folder, options.windows, options.prefix + options.behind)
    target_NT1 = ids_NS[:, options.prefix :, None]
    cache = new_cache(model)
    full_NTV = scores_behind(model, ids_NS, options.prefix, cache)
    tokens = ids_NS.numel()
    whole = num_bytes(cache) / tokens
    yield f"| {folder.name} | full | {whole:.0f} | 100 % | {-full_NTV.gather(2, target_NT1).mean():.4f} | - | - |"
    for name in FORMATS:
        cache = cache_of(model, name)
        own_NTV = scores_behind(model, ids_NS, options.prefix, cache)
        rise_N = 1000 * (full_NTV - own_NTV).gather(2, target_NT1).mean((1, 2))
        kl_N = 1000 * (full_NTV.exp() * (full_NTV - own_NTV)).sum(2).mean(1)
        same = (full_NTV.argmax(2) == own_NTV.argmax(2)).float().mean()
        taken = num_bytes(cache) / tokens
        yield (
            f"| {folder.name} | {name} | {taken:.0f} | {taken / whole:.0%} | {_with_error(rise_N, '+')} | "
            f"{_with_error(kl_N)} | {same:.1%} |"
        )


def _with_error(numbers: Tensor, sign: str = "") -> str:
    return f"{numbers.mean():{sign}.2f} ± {numbers.std() / len(numbers) ** 0.5:.2f}"


def speed_rows(work: Path, rounds: int) -> Iterator[str]:
    """Yield how long a token takes behind many others."""
    checkpoint = tiny_checkpoint(
        work / "heads", "qwen3_moe", dtype=torch.bfloat16, hidden_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2 * CONTEXT, intermediate_size=512, moe_intermediate_size=512,
    )  # fmt: skip
    model = load_model(checkpoint, dtype=torch.bfloat16)
    names = ("full", "int8", "int4", "window:512")
    ids_1S = torch.arange(CONTEXT)[None] % 200 + 5
    caches = {name: cache_of(model, name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad():
        for cache in caches.values():
            for begin in range(0, CONTEXT, CHUNK):
                model(input_ids=ids_1S[:, begin : begin + CHUNK], past_key_values=cache, logits_to_keep=1)
        for _ in range(rounds + 1):
            for name, cache in caches.items():
                begun = time.perf_counter()
                for _ in range(TIMED):
                    model(input_ids=ids_1S[:, :1], past_key_values=cache)
                seconds[name].append((time.perf_counter() - begun) / TIMED)
    for name in names:
        ratios = [own / full for own, full in zip(seconds[name][1:], seconds["full"][1:], strict=True)]
        taken = num_bytes(caches[name]) / caches[name].get_seq_length()
        yield (
            f"| {name} | {taken:.0f} | {1000 * fmean(seconds[name][1:]):.1f} | "
            f"{fmean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


def reuse_rows(work: Path, size: str, turns: int) -> Iterator[str]:
    """Yield how long first tokens take."""
    model = work / "large"
    make_large(model, layers=Shape().layers_in(parse_bytes(size)))
    kinds = ("new", "the same again", "16 tokens more", "found on the disk")
    firsts: dict[str, list[float]] = {kind: [] for kind in kinds}
    each: list[float] = []
    draw = partial(torch.randint, 1000, 30_000, dtype=torch.int64)

    def go(runtime: Runtime, ids_1S: Tensor) -> tuple[float, float, list[int]]:
        moments = [time.perf_counter()]

        def note(token: int, scores_V: Tensor) -> bool:
            moments.append(time.perf_counter())
            return False

        new = runtime.generate_ids(ids_1S, max_tokens=12, sampling=GREEDY, on_token=note)
        return moments[1] - moments[0], (moments[-1] - moments[1]) / (len(moments) - 2), new

    for turn in range(turns):
        options = {"memory": "64GiB", "context": 1024, "sessions": work / f"sessions-{turn}"}
        with Runtime(model, **options, most_experts=_quarter(model)) as runtime:
            ids_1S = draw((1, 512), generator=torch.Generator().manual_seed(turn))
            first, token, new = go(runtime, ids_1S)
            firsts["new"].append(first)
            each.append(token)
            first, token, _ = go(runtime, ids_1S)
            firsts["the same again"].append(first)
            each.append(token)
            more = draw((1, 16), generator=torch.Generator().manual_seed(turn + 100))
            first, token, _ = go(runtime, torch.cat([ids_1S, torch.tensor([new]), more], 1))
            firsts["16 tokens more"].append(first)
            each.append(token)
        with Runtime(model, **options, most_experts=_quarter(model)) as runtime:
            go(runtime, draw((1, 1), generator=torch.Generator().manual_seed(turn)))
            first, token, _ = go(runtime, ids_1S)
            assert runtime.reused == 511
            firsts["found on the disk"].append(first)
            each.append(token)
    token = fmean(each)
    for kind in kinds:
        yield f"| {kind} | {fmean(firsts[kind]):.2f} | {fmean(firsts[kind]) / token:.1f} |"
    yield f"| a token behind it | {token:.3f} | 1.0 |"


def _quarter(model: Path) -> int:
    from coterie.run.prepare import prepare

    return len(prepare(model, memory="64GiB").records) // 4


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, default=list(MODELS))
    parser.add_argument("--windows", type=int, default=10, help="pieces of text")
    parser.add_argument("--prefix", type=int, default=384)
    parser.add_argument("--behind", type=int, default=48, help="tokens behind the prefix")
    parser.add_argument("--size", default="1GB", help="of the synthetic checkpoint, or 0 for none")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="where it goes as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[str] = []

    def say(more: Sequence[str]) -> None:
        lines.extend(more)
        print(*more, sep="\n", flush=True)

    say([
        f"Loss: {options.behind} tokens behind {options.prefix} of held-out text, {options.windows} pieces; rise and "
        "KL in thousandths of a nat.", "",
        "| model | keys and values | bytes a token | of full | rise of the loss | KL | same token |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ])  # fmt: skip
    for model in options.models:
        for line in loss_rows(model, options):
            say([line])
    with tempfile.TemporaryDirectory() as folder:
        say([
            "", f"Speed: a token behind {CONTEXT:,} others; 4 layers of 4 heads of 128 numbers, one thread, "
            f"{options.turns} rounds.", "",
            "| keys and values | bytes a token | ms a token | x full |", "| --- | ---: | ---: | ---: |",
        ])  # fmt: skip
        for line in speed_rows(Path(folder), options.turns):
            say([line])
        if options.size != "0":
            say([
                "", f"Reuse: a synthetic model of {options.size}, a quarter of its experts in memory, prompts of 512 "
                f"tokens, one thread, means of {options.turns}.", "",
                "| prompt | first token, s | in tokens' time |", "| --- | ---: | ---: |",
            ])  # fmt: skip
            for line in reuse_rows(Path(folder), options.size, options.turns):
                say([line])
    if options.markdown is not None:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
