"""Measure methods: models x recipes x router forms x shares removed x draws of the calibration text.

    from coterie import bench

    results = bench("model", "run", text="text/calibration", test="text/test", recipes="reap,mergemoe", removed=(0.5,))
    print(results.table)

Every cell is one compression and its evaluation. Finished cells are lines of ``cells.jsonl``, named by a digest of all
that decides what comes out: the same call goes on where an earlier one was ended, and a larger one computes only what
is new. What cells share is computed once: a profile for each model and draw, what the original predicts, its scores.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from coterie.amounts import check_seed, format_bytes, parse_bytes
from coterie.artifact import atomic_path, write_json
from coterie.bench.cells import (
    BenchSettings,
    Cell,
    Model,
    choose_recipes,
    code_version,
    grid,
    original_key,
    pin_source,
    profile_key,
    source_digest,
)
from coterie.bench.plot import draw_png, draw_svg
from coterie.bench.pool import Died, Pool, open_pool
from coterie.bench.store import Store, read_seconds
from coterie.bench.summary import Original, summarize
from coterie.bench.table import tables
from coterie.bench.times import CellTimes
from coterie.errors import CoterieError, InputError, NotEnoughMemory, OutputBusy
from coterie.evaluate.scorecard import Scorecard, environment
from coterie.journal_lines import run_folder
from coterie.model.arch.layers import Architecture
from coterie.model.device import check_device
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.files import name_of_model
from coterie.model.disk.open import open_checkpoint
from coterie.outputs import check_output
from coterie.profile.data_sets import is_data_set_name, local_place
from coterie.profile.sources import On, source_name, text_sources
from coterie.progress import StageTime, duration, track, waiting

log = logging.getLogger(__name__)

MAX_DRAWS = 1000

#: Least and most of numbers that are bounded otherwise than by 1 and 63 bits.
_BOUNDS = {"--questions": (0, 2**63 - 1), "--seq-len": (2, 2**63 - 1), "--jobs": (0, 1024)}

LOCK = ".lock"
CELLS = "cells.jsonl"
TABLE = "table.md"
RESULTS = "results.json"
PLOT = "plot.svg"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What a bench found.

    Attributes:
        out: its folder.
        cells: the cells in their order, as JSON content; see docs/bench.md.
        originals: what the models themselves score, by name.
        table: the tables, in Markdown.
        summary: the same without those by domain.
        computed: how many of the cells were computed by this call; the others were there.
    """

    out: Path
    cells: tuple[Mapping[str, Any], ...]
    originals: Mapping[str, Scorecard]
    table: str
    summary: str
    computed: int

    @property
    def failed(self) -> tuple[Mapping[str, Any], ...]:
        """Cells that ended in an error that was not foreseen; the next call tries them again."""
        return tuple(cell for cell in self.cells if cell["status"] == "failed")


def bench(
    models: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    text: str | Path,
    test: str | Path,
    recipes: str | Sequence[str] = "all",
    routers: Sequence[str] = ("plain", "map"),
    removed: Sequence[float] = (0.25, 0.5, 0.625, 0.75),
    seeds: int | Sequence[int] = 3,
    tokens: int = 131_072,
    test_tokens: int | None = None,
    questions: int | None = None,
    on: On = "all",
    seq_len: int = 512,
    sample_tokens: int = 8_192,
    effort: str = "balanced",
    jobs: int = 1,
    device: str = "cpu",
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
    keep_results: bool = False,
) -> Bench:
    """Compress models with many recipes to several sizes, and measure what each costs.

    Args:
        models: model folders or hub ids.
        out: folder for everything that is found; a bench that is there goes on.
        text: folder with calibration text, see `coterie.profile.documents`; or ``hf:`` and the name of a data set, see
            `coterie.profile.data_sets`, of which all cells read the commit that the hub has now.
        test: folder with test text and questions, or a data set, likewise.
        recipes: "all", or names, as a list or separated by commas.
        routers: forms of the router, see `coterie.compress.compress`; those that a recipe has no use for are left out.
        removed: shares of the expert parameters to remove.
        seeds: how many draws of the calibration text, or their seeds. The test text is the same for all.
        tokens: calibration tokens in all.
        test_tokens: test tokens in all; the whole text when None.
        questions: questions of each domain at most; all when None.
        on: tokens that count in statistics, losses and scores: "all", or those of answers in conversations and of
            completions, "assistant".
        seq_len: tokens in a sequence.
        sample_tokens: tokens of each layer's sample.
        effort: how long recipes that distil train the result: "fast", "balanced" or "thorough".
        jobs: worker processes, each with one thread; what is measured does not depend on it, times apart. With 0 all
            is done in this process.
        device: where layers are computed.
        max_memory: bytes, or an amount like "8GiB", that a compression may take.
        allow_pickle: read weights that are stored as pickles.
        keep_results: keep the compressed checkpoints, in ``OUT/results``.

    Raises:
        InputError: nothing to do, models of one name, or no such recipe, router form, text or device.
        NotACheckpoint, NotAMoE, CorruptCheckpoint: a model cannot be used.
        OutputExists: `out` holds something else than a bench.
        OutputBusy: another bench writes to `out`.
        OutOfSpace: the disk is full; what was finished is kept.
    """
    check_device(device)
    chosen = [models] if isinstance(models, str | Path) else list(models)
    reads = {"model folder": chosen, "text folder": [local_place(text), local_place(test)]}
    folder = check_output(out, kind="bench", reads=reads, accepts=_may_go_on, folder=True)
    opened = [_open(model, allow_pickle=allow_pickle) for model in chosen]
    if not opened:
        raise InputError("there is no model; pass one or more")
    if len({model.name for model in opened}) < len(opened):
        raise InputError(f"the models {', '.join(model.name for model in opened)} need distinct names")
    _check_amounts(
        {"--tokens": tokens, "--test-tokens": test_tokens, "--sample-tokens": sample_tokens, "--questions": questions,
         "--seq-len": seq_len, "--jobs": jobs}
    )  # fmt: skip
    if isinstance(seeds, int) and seeds > MAX_DRAWS:
        raise InputError(f"{seeds} draws of the text are too many; give --seeds {MAX_DRAWS} at most")
    draws = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    for seed in draws:
        check_seed(seed)
    _check_texts([text, test], on=on)
    calibration, testing = pin_source(text), pin_source(test)
    settings = BenchSettings(
        text=calibration, text_digest=source_digest(calibration), test=testing, test_digest=source_digest(testing),
        tokens=tokens, test_tokens=test_tokens, questions=questions, on=on, seq_len=seq_len,
        sample_tokens=sample_tokens, effort=effort, device=device,
        max_memory=None if max_memory is None else parse_bytes(max_memory), allow_pickle=allow_pickle,
    )  # fmt: skip
    cells = grid(
        opened, recipes=choose_recipes(recipes), routers=routers, removed=removed, seeds=draws, settings=settings
    )
    begins = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputBusy(f"{folder}: another bench writes there; wait for it, or choose another folder") from None
    try:
        call = _BenchCall(folder=folder, models=opened, cells=cells, settings=settings, keep_results=keep_results)
        return call.run(jobs)
    finally:
        if begins:
            _remove_if_nothing_came(folder)
        lock.release()


def _check_texts(texts: Sequence[str | Path], *, on: str) -> None:
    """Raise TextError for text that cannot be read, before anything is computed; of a data set, one row is read."""
    for text in texts:
        for source in text_sources(text, on=on).values():
            if is_data_set_name(text):
                next(source.read(), None)


def _check_amounts(amounts: Mapping[str, int | None]) -> None:
    """Raise InputError for an amount that cannot be, before any folder is made or worker started."""
    for option, amount in amounts.items():
        least, most = _BOUNDS.get(option, (1, 2**63 - 1))
        if amount is not None and not least <= amount <= most:
            raise InputError(f"{option} {amount!s:.40} cannot be; give a whole number from {least} to {most}")


def _remove_if_nothing_came(folder: Path) -> None:
    """Remove the folder of a bench that ended before anything was finished, so that it is as it was before."""
    with suppress(OSError):
        for entry in folder.iterdir():
            if entry.is_dir():
                entry.rmdir()
        if {entry.name for entry in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


def _may_go_on(folder: Path) -> bool:
    """Tell whether a folder holds a bench, or nothing but what one begins with."""
    if not folder.is_dir():
        return False
    names = {entry.name for entry in folder.iterdir()}
    begun = {LOCK, "originals", "profiles", "work", "cache"}
    return not names or names >= {LOCK, CELLS} or (LOCK in names and names <= begun)


def _open(model: str | Path, *, allow_pickle: bool) -> Model:
    stored = Checkpoint.open(model, allow_pickle=allow_pickle)
    checkpoint = open_checkpoint(stored.path, allow_pickle=allow_pickle)
    Architecture.of(checkpoint)
    return Model(name=name_of_model(model), path=str(stored.path.resolve()), digest=checkpoint.digest)


@dataclass(frozen=True, kw_only=True, slots=True)
class _BenchCall:
    """One call of the bench."""

    folder: Path
    models: Sequence[Model]
    cells: Sequence[Cell]
    settings: BenchSettings
    keep_results: bool

    def run(self, jobs: int) -> Bench:
        """Compute what is missing, and write down what was found."""
        store = Store(self.folder / CELLS)
        keys = {cell.key: cell for cell in self.cells}
        open_ones = {key: cell for key, cell in keys.items() if _is_open(store.cells.get(key))}
        # What a killed bench left; one that is not quite dead yet cannot write into the new folder.
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        work = self.folder / "work" / f"{os.getpid()}-{time.time_ns()}"
        log.info(
            "%d cells: %d are there, %d to do with %d workers", len(keys), len(keys) - len(open_ones), len(open_ones),
            jobs,
        )  # fmt: skip
        try:
            if open_ones or not all(self._original_file(model).exists() for model in self.models):
                work.mkdir(parents=True)
                stages = [StageTime(name=name) for name in ("profiles and originals", "cells")]
                with open_pool(jobs) as pool, waiting(stages):
                    self._share(pool, list(open_ones.values()))
                    self._compute(pool, open_ones, store, work, jobs)
        finally:
            shutil.rmtree(self.folder / "work", ignore_errors=True)
        shutil.rmtree(self._cache, ignore_errors=True)
        # The key is what a cell is; its model's folder may have had another name when it was computed.
        cells = [store.cells[key] | cell.identity() | {"method": cell.method} for key, cell in keys.items()]
        return self._write(cells, computed=len(open_ones))

    @property
    def _cache(self) -> Path:
        return self.folder / "cache"

    def _original_file(self, model: Model) -> Path:
        return self.folder / "originals" / f"{original_key(model.digest, self.settings)[:16]}.json"

    def _profile_folder(self, cell: Cell) -> Path:
        key = profile_key(cell.model.digest, cell.seed, self.settings, gradients=cell.gradients)
        return self.folder / "profiles" / key[:16]

    def _share(self, pool: Pool, cells: Sequence[Cell]) -> None:
        """Make the profiles and what is known of the originals."""
        shared = asdict(self.settings)
        tasks: dict[str, dict[str, Any]] = {}
        needed = {cell.model.name for cell in cells}
        (self.folder / "originals").mkdir(exist_ok=True)
        (self.folder / "profiles").mkdir(exist_ok=True)
        for model in self.models:
            out = self._original_file(model)
            if model.name in needed or not out.exists():
                tasks[f"{model.name}: scores of the original"] = {
                    "name": "original", "model": asdict(model), "out": str(out), "cache": str(self._cache),
                    "settings": shared,
                }  # fmt: skip
        for cell in cells:
            out = self._profile_folder(cell)
            if not Path(f"{out}.json").exists():
                with_gradients = " with gradients" if cell.gradients else ""
                shutil.rmtree(out, ignore_errors=True)  # made, but the time that it took was not written down
                tasks[f"{cell.model.name}: profile of seed {cell.seed}{with_gradients}"] = {
                    "name": "profile", "model": cell.model.path, "out": str(out), "seed": cell.seed,
                    "gradients": cell.gradients, "settings": shared,
                }  # fmt: skip
        names = list(tasks)
        for number, answer in track(pool.run(list(tasks.values())), "profiles and originals", len(tasks)):
            if isinstance(answer, Died):
                raise CoterieError(f"{names[number]}: {answer.reason}")
            log.info("%s: done", names[number])

    def _compute(self, pool: Pool, todo: Mapping[str, Cell], store: Store, work: Path, jobs: int) -> None:
        """Compute cells, and write each down as it is finished."""
        tasks, keys, cells = [], list(todo), list(todo.values())
        for key, cell in todo.items():
            profile = self._profile_folder(cell)
            tasks.append(
                {
                    "name": "cell", "key": key, "cell": cell.to_json(), "profile": str(profile),
                    "profile_seconds": read_seconds(Path(f"{profile}.json")),
                    "out": str(work / key[:32]), "cache": str(self._cache),
                }
            )  # fmt: skip
        times, waiting_for = CellTimes(store.cells.values()), dict(enumerate(cells))
        weights = [times.expected(cell) for cell in cells]
        answers = track(
            pool.run(tasks), "cells", sum(weights), weight=lambda item: weights[item[0]],
            largest=max(weights, default=1.0),
        )  # fmt: skip
        for number, answer in answers:
            del waiting_for[number]
            cell, target = cells[number], work / keys[number][:32]
            if isinstance(answer, Died):
                answer = {
                    "key": keys[number], "method": cell.method, **cell.identity(), "status": "failed",
                    "error": "Died", "reason": answer.reason, "seconds": {},
                }  # fmt: skip
            store.add(answer)
            if self.keep_results and answer["status"] == "done":
                self._keep(cell, target)
            shutil.rmtree(target, ignore_errors=True)
            shutil.rmtree(run_folder(target), ignore_errors=True)
            times.add(answer)
            left = times.left(list(waiting_for.values()), jobs=jobs)
            finished = len(cells) - len(waiting_for)
            log.info("[%d/%d] %s; about %s left", finished, len(cells), _say(answer), duration(left))

    def _keep(self, cell: Cell, result: Path) -> None:
        place = self.folder / "results" / cell.model.name.replace("/", "--")
        place /= f"{cell.recipe}-{cell.router}-{cell.removed:g}-seed{cell.seed}"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        result.rename(place)

    def _write(self, cells: Sequence[Mapping[str, Any]], *, computed: int) -> Bench:
        """Write tables, results and plot."""
        cards = {model.name: Scorecard.load(self._original_file(model)) for model in self.models}
        originals = [
            Original.of(Checkpoint.open(model.path, allow_pickle=True), cards[model.name]) for model in self.models
        ]
        rows = summarize(cells, cards)
        table = tables(originals, rows, cells)
        with atomic_path(self.folder / TABLE) as temporary:
            temporary.write_text(table, encoding="utf-8")
        write_json(
            self.folder / RESULTS,
            {
                "settings": asdict(self.settings)
                | {name: source_name(getattr(self.settings, name)) for name in ("text", "test")},
                "code": code_version(),
                "environment": environment(torch.device(self.settings.device), torch.float32) | {"threads": 1},
                "originals": [asdict(original) for original in originals],
                "rows": [row.to_json() for row in rows],
                "cells": list(cells),
            },
        )
        with atomic_path(self.folder / PLOT) as temporary:
            temporary.write_text(draw_svg(originals, rows), encoding="utf-8")
        draw_png(originals, rows, self.folder / PLOT.replace(".svg", ".png"))
        return Bench(out=self.folder, cells=tuple(cells), originals=cards, table=table, computed=computed,
            summary=tables(originals, rows, cells, domains=False))  # fmt: skip


def _is_open(entry: Mapping[str, Any] | None) -> bool:
    """Tell whether a cell is to be computed: it was not, it failed, or memory was short, which it need not be now."""
    if entry is None or entry["status"] == "failed":
        return True
    return bool(entry["status"] == "infeasible" and entry["error"] == NotEnoughMemory.__name__)


def _say(entry: Mapping[str, Any]) -> str:
    """Return one line about a finished cell."""
    name = f"{entry['model']} {entry['method']} -{100 * entry['removed']:g} % seed {entry['seed']}"
    if entry["status"] != "done":
        return f"{name}: {entry['status']}: {entry['reason']}"
    seconds = entry["seconds"]
    damage = "-" if entry["kl"] is None else f"{entry['kl']:.4f}"
    took = f"{seconds['compress']:.1f} + {seconds['evaluate']:.1f} s"
    return f"{name}: KL {damage}, {format_bytes(entry['bytes'])}, {took}"
