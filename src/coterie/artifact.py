"""Artefacts: versioned JSON, with tensors beside it, that carry the digests of what they were made from.

An artefact named ``profile`` in a folder is ``profile.json`` and, when it holds tensors, ``profile.safetensors``.
The JSON is the artefact's commit: it is written last, atomically, and records the digest of the tensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.errors import CorruptArtifact, OutOfSpace, StaleArtifact

if TYPE_CHECKING:
    import torch

FORMAT = 1


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`.

    On an exception the temporary file is removed and `path` is as it was.

    Raises:
        OutOfSpace: the disk filled up.
    """
    temporary: Path | None = None
    # mkstemp is private by default; results get the permissions that any other new file would get.
    mask = os.umask(0)
    os.umask(mask)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except Exception as error:
        if _is_full_disk(error):
            raise OutOfSpace(
                errno.ENOSPC, f"the disk filled up while {path} was written; it was left as it was"
            ) from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _is_full_disk(error: Exception) -> bool:
    """Tell whether an error means a full disk; safetensors puts the system's error into words."""
    if isinstance(error, OutOfSpace):
        return False
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"(os error {errno.ENOSPC})" in str(error) or f"(os error {errno.EDQUOT})" in str(error)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(_json_text(content), encoding="utf-8")


def _json_text(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a whole file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(content: Any) -> str:
    """Return the SHA-256 of anything that JSON can hold; equal content has an equal digest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_artifact(
    path: Path,
    *,
    kind: str,
    body: Mapping[str, Any],
    inputs: Mapping[str, str],
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write an artefact: the JSON file `path`, and its tensors in the same place with the suffix ``.safetensors``.

    Args:
        path: the JSON file to write; its folder is made when missing.
        kind: the noun ("profile", "plan", "scorecard", "manifest").
        body: what the artefact says; anything that JSON can hold.
        inputs: digest of every input that it was made from, by name.
        tensors: tensors by name, or None.

    Raises:
        OutOfSpace: the disk filled up; an artefact that was there before is as it was.
    """
    from coterie import __version__

    path.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "coterie": __version__,
        "kind": kind,
        "format": FORMAT,
        "inputs": dict(inputs),
        "body": dict(body),
    }
    document["body_digest"] = digest_of(document["body"])
    if tensors is None:
        write_json(path, document)
        return
    from safetensors.torch import save_file

    tensor_path = path.with_suffix(".safetensors")
    # Both files are written before either takes its place, so a full disk leaves the artefact that was there.
    with atomic_path(path) as temporary, atomic_path(tensor_path) as temporary_tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary_tensors)
        document["tensors"] = tensor_path.name
        document["tensors_digest"] = file_digest(temporary_tensors)
        temporary.write_text(_json_text(document), encoding="utf-8")


def read_artifact(
    path: Path, *, kind: str, inputs: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read an artefact and check that it is whole and made from what the caller has.

    Args:
        path: the JSON file.
        kind: the noun that is expected.
        inputs: digests that the artefact must carry, by name; names that are not given are not checked.

    Returns:
        The body and the tensors (empty when there are none).

    Raises:
        CorruptArtifact: missing, not JSON, of another kind, or its content does not match its digest.
        StaleArtifact: an input digest differs, or the format is newer than this version reads.
    """
    document = read_header(path)
    if document["kind"] != kind:
        raise CorruptArtifact(f"{path} is a {document['kind']}, not a {kind}")
    for name, digest in (inputs or {}).items():
        found = document["inputs"].get(name)
        if found != digest:
            raise StaleArtifact(
                f"{path} was made from another {name} (it has {str(found)[:12]}, this one is {digest[:12]}); "
                f"make the {kind} again, or pass the {name} that it was made from"
            )
    if digest_of(document["body"]) != document["body_digest"]:
        raise CorruptArtifact(f"{path}: the content does not match its digest; the file was changed or damaged")
    tensors: dict[str, torch.Tensor] = {}
    if "tensors" in document:
        from safetensors.torch import load_file

        name = document["tensors"]
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != ".safetensors":
            raise CorruptArtifact(f"{path} names {name!r} as the file of its tensors, which cannot be")
        tensor_path = path.with_name(name)
        if not tensor_path.is_file():
            raise CorruptArtifact(f"{tensor_path} is missing; {path} needs it")
        if file_digest(tensor_path) != document.get("tensors_digest"):
            raise CorruptArtifact(f"{tensor_path}: the bytes do not match the digest in {path.name}; it is damaged")
        tensors = load_file(tensor_path)
    return document["body"], tensors


def read_header(path: Path) -> dict[str, Any]:
    """Read an artefact's JSON document without its tensors; raise CorruptArtifact or StaleArtifact if unreadable."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptArtifact(f"{path} does not exist") from None
    except IsADirectoryError:
        raise CorruptArtifact(f"{path} is a folder, not an artefact's JSON file") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptArtifact(f"{path} is not JSON: {error}") from None
    parts = {"kind": str, "format": int, "inputs": dict, "body": dict, "body_digest": str}
    if not isinstance(document, dict) or not all(isinstance(document.get(key), kind) for key, kind in parts.items()):
        raise CorruptArtifact(f"{path} is JSON, but no artefact of coterie")
    if document["format"] > FORMAT:
        raise StaleArtifact(
            f"{path} has format {document['format']}; this version reads up to {FORMAT}: upgrade coterie"
        )
    return document
