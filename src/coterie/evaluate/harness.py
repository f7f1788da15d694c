"""The bridge to EleutherAI's lm-evaluation-harness: its tasks, on any checkpoint that Coterie loads.

    from coterie.evaluate.harness import run_tasks

    scores = run_tasks("small", ["sums_choose"], include_path="docs/examples/harness")
    scores["sums_choose"]["acc"]

The model is loaded by `coterie.model.arch.load.load_model`, so mapped results work as well, and handed over as it is.
It needs ``pip install 'coterie[eval]'``.
"""

from __future__ import annotations

import difflib
import functools
import io
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from coterie.errors import InputError, UnknownName
from coterie.model.arch.load import load_model
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.model.quiet import quiet
from coterie.paths import user_path
from coterie.progress import are_bars_drawn

#: What is told to whoever has not installed the harness.
INSTALL = "pip install 'coterie[eval]'"

_NEEDED = ("lm_eval", "accelerate", "datasets")

#: The harness's own pieces of the name of a metric: "acc,none" and "acc_stderr,none".
_NO_FILTER = "none"


def check_harness() -> None:
    """Raise InputError, with the command that installs it, when the harness is not there."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(
            f"tasks need the lm-evaluation-harness, which is not installed ({', '.join(missing)} not found): {INSTALL}"
        )


def find_tasks(tasks: Sequence[str], *, include_path: str | Path | None = None, limit: int | None = None) -> Any:
    """Find tasks by name, before anything is computed; return the harness's task manager.

    Args:
        tasks: names of tasks, groups or tags.
        include_path: a folder with task files (YAML) beside those that came with the harness.
        limit: examples of each task at most.

    Raises:
        InputError: nothing is asked, the harness is not installed, or the folder is not there.
        UnknownName: no such task.
    """
    if not tasks:
        raise InputError("no task was named; give one or more with --tasks")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1")
    check_harness()
    folder = None if include_path is None else user_path(include_path).resolve()
    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder} is not a folder; --include-path takes one with task files (*.yaml)")
    from lm_eval.tasks import TaskManager

    with _quiet():
        # Reading the list of those that came with it takes seconds.
        if folder is not None:
            own = TaskManager(include_path=str(folder), include_defaults=False)
            if set(tasks) <= set(own.all_tasks):
                return own
        manager = _shipped_tasks() if folder is None else TaskManager(include_path=str(folder))
    for name in tasks:
        if name not in manager.all_tasks:
            # All of them would fill many pages.
            if near := difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6):
                raise UnknownName("task", name, near)
            raise InputError(
                f"unknown task {name!r}; `lm-eval ls tasks` lists those that came with the harness, and --include-path "
                "names a folder with others"
            )
    return manager


@functools.cache
def _shipped_tasks() -> Any:
    """Return the tasks that came with the harness: reading their list takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def run_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, float | None]]:
    """Run tasks of the harness on a model, which is in memory as a whole for that.

    Args:
        model: a model folder or hub id; mapped results too.
        tasks: names of tasks, groups or tags.
        include_path: a folder with task files (YAML) beside those that came with the harness.
        limit: examples of each task at most; all when None.
        device: where the model runs.
        dtype: number format, see `coterie.model.arch.load.load_model`.
        batch_size: requests in a batch.
        seed: seed of the draw of examples that are shown.

    Returns:
        For each task its metrics and their standard errors, by the harness's names: ``acc`` and ``acc_stderr``, with
        the filter in brackets where there is one; ``examples`` is how many there were. What is not a number is left
        out, and None is what the harness did not compute.

    Raises:
        InputError: the harness is not installed, the folder is not there, or nothing is asked.
        UnknownName: no such task.
    """
    manager = find_tasks(tasks, include_path=include_path, limit=limit)
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    loaded: Any = load_model(model, dtype=dtype, device=device)
    # How long and how to write is the task's affair: what a model came with would go before it.
    config = loaded.generation_config
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    loaded.generation_config = GenerationConfig(**ids)  # type: ignore[no-untyped-call]
    with _quiet(), _random_numbers_kept(), _without(evaluator, "add_env_info", "get_git_commit_hash"):
        bridge = HFLM(
            pretrained=loaded, backend="causal", tokenizer=load_tokenizer(model), batch_size=batch_size,
            trust_remote_code=False,
        )  # fmt: skip
        results: Any = evaluator.simple_evaluate(
            model=bridge,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    counts = results.get("n-samples", {})
    return {
        task: _metrics(entries) | ({"examples": counts[task]["effective"]} if task in counts else {})
        for task, entries in results["results"].items()
    }


def _metrics(entries: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers of a task, by names without the harness's own "none"."""
    numbers: dict[str, float | None] = {}
    for key, value in entries.items():
        metric, _, chosen = key.partition(",")
        if not chosen:
            continue  # the task's alias and the like
        name = metric if chosen == _NO_FILTER else f"{metric} [{chosen}]"
        if isinstance(value, int | float):
            numbers[name] = float(value) if math.isfinite(value) else None
        elif value == "N/A":
            numbers[name] = None
    return numbers


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from telling what it does, and from drawing progress where stderr is no terminal."""
    chatty = logging.getLogger("lm_eval")
    before = chatty.level
    chatty.setLevel(logging.ERROR)
    try:
        with quiet(), nullcontext() if are_bars_drawn() else redirect_stderr(io.StringIO()):
            yield
    finally:
        chatty.setLevel(before)


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Give the random numbers back as they were: the harness sets all seeds."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _without(module: ModuleType, *names: str) -> Iterator[None]:
    """Leave out what the harness finds out about the machine and the folder that it runs in, with other programs."""
    before = {name: getattr(module, name) for name in names if hasattr(module, name)}
    for name in before:
        setattr(module, name, lambda *arguments: None)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)
