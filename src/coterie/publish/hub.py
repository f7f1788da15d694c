"""A result's way to the model hub: asked for before hours of work, walked once the result is whole.

A repository that others wrote to stays as it is: one must be new, empty, or hold the very result that is uploaded,
which its ``coterie.json`` says. That file is therefore sent first, so that an upload that broke off goes on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError, HubError, InputError
from coterie.model.disk.files import is_hub_id
from coterie.model.disk.manifest import MANIFEST

log = logging.getLogger(__name__)

#: What a run took: beside the manifest, since it differs between two runs that give the same result. It stays here.
RUN_FILE = "coterie-run.json"

_LONGEST_ID = 96

_NOT_SENT = [RUN_FILE, ".*", "*/.*"]
_OF_THE_HUB = frozenset((".gitattributes",))  # in a new repository


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """A repository on the hub that a result may be uploaded to.

    Attributes:
        repo_id: its id with its owner.
        private: whether it is made a private one.
        exists: whether it is there already, empty or with the same result in it.
    """

    repo_id: str
    private: bool
    exists: bool


def find_destination(repo_id: str | None, *, private: bool = False, folder: Path | None = None) -> Destination | None:
    """Return the repository for an id, or None for None; nothing is written, the hub is only asked.

    Args:
        repo_id: ``owner/name``, or ``name`` of one's own.
        private: whether it is to be a private one.
        folder: the result, whose repository may hold it already; None before there is one.

    Raises:
        InputError: no id, or private without one.
        HubError: no token, or one that may not write there; the repository holds something else, or is public where a
            private one is asked for; the hub cannot be reached.
    """
    if repo_id is None:
        if private:
            raise InputError("--private is about the repository on the hub: name one with --push-to-hub")
        return None
    check_id(repo_id)
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    with _hub_errors(f"asking the hub about {repo_id}"):
        if get_token() is None:
            raise HubError(
                f"there is no token for the hub, so nothing can be uploaded to {repo_id}: run `hf auth login`, or set "
                "HF_TOKEN to a token that may write"
            )
        api = HfApi()
        me = api.whoami()
        owned = repo_id if "/" in repo_id else f"{me['name']}/{repo_id}"
        _check_rights(me, owned)
        try:
            info = api.model_info(owned)
        except RepositoryNotFoundError:
            return Destination(repo_id=owned, private=private, exists=False)
        if private and not info.private:
            raise HubError(f"{owned} is public, and stays so: leave --private out, or choose another id")
        names = [sibling.rfilename for sibling in info.siblings or () if sibling.rfilename not in _OF_THE_HUB]
        if names and not (folder is not None and MANIFEST in names and _has_manifest(api, owned, folder)):
            raise HubError(
                f"{owned} exists and holds {len(names)} files ({', '.join(sorted(names)[:3])} ...) that are not of "
                "this result; they are not overwritten: choose another id, or remove the repository"
            )
        return Destination(repo_id=owned, private=private, exists=True)


def check_id(repo_id: str) -> None:
    """Raise InputError for what cannot be the id of a repository."""
    if not is_hub_id(repo_id, owner=False) or len(repo_id) > _LONGEST_ID:
        raise InputError(
            f"{repo_id!r:.120} is no id of a repository on the hub; it has the form owner/name, with letters, digits, "
            f"'-', '_' and '.', and {_LONGEST_ID} characters at most"
        )


def upload(folder: Path, destination: Destination) -> str:
    """Upload a result and return the address of its repository; run again, it goes on where it broke off.

    Left out are hidden files and ``coterie-run.json``, which is about the machine.

    Raises:
        HubError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    with _hub_errors(f"uploading {folder} to {destination.repo_id}"):
        api = HfApi()
        private = True if destination.private else None
        url = api.create_repo(destination.repo_id, private=private, exist_ok=True, repo_type="model")
        # The first file says what all others are of.
        for allowed in ([MANIFEST], None):
            api.upload_folder(
                repo_id=destination.repo_id, folder_path=folder, repo_type="model", allow_patterns=allowed,
                ignore_patterns=list(_NOT_SENT), commit_message="Upload a result of Coterie",
            )  # fmt: skip
    log.info("%s is on the hub: %s", folder, url)
    return str(url)


def upload_result(folder: Path, destination: Destination) -> str:
    """Upload a result that was just made; where that fails, say that the result is there and how to go on."""
    try:
        return upload(folder, destination)
    except HubError as error:
        private = " --private" if destination.private else ""
        raise HubError(
            f"{folder} is whole, but was not uploaded: {error}; give `coterie push {folder} {destination.repo_id}"
            f"{private}` to upload it"
        ) from None


def _check_rights(me: Mapping[str, Any], repo_id: str) -> None:
    owner = repo_id.partition("/")[0]
    owners = [me["name"], *(entry.get("name") for entry in me.get("orgs") or ())]
    if owner not in owners:
        raise HubError(
            f"{me['name']} cannot write to {repo_id}: the owner is neither that user nor one of their organisations "
            f"({', '.join(map(str, owners[1:])) or 'none'})"
        )
    token = (me.get("auth") or {}).get("accessToken") or {}
    rights = token.get("fineGrained") or {}
    scopes = [scope for scope in rights.get("scoped") or () if (scope.get("entity") or {}).get("name") == owner]
    writes = any("repo.write" in (scope.get("permissions") or ()) for scope in scopes)
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and rights and not writes):
        raise HubError(f"the token for the hub may not write to {owner}; make one that may, and set HF_TOKEN to it")


def _has_manifest(api: Any, repo_id: str, folder: Path) -> bool:
    """Tell whether the manifest in a repository is that of a result; git names content by its digest."""
    content = (folder / MANIFEST).read_bytes()
    there = api.get_paths_info(repo_id, [MANIFEST])
    if not there:
        return False
    if there[0].lfs is not None:
        return bool(there[0].lfs.sha256 == hashlib.sha256(content).hexdigest())
    return bool(there[0].blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


@contextmanager
def _hub_errors(doing: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into HubError in one line."""
    try:
        yield
    except (CoterieError, KeyboardInterrupt):
        raise
    except Exception as error:
        # The client, its transport and its storage back end have no common root of their errors.
        text = " ".join(str(error).split())
        raise HubError(f"{doing} failed ({type(error).__name__}): {text[:500]}") from error
