"""Upload a result that is there already: compress, evaluate, write the card, then publish.

from coterie import push

push("small", "owner/small")
"""

from __future__ import annotations

from pathlib import Path

from coterie.errors import InputError
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.manifest import MANIFEST, Manifest
from coterie.paths import user_path
from coterie.publish.hub import check_id, find_destination, upload


def push(out: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a result to the model hub, its card included; nothing that others uploaded is overwritten.

    Given again it goes on with an upload that broke off, and sends what changed, such as a card with what was measured.

    Args:
        out: the folder of a result of `coterie.compress`.
        repo_id: ``owner/name`` of the repository, or ``name`` of one's own; it is made where it is not there.
        private: whether it is made a private one.

    Returns:
        The address of the repository.

    Raises:
        InputError: `out` is no result of Coterie, or the id cannot be one.
        HubError: no token, no right to write there, another content there, or the hub cannot be reached.
    """
    check_id(repo_id)
    folder = result_folder(out)
    Checkpoint.open(folder)
    destination = find_destination(repo_id, private=private, folder=folder)
    assert destination is not None
    return upload(folder, destination)


def result_folder(out: str | Path) -> Path:
    """Return the folder of a result; raises InputError where Coterie did not make it."""
    folder = user_path(out)
    if Manifest.read(folder) is None:
        raise InputError(
            f"{folder} holds no {MANIFEST}, so it is no result of coterie compress; name the folder of one"
        )
    return folder
