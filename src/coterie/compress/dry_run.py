"""Foretell a compression: what would be written, and the memory, time and disk that it would take. Nothing is written.

from coterie.compress.dry_run import dry_run

foretold = dry_run("model", "small", keep=0.5, text="text/calibration")
print(foretold.plan.predicted_bytes, foretold.outlook.seconds)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from coterie.compress.apply import compress, prepared
from coterie.compress.plan import Plan
from coterie.compress.prepare import Job, Options
from coterie.outputs import free_space
from coterie.profile.outlook import Outlook, measured_pace, profile_disk, scaled
from coterie.profile.text import UnwrittenText
from coterie.publish.hub import find_destination


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """What a compression would do and take.

    Attributes:
        plan: what each layer would become; to the byte. Experts are named where a profile is there.
        outlook: what it would take.
        left_out: why steps of the recipe on the whole result, or its check, would be left out, by name.
    """

    plan: Plan
    outlook: Outlook
    left_out: Mapping[str, str]

    def content(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return {"plan": self.plan.body(), **self.outlook.content(), "left_out": dict(self.left_out)}


def dry_run(model: str | Path, out: str | Path, **settings: Any) -> DryRun:
    """Say what `coterie.compress` with the same arguments would write and take, and do nothing of it.

    All is checked that can be checked beforehand, and refused in the same words.

    Args:
        model: a model folder or hub id.
        out: folder for the result.
        settings: all other arguments of `coterie.compress`.

    Raises:
        TypeError: no such argument.
        CoterieError: as `coterie.compress`, for everything that can be known beforehand.
    """
    arguments = inspect.signature(compress).bind(model, out, **settings)
    arguments.apply_defaults()
    asked = arguments.arguments
    find_destination(asked.pop("push_to_hub"), private=asked.pop("private"))
    options = replace(Options.of(**asked), dry=True)
    with prepared(options) as job:
        layers = job.source.architecture.layers
        pace = measured_pace(job.stream, layers, _batch(job), limit=options.limit, measure=job.measure)
        unwritten = "; without the time that writing the text takes" * isinstance(job.calibration, UnwrittenText)
        outlook = Outlook(
            memory=job.forecast, times=scaled(job.times, pace), basis=pace.basis + unwritten, disk=_disk(job),
            free=free_space(options.out.parent)[1],
        )  # fmt: skip
        return DryRun(plan=job.planned, outlook=outlook, left_out=job.left_out)


def _batch(job: Job) -> torch.Tensor:
    """Return a batch of token ids (B, S) to try: of the text, or random ones where only a profile is there."""
    if job.measure is not None:
        return next(job.measure.token_set.batches(job.measure.batch_size))[1]
    vocab_size = int(job.stream.model.config.get_text_config().vocab_size)
    seq_len = job.profile.seq_len if job.profile is not None else job.options.seq_len
    return torch.randint(vocab_size, (1, seq_len), generator=torch.Generator().manual_seed(0))


def _disk(job: Job) -> dict[str, int]:
    """Return the bytes that are written, by what they are: the result, and what is there while it is made."""
    disk = {"the result": job.outline.predicted_bytes}
    if job.measure is not None and job.options.inputs == "original":
        what = "the profile" if job.profile_folder is not None else "the profile, while it is made"
        disk[what] = profile_disk(job.stream, job.source.architecture.layers, job.measure)
    if job.search is not None:
        disk |= job.search.forecast.disk()
    for step in job.result_steps.values():
        if step is not None:
            disk |= step.disk
    return disk
