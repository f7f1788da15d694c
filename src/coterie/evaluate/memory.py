"""How much memory evaluating models takes, said before it."""

from __future__ import annotations

from collections.abc import Sequence

from coterie.evaluate.speed import whole_stage
from coterie.evaluate.subjects import Subject
from coterie.model.stream.likelihood import BATCH_ELEMENTS
from coterie.model.stream.memory import LOGITS, Forecast, Line, Stage, batch_lines, head_lines, text_lines, unit_lines
from coterie.model.stream.reading import num_logits
from coterie.model.stream.stream import Stream

#: Copies of the logits of a slice of positions: those of the model and the base, and number formats and soft caps.
LOGITS_COPIES = 5


def forecast(
    subjects: Sequence[Subject], streams: Sequence[Sequence[Stream]], *, batch_size: int, option: str | None
) -> Forecast:
    """Say what evaluating models takes at most.

    Args:
        subjects: the models.
        streams: of each the model and, where there is one, the base.
        batch_size: sequences in a batch.
        option: the option that models are loaded as a whole for, next to the base or alone; None for none.

    Raises:
        InputError: one cannot be loaded as a whole.
    """
    stages = [
        stage
        for subject, models in zip(subjects, streams, strict=True)
        for stage in _stages(subject, models, batch_size=batch_size)
    ]
    if option is not None:
        for subject, (stream, *base) in zip(subjects, streams, strict=True):
            others = {"the base": base[0]} if base and option == "--speed" else {}
            stages.append(whole_stage({subject.name: stream} | others, option=option))
    names = dict.fromkeys(stage.name for stage in stages)
    largest = (max((each for each in stages if each.name == name), key=lambda each: each.num_bytes) for name in names)
    return Forecast(stages=tuple(largest))


def _stages(subject: Subject, models: Sequence[Stream], *, batch_size: int) -> tuple[Stage, Stage]:
    tokens = subject.tokens
    total, text_bytes = sum(tokens.num_tokens.values()), text_lines(sum(tokens.num_tokens.values()))
    size = min(batch_size * tokens.seq_len * num_logits(models[0]), BATCH_ELEMENTS)
    reading: list[tuple[Line, ...]] = [
        unit_lines(stream, batch_lines(stream, (), batch_size=batch_size, seq_len=tokens.seq_len, tokens=total))
        for stream in models
    ]
    largest = max(reading, key=lambda lines: sum(size for _, size in lines))
    heads = tuple(line for stream in models for line in head_lines(stream))
    return (
        Stage(name="reading text", lines=(*largest, *text_bytes)),
        Stage(name="judging predictions", lines=(*heads, (LOGITS, 4 * LOGITS_COPIES * size), *text_bytes)),
    )
