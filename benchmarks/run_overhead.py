"""What Python costs a layer and token of a run: a model so small that products take next to nothing.

    python benchmarks/run_overhead.py [--tokens 60] [--repeats 3] [--markdown FILE]

Milliseconds of the processor in the thread that generates, divided by layers and tokens, the smallest of some repeats:
with nothing in the place of the experts (the family's modules, `generate`, the tokenizer), and with them, in memory or
read. At last seconds from the call of `Runtime` to a model that is ready.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coterie.model.arch.load import load_model
from coterie.model.arch.seam import intercepted
from coterie.run.engine import Runtime, Sampling
from coterie.testing import tiny_checkpoint

LAYERS, EXPERTS, TOP_K, WARM = 16, 64, 8, 4


def milliseconds(runtime: Runtime, tokens: int, *, nothing: bool) -> float:
    """Return the milliseconds of the processor of a layer and token."""
    moments: list[float] = []

    def note(token: int, scores_V: Tensor) -> bool:
        moments.append(time.thread_time())
        return False

    def zeros(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return torch.zeros_like(hidden_TD)

    settings: Any = {"max_tokens": tokens + WARM, "sampling": Sampling(temperature=1.0, seed=0), "on_token": note}
    runtime.model.generation_config.eos_token_id = None
    ids_1S = runtime.tokenizer("The quick brown fox", return_tensors="pt").input_ids
    if nothing:
        with intercepted(runtime.model, zeros):
            runtime.generate_ids(ids_1S, **settings)
    else:
        runtime.generate_ids(ids_1S, **settings)
    return 1000 * (moments[-1] - moments[WARM - 1]) / (len(moments) - WARM) / LAYERS


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="where it goes as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"{LAYERS} layers of {EXPERTS} experts, {TOP_K} a token.", "",
        "| experts | in memory | ms a layer and token | of these for experts |", "| --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_checkpoint(
            Path(folder) / "m", "qwen3_moe", num_hidden_layers=LAYERS, num_local_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
        )  # fmt: skip
        ready = []
        least = 0.0
        for name, share, lookahead in (
            ("none", 1.0, 0), ("the family's own loop", 1.0, 0), ("follow", 1.0, 0), ("follow", 0.25, 0),
            ("decay", 0.25, 0), ("follow, ahead", 0.25, TOP_K),
        ):  # fmt: skip
            begun = time.perf_counter()
            policy = "decay" if name == "decay" else "follow"
            with Runtime(
                model, memory="64GiB", context=256, most_experts=round(share * LAYERS * EXPERTS), policy=policy,
                lookahead=lookahead,
            ) as runtime:  # fmt: skip
                ready.append(time.perf_counter() - begun)
                if name == "the family's own loop":
                    runtime.model = load_model(model, dtype=torch.float32)
                    runtime.model.config._experts_implementation = "eager"
                cost = min(
                    milliseconds(runtime, options.tokens, nothing=name == "none") for _ in range(options.repeats)
                )
            least = least or cost
            lines.append(f"| {name} | {share:.0%} | {cost:.2f} | {cost - least:.2f} |")
            print(lines[-1], flush=True)
    lines += ["", f"A model is ready {min(ready):.2f} s after the call of `Runtime`."]
    print(*lines, sep="\n")
    if options.markdown is not None:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
