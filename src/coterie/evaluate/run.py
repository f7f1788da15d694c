"""Evaluate models on text, each next to a base: what did it cost.

    from coterie.evaluate.run import evaluate

    [card] = evaluate("small", against="original", text="text/test", tokens=65536)
    card.overall["perplexity"], card.overall["kl"], card.overall["accuracy"]

What is measured on text is in `coterie.evaluate.evaluation`; here are the arguments, and what is measured of a model as
a whole: its speed, its memory, and tasks of the lm-evaluation-harness.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from coterie.amounts import format_bytes, parse_bytes
from coterie.artifact import digest_of
from coterie.errors import InputError
from coterie.evaluate.evaluation import Evaluation
from coterie.evaluate.harness import find_tasks, run_tasks
from coterie.evaluate.memory import forecast
from coterie.evaluate.scorecard import Scorecard, environment
from coterie.evaluate.speed import RunningCost, measure_cost, whole_stage
from coterie.evaluate.subjects import mixed_batch
from coterie.evaluate.sums import Sums
from coterie.evaluate.times import stage_times
from coterie.model.device import check_device
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.files import name_of_model
from coterie.model.stream.memory import Forecast, peak_bytes
from coterie.model.stream.stream import Stream
from coterie.profile.sources import On
from coterie.progress import waiting
from coterie.route.policy import RoutePolicy

log = logging.getLogger(__name__)


def evaluate(
    models: Sequence[str | Path] | str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    tokens: int | None = None,
    seq_len: int = 512,
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch_size: int = 8,
    questions: int | None = None,
    dtype: torch.dtype | None = None,
    speed_seconds: float | None = None,
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
    cache: str | Path | None = None,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    on: On = "all",
    route: str | Path | RoutePolicy | None = None,
) -> list[Scorecard]:
    """Measure models on a text folder: quality by domain and bytes and, when asked for, speed, memory and tasks.

    Args:
        models: one model or several, as folders or hub ids; the base itself may be among them.
        against: the base to compare with; without it `kl`, `agreement` and the ratios are None.
        text: a text folder, see `coterie.profile.documents`, with ``<domain>.qa.jsonl`` files of questions; or ``hf:``
            and the name of a data set, see `coterie.profile.data_sets`.
            None with tasks alone, which then are all that is measured, and take no base.
        tokens: tokens in all, shared equally by the domains; the whole text when None.
        seq_len: tokens in a sequence.
        seed: seed of the draw of sequences and questions.
        device: where the models run.
        batch_size: sequences in a batch at most; the scores do not depend on it beyond rounding.
        questions: questions of each domain at most; all when None, none when 0.
        dtype: float32, bfloat16 or float16 to run in; see `coterie.model.stream.stream.working_dtype` if None.
        speed_seconds: load each model (and the base) into memory as a whole, and time it for so long, three rounds in
            any case. When None, nothing is loaded as a whole, and speed and memory are not measured.
        max_memory: bytes, or an amount like "8GiB", that the run may take.
        allow_pickle: read weights that are stored as pickles.
        cache: folder where what the base predicts is kept for later calls, if it fits into
            `coterie.evaluate.kept_predictions.KEPT_BYTES`; the scores do not change by it.
        tasks: names of tasks of the lm-evaluation-harness; each model is loaded into memory as a whole for them.
        include_path: folder with task files (YAML) beside those that came with the harness.
        limit: examples of each task at most; all when None.
        on: predictions of which tokens are scored: "all", or those of answers in conversations and of completions,
            "assistant".
        route: a policy, or the file of one that `coterie route` wrote: `models` compute the experts that it leaves of
            those that routers choose, and the base all of them.

    Returns:
        One scorecard for each of `models`, in their order.

    Raises:
        TextError: no text, empty or too short text, or a malformed question.
        InputError: no model, nothing to measure, tasks without the harness, a base that reads the text otherwise or
            has another vocabulary, a device that is not there, a number format that no model runs in, or a model whose
            predictions are not numbers.
        Infeasible: `max_memory`, or what is free for a whole model, is too little.
    """
    chosen = [models] if isinstance(models, str | Path) else list(models)
    if not chosen:
        raise InputError("there is no model to evaluate; pass one or more")
    if not tasks and (text is None or include_path is not None or limit is not None):
        raise InputError(
            "nothing to measure: give a text folder with --text, or tasks with --tasks"
            if text is None
            else "--include-path and --limit are about tasks: name some with --tasks, or leave them out"
        )
    if text is None and (against is not None or speed_seconds is not None):
        raise InputError("a base to compare with, and speed, take text: give a folder with --text")
    if route is not None and (tasks or speed_seconds is not None):
        raise InputError(
            "--route counts for the scores on text; --speed and --tasks load models as they are: leave one of them out"
        )
    policy = RoutePolicy.of(route)
    target = check_device(device)
    bound = None if max_memory is None else parse_bytes(max_memory)
    if tasks:
        find_tasks(tasks, include_path=include_path, limit=limit)
    if text is None:
        cards = [_without_text(model, dtype=dtype, device=target, limit=bound, pickle=allow_pickle)
                 for model in chosen]  # fmt: skip
    else:
        cards = _on_text(
            chosen, against=against, text=text, tokens=tokens, seq_len=seq_len, seed=seed, device=target,
            batch_size=batch_size, questions=questions, dtype=dtype, speed_seconds=speed_seconds, bound=bound,
            allow_pickle=allow_pickle, cache=cache, whole=bool(tasks), on=on, route=policy,
        )  # fmt: skip
    if not tasks:
        return cards
    return [
        replace(
            card,
            tasks=run_tasks(
                model, tasks, include_path=include_path, limit=limit, device=target, dtype=dtype,
                batch_size=batch_size, seed=seed,
            ),
        )
        for model, card in zip(chosen, cards, strict=True)
    ]  # fmt: skip


def _on_text(
    models: Sequence[str | Path],
    *,
    speed_seconds: float | None,
    bound: int | None,
    whole: bool,
    **settings: Any,
) -> list[Scorecard]:
    """Measure models on text; `whole` tells that they will be loaded as a whole after that."""
    with Evaluation(**settings) as evaluation:
        subjects = [evaluation.open(model) for model in models]
        option = "--speed" if speed_seconds is not None else "--tasks" if whole else None
        streams = [evaluation.streams(subject) for subject in subjects]
        announced = forecast(subjects, streams, batch_size=evaluation.batch_size, option=option)
        announced.check(bound)
        with waiting(stage_times(evaluation.base, subjects, lambda subject: evaluation.streams(subject)[0])):
            measured = evaluation.measure(subjects)
        log.info("memory: the peak was %s", format_bytes(peak_bytes()))
        costs: Sequence[RunningCost | None] = [None] * len(subjects)
        if speed_seconds is not None:
            costs = measure_cost(
                [(subject.path, mixed_batch(subject.tokens, evaluation.batch_size)) for subject in subjects],
                base=None if evaluation.base is None else evaluation.base.path,
                dtype=settings["dtype"],
                device=evaluation.device,
                seconds=speed_seconds,
            )
        return [evaluation.scorecard(*entry) for entry in zip(subjects, measured, costs, strict=True)]


def _without_text(
    model: str | Path, *, dtype: torch.dtype | None, device: torch.device, limit: int | None, pickle: bool
) -> Scorecard:
    """Return the scorecard of a model that reads no text, after a check that it fits into memory as a whole."""
    stored = Checkpoint.open(model, allow_pickle=pickle)
    stream = Stream(stored, dtype=dtype, device=device)
    Forecast(stages=(whole_stage({name_of_model(model): stream}, option="--tasks"),)).check(limit)
    return Scorecard(
        model=name_of_model(model), model_digest=stored.digest, base=None, base_digest=None,
        text_digest=digest_of({}), seq_len=0, seed=0, domains={}, overall=Sums().scores(compared=False),
        num_bytes=stored.num_bytes, bytes_ratio=None, memory_bytes=None, peak_memory_bytes=None,
        tokens_per_second=None, speed_ratio=None, environment=environment(device, stream.dtype),
    )  # fmt: skip
