"""How long the stages of a compression are reckoned to take, so that they are known in proportion to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coterie.compress.methods import sample_runs
from coterie.compress.plan import Plan
from coterie.compress.recipes import Step
from coterie.model.arch.layers import MoELayer
from coterie.model.stream.stream import Stream
from coterie.model.stream.work import BYTES_A_SECOND, speed_of
from coterie.profile.measure import Measure
from coterie.progress import StageTime

#: What is waited for, as the stages of a run are called.
COMPRESSING, CHECKING = "compressing", "checking"


def passes_share(passes: Sequence[Step]) -> list[float]:
    """Return the share of the work on a layer that each pass is."""
    runs = [sample_runs(name) + 0.05 for name, _ in passes]
    return [each / sum(runs) for each in runs]


def unit_seconds(
    stream: Stream, layers: Sequence[MoELayer], plan: Plan, *, sample_tokens: int, measure: Measure | None
) -> Mapping[str, float]:
    """Reckon how long each unit takes to be compressed and written, by its name.

    Args:
        stream: the model.
        layers: its MoE layers.
        plan: what becomes of them.
        sample_tokens: tokens of the sample that passes read.
        measure: what is measured on the way, with compressed inputs; None for nothing.
    """
    share = plan.predicted_bytes / max(1, plan.original_bytes)
    runs, speed = sum(sample_runs(name) for name, _ in plan.passes), speed_of(stream.device.type)
    seconds = {unit.name: (1 + share) * stream.unit_bytes(unit) / BYTES_A_SECOND for unit in stream.units}
    for layer in layers:
        unit = next(unit for unit in stream.units if unit.holds(layer.experts))
        operations = 2.0 * 3 * layer.num_experts * layer.width * layer.hidden_size * sample_tokens * runs
        seconds[unit.name] += operations / speed
    if measure is not None:  # the text runs through the original layer and through the compressed one, and is measured
        for name, each in measure.work(stream, layers).seconds.items():
            seconds[name] += 3 * each
    return seconds


def compressing_time(stream: Stream, plan: Plan, seconds: Mapping[str, float], measure: Measure | None) -> StageTime:
    """Return the stage of compressing; with compressed inputs text runs through the model in it."""
    tokens = 0 if measure is None else sum(measure.token_set.num_tokens.values())
    share = plan.predicted_bytes / max(1, plan.original_bytes)
    reading = (1 + share) * sum(stream.unit_bytes(unit) for unit in stream.units) / BYTES_A_SECOND
    total = max(1e-6, sum(seconds.values()))
    return StageTime(name=COMPRESSING, seconds=total, tokens=tokens, reading=min(reading, total))


def checking_time(plan: Plan) -> StageTime:
    """Return the stage of writing what no layer wrote, loading all again and comparing it."""
    seconds = max(1e-6, 2 * plan.predicted_bytes / BYTES_A_SECOND)
    return StageTime(name=CHECKING, seconds=seconds, reading=seconds)
