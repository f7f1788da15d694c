"""How long the stages of an evaluation are reckoned to take, so that they are known in proportion to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coterie.evaluate.subjects import Subject
from coterie.model.stream.stream import Stream
from coterie.model.stream.work import head_seconds, unit_work
from coterie.progress import StageTime


def layers_of(subject: Subject) -> str:
    """Return the name of the stage in which text runs through the layers of a model."""
    return f"{subject.name}: layers"


def text_of(subject: Subject) -> str:
    """Return the name of the stage in which what a model predicts is scored."""
    return f"{subject.name}: text"


def stage_times(
    base: Subject | None, subjects: Sequence[Subject], stream_of: Callable[[Subject], Stream]
) -> tuple[StageTime, ...]:
    """Return the stages of an evaluation in their order.

    Args:
        base: the model that the others are compared with, which is read first.
        subjects: the models, perhaps the base among them.
        stream_of: gives the stream of one.
    """
    stages: list[StageTime] = []
    for subject in (*(() if base is None else (base,)), *subjects):
        stream = stream_of(subject)
        tokens = sum(ids_NS.numel() for ids_NS in subject.tokens.sequences.values())
        if not any(stage.name == layers_of(subject) for stage in stages):
            work = unit_work(stream, (), tokens=tokens, base=True)
            stages.append(StageTime(name=layers_of(subject), seconds=work.total, tokens=tokens, reading=work.reading))
        if subject is not base:
            seconds = max(1e-6, head_seconds(stream, tokens=tokens))
            stages.append(StageTime(name=text_of(subject), seconds=seconds, tokens=tokens))
    return tuple(stages)
