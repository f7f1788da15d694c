"""Tasks: what a worker does, each a function from JSON to JSON.

`profile`, `original` and `cell` are the names that a task may have. A worker holds on to the evaluation of the model
that it works on, with the text in tokens.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from coterie.artifact import write_json
from coterie.bench.cells import BenchSettings, Cell, Model, original_key
from coterie.compress.apply import Result, compress
from coterie.compress.recipes import EFFORTS, get_recipe
from coterie.errors import ArchitectureMismatch, Infeasible, InputError, OutputBusy, OutputExists
from coterie.evaluate.evaluation import Evaluation
from coterie.evaluate.speed import reset_peak
from coterie.model.disk.manifest import RouterForm
from coterie.model.stream.memory import peak_bytes
from coterie.profile.run import profile


class Worker:
    """Does tasks one after another, with one thread."""

    def __init__(self) -> None:
        self._evaluation: Evaluation | None = None
        self._evaluated = ""

    def do(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Do a task: `name` says which, the rest are its arguments."""
        arguments = dict(task)
        return getattr(self, f"_{arguments.pop('name')}")(**arguments)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Let go of what was held."""
        if self._evaluation is not None:
            self._evaluation.__exit__(None, None, None)
        self._evaluation = None

    def _profile(
        self, *, model: str, out: str, seed: int, gradients: bool, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Measure what a model's experts do on one draw of the calibration text."""
        shared = BenchSettings(**settings)

        def run() -> None:
            profile(
                model, out, text=shared.text, tokens=shared.tokens, seq_len=shared.seq_len, seed=seed,
                sample_tokens=shared.sample_tokens, device=shared.device, gradients=gradients,
                max_memory=shared.max_memory, allow_pickle=shared.allow_pickle, on=shared.on,
            )  # fmt: skip

        _, seconds, peak = _measured(run)
        took = {"seconds": seconds, "peak_bytes": peak}
        write_json(Path(f"{out}.json"), took)
        return took

    def _original(
        self, *, model: Mapping[str, Any], out: str, cache: str, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Score the original, and keep what it predicts."""
        chosen, shared = Model(**model), BenchSettings(**settings)
        self._evaluation_of(chosen, shared, cache).keep_predictions()
        if not Path(out).exists():
            self._evaluation_of(chosen, shared, cache).score(chosen.path).save(out)
        return {}

    def _cell(
        self, *, key: str, cell: Mapping[str, Any], profile: str, profile_seconds: float, out: str, cache: str
    ) -> dict[str, Any]:
        """Compress and evaluate; what cannot be done is said instead of raised."""
        parsed_cell, target = Cell.from_json(cell), Path(out)
        entry = {"key": key, "method": parsed_cell.method} | parsed_cell.identity()
        started = time.perf_counter()
        try:
            return entry | self._numbers(parsed_cell, target, profile, profile_seconds, cache)
        except (OutputBusy, OutputExists):
            raise
        except (Infeasible, InputError, ArchitectureMismatch) as error:
            failure = {"status": "infeasible", "error": type(error).__name__, "reason": str(error)}
        except Exception as error:
            self.close()
            reason = str(error) or type(error).__name__
            failure = {
                "status": "failed", "error": type(error).__name__, "reason": reason,
                "traceback": traceback.format_exc(),
            }  # fmt: skip
        return entry | failure | {"seconds": {"all": round(time.perf_counter() - started, 3)}}

    def _numbers(self, cell: Cell, target: Path, profile: str, profile_seconds: float, cache: str) -> dict[str, Any]:
        settings = cell.settings
        evaluation = self._evaluation_of(cell.model, settings, cache)
        trains = get_recipe(cell.recipe).trains
        # Given as a number, so that a result that cannot be trained here is refused and not left untrained.
        train_tokens = EFFORTS[settings.effort] if trains else None

        def make() -> Result:
            return compress(
                cell.model.path, target, keep=1 - cell.removed, recipe=cell.recipe,
                router=cast(RouterForm, cell.router), profile=profile, train_tokens=train_tokens, text=settings.text,
                tokens=settings.tokens, cache=cache, seq_len=settings.seq_len, seed=cell.seed,
                sample_tokens=settings.sample_tokens, device=settings.device,
                max_memory=settings.max_memory, allow_pickle=settings.allow_pickle, on=settings.on,
            )  # fmt: skip

        result, compress_seconds, peak = _measured(make)
        started = time.perf_counter()
        card = evaluation.score(target)
        evaluate_seconds = time.perf_counter() - started
        return {
            "status": "done",
            **card.overall,
            "bytes": card.num_bytes,
            "bytes_ratio": card.bytes_ratio,
            "num_experts": [layer.num_experts_after for layer in result.manifest.layers],
            "loads_with": result.manifest.loads_with,
            "logits_error": result.logits_error,
            "trained": result.manifest.distilled is not None if trains else None,
            "domains": dict(card.domains),
            "seconds": {
                "profile": profile_seconds,
                "compress": compress_seconds,
                "evaluate": round(evaluate_seconds, 3),
                "stages": dict(result.seconds),
            },
            "peak_bytes": peak,
        }

    def _evaluation_of(self, model: Model, settings: BenchSettings, cache: str) -> Evaluation:
        key = original_key(model.digest, settings)
        if self._evaluation is None or self._evaluated != key:
            self.close()
            self._evaluation = Evaluation(
                against=model.path, text=settings.test, tokens=settings.test_tokens, seq_len=settings.seq_len,
                device=settings.device, questions=settings.questions, allow_pickle=settings.allow_pickle, cache=cache,
                on=settings.on, ask_base=False,  # which is scored itself
            )  # fmt: skip
            self._evaluated = key
        return self._evaluation


def _measured(function: Callable[[], Any]) -> tuple[Any, float, int | None]:
    """Call a function; return its value, the seconds that it took and the process's peak memory meanwhile.

    The peak is None where the kernel does not let a process begin to count anew.
    """
    anew = reset_peak()
    started = time.perf_counter()
    value = function()
    return value, round(time.perf_counter() - started, 3), peak_bytes() if anew else None


def set_threads() -> int:
    """Compute with one thread, so that results do not depend on how many workers there are; return how many it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    return before
