"""What steps that train the whole result share: the text is drawn, and what training takes is said beforehand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from coterie.compress.prepare import Job
from coterie.compress.recipes import training_tokens
from coterie.compress.result_steps import LeftOut
from coterie.errors import InputError, NotEnoughMemory
from coterie.model.arch.load import result_meta_model
from coterie.model.stream.memory import Stage, fitting_batch
from coterie.model.stream.work import head_seconds, unit_work
from coterie.profile.calibration import TokenSet
from coterie.profile.self_text import SELF
from coterie.progress import StageTime
from coterie.train.cost import say_cost
from coterie.train.distill import KEPT, PREDICTING, PREDICTING_HEAD, TRAINING
from coterie.train.memory import BEST, MOMENTS, predicting_stages, too_large

log = logging.getLogger(__name__)

#: Sequences of a batch that the original predicts, at most.
BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What the result is trained on.

    Attributes:
        token_set: the text.
        tokens: tokens to train on; where the text has fewer, it is seen again.
        batch_size: sequences of a batch that the original predicts.
        stages: the memory that it takes.
        times: the time that it is reckoned to take.
        disk: the bytes that are written while it trains, by what they are.
    """

    token_set: TokenSet
    tokens: int
    batch_size: int
    stages: tuple[Stage, ...]
    times: tuple[StageTime, ...]
    disk: Mapping[str, int]

    def header(self) -> list[Any]:
        """Return what training hangs on."""
        return [self.token_set.digest, self.tokens]


def prepare_training(
    job: Job,
    step: str,
    stages_of: Callable[[PreTrainedModel], tuple[Stage, ...]],
    *,
    disk: Mapping[str, int] | None = None,
) -> Prepared | LeftOut | None:
    """Draw the text and announce what training takes.

    Whether it fits is asked of the memory that is free when the run begins, or of the limit; a run that goes on keeps
    to what was decided.

    Args:
        job: the compression.
        step: name of the step.
        stages_of: what the result, a meta model, takes; training itself is the last.
        disk: the bytes that are written beside predictions and states of training, by what they are.

    Returns:
        What was prepared; `LeftOut` where it does not fit, which is said; None where it was not asked for.

    Raises:
        InputError: no text to train on, or a number of tokens that cannot be.
        NotEnoughMemory: it does not fit, and the number of tokens was given.
    """
    options, plan = job.options, job.outline
    num_tokens = training_tokens(plan.recipe, options.effort, options.train_tokens, trains=True)
    if not num_tokens or plan.predicted_bytes >= plan.original_bytes:
        return None
    if options.text is None:
        raise InputError(
            f"recipe {plan.recipe} trains its result on text at effort {options.effort}: give it with --text beside "
            "the profile, or take --effort fast"
        )
    architecture, shape, device = job.source.architecture, plan.shape, job.stream.device
    layers = architecture.layers
    result_model = result_meta_model(
        architecture, shape.num_experts, maps=None, dtype=torch.float32, width=shape.width, top_k=shape.top_k
    )
    decided = _decide(job, step, stages_of(result_model))
    if isinstance(decided, LeftOut):
        return decided
    own = str(options.text) == SELF  # what the model wrote to be measured has to do: writing takes long
    token_set = job.text(min(num_tokens, options.tokens) if own else num_tokens, up_to=True)
    if sum(map(len, token_set.sequences.values())) < 2:
        reason = "one sequence of text is too little to train on and to see whether it helped"
        log.warning("%s: left out", reason)
        return LeftOut(reason)
    text_tokens = sum(token_set.num_tokens.values())
    cost = say_cost(
        architecture.model, result_model, layers, text_tokens=text_tokens, tokens=num_tokens,
        top_k=shape.top_k or layers[0].top_k, device=device,
    )  # fmt: skip
    size = fitting_batch(BATCH_SIZE, seq_len=token_set.seq_len, hidden_size=layers[0].hidden_size)
    predicting = predicting_stages(job.stream, layers, token_set, batch_size=size)
    work = unit_work(job.stream, layers, tokens=text_tokens, base=True)
    times = (
        StageTime(name=PREDICTING, seconds=work.total, tokens=text_tokens, reading=work.reading),
        StageTime(name=PREDICTING_HEAD, seconds=head_seconds(job.stream, tokens=text_tokens), tokens=text_tokens),
        StageTime(name=TRAINING, seconds=max(1e-6, cost.training_seconds), tokens=cost.tokens),
    )
    return Prepared(
        token_set=token_set, tokens=cost.tokens, batch_size=size, stages=(*predicting, *decided),
        times=times, disk={**_disk(job, decided[-1], text_tokens), **(disk or {})},
    )  # fmt: skip


def _disk(job: Job, training: Stage, text_tokens: int) -> dict[str, int]:
    vocab_size = int(job.stream.model.config.get_text_config().vocab_size)
    lines = dict(training.lines)
    state = lines[MOMENTS] + lines[MOMENTS] // 2 + lines.get(BEST, 0)
    return {
        # A token and its log-probability for each that is kept.
        "the original's predictions, while it trains": 8 * min(KEPT, vocab_size) * text_tokens,
        "the state of training, while it trains": 2 * state,
    }


def _decide(job: Job, step: str, stages: tuple[Stage, ...]) -> tuple[Stage, ...] | LeftOut:
    """Return the memory that training takes, or why it is left out; a run that goes on keeps to its decision."""
    options, before = job.options, job.recorded.get(step)
    reasons = ((stage, too_large(stage, limit=options.limit)) for stage in reversed(stages))
    stage, reason = next((each for each in reasons if each[1] is not None), (stages[-1], None))
    if before is not None:
        as_before = LeftOut.recorded(before)
        if as_before is not None and options.train_tokens is None:
            log.warning(
                "training is left out, as when the run began: %s; remove what was begun to decide anew",
                as_before.reason,
            )  # fmt: skip
            return as_before
        if as_before is None and reason is not None and options.limit is None:
            log.warning("%s; it was decided when the run began that it trains: it goes on so", reason)
            reason = None
    if reason is None:
        return tuple(replace(each, device=None) for each in stages)  # what is free was asked once
    if options.train_tokens is not None:
        raise NotEnoughMemory(
            f"{stage}: {reason}; give fewer --seq-len, --train-tokens 0, or a machine with more memory"
        )
    log.warning("%s: training is left out", reason)
    return LeftOut(reason)
