"""The reference models, one module each: what its config is, how it trains, where its files are.

Every module has the same names:

- `MODEL`: the stock class; `build(end, device)`: a fresh one, bfloat16, `end` being the id of the end mark.
- `training_pass(model, tokens_BS, labels_BS)`: mean cross-entropy in nats, mean router probability [layers, E] and load
  [layers, E] of one batch, as the stock forward has them; `KERNELS`: those parts of it that `torch.compile` may fuse.
- `BALANCE`: coefficient of the load-balancing loss; `adjust(model, load_LE, scale)`: what follows each step of the
  optimizer, `scale` being 1 until the decay and then falling to 0.
- `RUN`, `LOG`: the folder of the training run and the stem of its kept log and plot, both in reference/.
- `TITLE`, `BALANCING`: what the card says of it.

Layers here are those with experts, in their order.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from . import glm4_moe, olmoe, qwen3_moe

HERE = Path(__file__).resolve().parent.parent
FAMILIES: dict[str, ModuleType] = {"olmoe": olmoe, "glm4_moe": glm4_moe, "qwen3_moe": qwen3_moe}


def find_log(family: ModuleType) -> Path:
    """Log of the training run, or the kept one where there is no run."""
    path = HERE / family.RUN / "log.jsonl"
    return path if path.exists() else HERE / f"{family.LOG}.jsonl"
