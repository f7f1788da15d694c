"""Foretell a profile: the memory, time and disk that it would take. Nothing is written.

from coterie.profile.dry_run import dry_run

print(dry_run("model", "profile", text="text/calibration").seconds)
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from coterie.outputs import free_space
from coterie.profile.outlook import Outlook, measured_pace, profile_disk, scaled
from coterie.profile.run import prepare, profile
from coterie.profile.self_text import SELF


def dry_run(model: str | Path, out: str | Path | None = None, **settings: Any) -> Outlook:
    """Say what `coterie.profile` with the same arguments would take, and do nothing of it.

    Args:
        model: a model folder or hub id.
        out: folder for the profile; None where it would be held in memory.
        settings: all other arguments of `coterie.profile`.

    Raises:
        TypeError: no such argument, or no text.
        CoterieError: as `coterie.profile`, for everything that can be known beforehand.
    """
    arguments = inspect.signature(profile).bind(model, out, **settings)
    arguments.apply_defaults()
    prepared = prepare(**arguments.arguments, dry=True)
    stream, layers, measure = prepared.stream, prepared.layers, prepared.measure
    ids_BS = next(measure.token_set.batches(measure.batch_size))[1]
    pace = measured_pace(stream, layers, ids_BS, limit=prepared.limit, measure=measure)
    unwritten = "; without the time that writing the text takes" * (str(settings["text"]) == SELF)
    place = Path.cwd() if prepared.target is None else prepared.target.parent
    return Outlook(
        memory=prepared.forecast, times=scaled([prepared.time], pace), basis=pace.basis + unwritten,
        disk={"the profile": 0 if prepared.target is None else profile_disk(stream, layers, measure)},
        free=free_space(place)[1],
    )  # fmt: skip
