"""Every exception that Coterie raises on purpose.

The tree; catch the root to catch them all::

    CoterieError
    ├── InputError (ValueError)       something that the user handed over is wrong
    │   ├── NotACheckpoint            the path holds no checkpoint that is read
    │   ├── NotAMoE                   a checkpoint, but without routed experts
    │   ├── CorruptCheckpoint         truncated, missing or overlapping data in a checkpoint
    │   ├── UnsupportedDtype          tensors in a number format that cannot be compressed
    │   ├── TextError                 no text, empty text, text shorter than one sequence
    │   ├── UnknownName               a recipe, statistic, pass or domain that does not exist
    │   ├── OutputExists              the place for the result is taken
    │   └── OutputBusy                another process makes the result at this moment
    ├── Infeasible (ValueError)       a target that no plan can meet; names the nearest one that can be met
    │   └── NotEnoughMemory           more memory than is allowed or free; another time it may do
    ├── ArchitectureMismatch          a layer does not compute what Coterie believes it computes
    ├── ReloadMismatch                what was written does not load as what was computed
    ├── CorruptArtifact               an artefact of ours that is damaged
    ├── HubError                      the model hub cannot be reached, or refuses
    ├── ReadError (OSError)           the disk does not give the bytes that it holds; another time it may
    ├── Cancelled                     what was called off before it was done
    ├── StaleArtifact                 an artefact that belongs to another model, text or version
    └── OutOfSpace (OSError)          the disk cannot hold the result
"""

import difflib
from collections.abc import Iterable


class CoterieError(Exception):
    """Root of all errors raised on purpose; its text says what, where, the numbers and the way out."""


class InputError(CoterieError, ValueError):
    """Something that the user handed over is wrong."""


class NotACheckpoint(InputError):
    """The path holds no checkpoint that is read."""


class NotAMoE(InputError):
    """The checkpoint has no routed experts."""


class CorruptCheckpoint(InputError):
    """A checkpoint with truncated, missing or overlapping data."""


class UnsupportedDtype(InputError):
    """Tensors in a number format that cannot be compressed."""


class TextError(InputError):
    """No text, empty text, or text shorter than one sequence."""


class UnknownName(InputError):
    """A name that no table holds; the message carries the nearest names."""

    def __init__(self, what: str, name: str, names: Iterable[str]) -> None:
        choices = sorted(names)
        near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from: {', '.join(choices)}"
        super().__init__(f"unknown {what} {name!r}; {hint}")
        self.nearest = near


class OutputExists(InputError):
    """The place for the result is taken."""


class OutputBusy(InputError):
    """Another process makes the result at this moment."""


class Infeasible(CoterieError, ValueError):
    """A target that no plan can meet."""


class NotEnoughMemory(Infeasible):
    """It takes more memory than is allowed or free; another time, or with another limit, it may do."""


class ArchitectureMismatch(CoterieError):
    """A layer does not compute what Coterie believes it computes."""


class ReloadMismatch(CoterieError):
    """What was written does not load as what was computed."""


class CorruptArtifact(CoterieError):
    """An artefact of ours that is damaged."""


class HubError(CoterieError):
    """The model hub cannot be reached, or refuses what is asked of it."""


class ReadError(CoterieError, OSError):
    """The disk does not give the bytes that it holds; another time it may."""


class Cancelled(CoterieError):
    """What was asked for was called off before it was done."""


class StaleArtifact(CoterieError):
    """An artefact that belongs to another model, text or version."""


class OutOfSpace(CoterieError, OSError):
    """The disk cannot hold the result."""
