"""What is said of a model and its results by headers, by the architecture, and by the files themselves is the same."""

from __future__ import annotations

from pathlib import Path

from coterie.compress.apply import Result
from coterie.model.arch.accounting import Accounting, LayerShape
from coterie.model.arch.conversion import WeightConversion
from coterie.model.arch.inspect import accounting_of, inspect
from coterie.model.arch.layers import Architecture
from coterie.model.disk.checkpoint import Checkpoint


def require(condition: bool, message: str) -> None:
    """Raise AssertionError with a message unless a condition holds."""
    # Not the assert statement: these checks must hold under python -O too.
    if not condition:
        raise AssertionError(message)


def check_inspection(model: Path, truth: Architecture) -> None:
    """Check that what the headers say and what the model says is the same."""
    inspection = inspect(model)
    key = inspection.expert_key
    require(key == truth.expert_key, f"inspect says {key}, the model {truth.expert_key}")
    facts = [(each.num_experts, each.top_k, each.width, each.hidden_size) for each in inspection.moe_layers]
    expected = [(each.num_experts, each.top_k, each.width, each.hidden_size) for each in truth.layers]
    require(facts == expected, f"inspect says {facts} (experts, top_k, width, hidden size), the model {expected}")


def check_budget(model: Path, num_bytes: int, *, experts: int) -> None:
    """Check that, for the bytes of a result, inspect finds that many experts, in just these bytes; with less, fewer."""
    fits = [inspect(model, budget=limit).budget for limit in (num_bytes, num_bytes - 1)]
    assert fits[0] is not None
    assert fits[1] is not None
    facts = (fits[0].experts, fits[0].bytes, fits[1].experts < experts)
    require(facts == (experts, num_bytes, True), f"inspect says {facts} for {experts} experts of {num_bytes} bytes")


def check_accounting(source: Checkpoint, compressed: Checkpoint, result: Result) -> None:
    """Check that the files hold, tensor by tensor, what was said before: by the architecture and by headers alone."""
    architecture = Architecture.of(source)
    sizes = [
        LayerShape(
            num_experts=layer.num_experts,
            width=None if layer.widths is not None else layer.width,
            widths=layer.widths,
            keeps_rows=result.plan.mapped,
        )
        for layer in result.plan.layers
    ]
    derived = Accounting.of(source, architecture, WeightConversion(source, architecture.model))
    on_disk = {name: (info.dtype, info.shape) for name, info in compressed.tensors.items()}
    for accounting, who in ((derived, "the architecture"), (accounting_of(source), "headers")):
        listed = accounting.tensors(sizes)
        predicted = {
            f"{tensor.name}{suffix}": stored
            for tensor in listed
            for suffix, stored in tensor.encoding.stored(tensor.shape).items()
        }
        wrong = sorted(name for name in predicted.keys() | on_disk.keys() if predicted.get(name) != on_disk.get(name))
        first = [predicted.get(name) for name in wrong[:1]]
        require(not wrong, f"{wrong[:1]}: {who} said {first}, written {len(wrong)} others")
        sums = (sum(tensor.num_bytes for tensor in listed), accounting.num_bytes(sizes), compressed.num_bytes)
        require(len(set(sums)) == 1, f"{who}: {sums} bytes as listed, as added up, as written")
