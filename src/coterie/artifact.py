"""Artefacts: versioned JSON, with tensors beside it, that carry the digests of what they were made from.

An artefact named ``profile`` in a folder is ``profile.json`` and, when it holds tensors, ``profile.safetensors``.
The JSON is the artefact's commit: it is written last, atomically, and records the digest of the tensors, those of any
other files that belong to it, and its own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.errors import CorruptArtifact, OutOfSpace, StaleArtifact
from coterie.fields import Fields, shown

if TYPE_CHECKING:
    import torch

#: Format 1 had a digest of the body alone, under the name ``body_digest``; it is still read.
FORMAT = 2


#: Longest line of an artefact's JSON, where what it holds can be cut.
_LINE = 100

#: Lists and objects within each other at most; ours have a few.
_DEPTH = 100

#: What an artefact's JSON must say, and what it may say as well.
_PARTS = {"kind": str, "format": int, "inputs": dict, "body": dict}
_OTHERS = ("coterie", "files", "tensors", "tensors_digest", "digest", "body_digest")


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """An artefact as it was read, checked against its digests.

    Attributes:
        body: what it says.
        inputs: digest of every input that it was made from, by name.
        tensors: its tensors by name, empty when there are none.
        files: other files beside the JSON that belong to it: name -> SHA-256. They are not read, see `check_file`.
        edited: whether the JSON was changed since it was written; such an artefact is read only where that is allowed.
    """

    body: dict[str, Any]
    inputs: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor]
    files: Mapping[str, str]
    edited: bool = False


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`.

    Once the block is left, `path` survives a crash of the machine. On an exception the temporary file is removed and
    `path` is as it was.

    Raises:
        OutOfSpace: the disk filled up.
    """
    temporary: Path | None = None
    # mkstemp is private by default; results get the permissions that any other new file would get.
    mask = os.umask(0)
    os.umask(mask)
    try:
        with full_disk(f"{path} was written; it was left as it was"):
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            temporary = Path(name)
            os.close(handle)
            yield temporary
            sync(temporary)
            temporary.chmod(0o666 & ~mask)
            temporary.replace(path)
            sync(path.parent)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def full_disk(meanwhile: str) -> Iterator[None]:
    """Raise OutOfSpace ("the disk filled up while ...") in place of the errors that mean it."""
    try:
        yield
    except Exception as error:
        if is_full_disk(error):
            raise OutOfSpace(errno.ENOSPC, f"the disk filled up while {meanwhile}") from error
        raise


def is_full_disk(error: Exception) -> bool:
    """Tell whether an error means a full disk; safetensors puts the system's error into words."""
    if isinstance(error, OutOfSpace):
        return False
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"(os error {errno.ENOSPC})" in str(error) or f"(os error {errno.EDQUOT})" in str(error)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _readable(content: Any, indent: int = 0, start: int = 0) -> str:
    """Return JSON for people to read and edit: what fits stands on one line, all else an entry a line.

    Args:
        content: anything that JSON can hold.
        indent: columns in front of the line that it begins on.
        start: column that it begins in.
    """
    line = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, dict | list | tuple) or start + len(line) <= _LINE:
        return line
    deeper = " " * (indent + 2)
    if isinstance(content, dict):
        # Through JSON, so that a key is written as JSON writes it.
        pairs = [(json.dumps(name, ensure_ascii=False), value) for name, value in json.loads(line).items()]
        entries = [f"{name}: {_readable(value, indent + 2, indent + 4 + len(name))}" for name, value in pairs]
        first, last = "{", "}"
    else:
        entries = [_readable(value, indent + 2, indent + 2) for value in content]
        first, last = "[", "]"
    return f"{first}\n{deeper}" + f",\n{deeper}".join(entries) + f"\n{' ' * indent}{last}"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a whole file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(content: Any) -> str:
    """Return the SHA-256 of anything that JSON can hold; equal content has an equal digest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


_NOT_SET = object()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return in words what differs, "a.b was 1, now it is 2", with long values shortened.

    Args:
        old: anything that JSON can hold; nested entries get dotted names.
        new: the same.
    """
    before, after = _flat(old), _flat(new)
    pairs = {name: (before.get(name, _NOT_SET), after.get(name, _NOT_SET)) for name in (after | before)}
    return [f"{name} was {_short(a)}, now it is {_short(b)}" for name, (a, b) in pairs.items() if a != b]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def _short(value: object) -> str:
    if value is _NOT_SET:
        return "not set"
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value[:12]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_artifact(
    path: Path,
    *,
    kind: str,
    body: Mapping[str, Any],
    inputs: Mapping[str, str],
    tensors: Mapping[str, torch.Tensor] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write an artefact: the JSON file `path`, and its tensors in the same place with the suffix ``.safetensors``.

    Args:
        path: the JSON file to write; its folder is made when missing.
        kind: the noun ("profile", "plan", "scorecard", "manifest").
        body: what the artefact says; anything that JSON can hold.
        inputs: digest of every input that it was made from, by name.
        tensors: tensors by name, or None.
        files: other files beside it that belong to it, name -> SHA-256 (see `file_digest`); they are there already.

    Raises:
        ValueError: a name in `files` is no plain file name.
        OutOfSpace: the disk filled up; an artefact that was there before is as it was.
    """
    from coterie import __version__

    for name in files or {}:
        if not _is_plain_name(name):
            raise ValueError(f"{name!r} is no name of a file beside {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "coterie": __version__,
        "kind": kind,
        "format": FORMAT,
        "inputs": dict(inputs),
        "body": dict(body),
    }
    if files:
        document["files"] = dict(files)
    if tensors is None:
        with atomic_path(path) as temporary:
            temporary.write_text(_readable(_with_digest(document)) + "\n", encoding="utf-8")
        return
    from safetensors.torch import save_file

    tensor_path = path.with_suffix(".safetensors")
    # Both files are written before either takes its place, so a full disk leaves the artefact that was there.
    with atomic_path(path) as temporary, atomic_path(tensor_path) as temporary_tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary_tensors)
        document["tensors"] = tensor_path.name
        document["tensors_digest"] = file_digest(temporary_tensors)
        temporary.write_text(_readable(_with_digest(document)) + "\n", encoding="utf-8")


def _with_digest(document: Mapping[str, Any]) -> dict[str, Any]:
    return {**document, "digest": digest_of(document)}


def read_artifact(
    path: Path, *, kind: str, inputs: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read an artefact's body and tensors; see `open_artifact` for arguments and errors."""
    artifact = open_artifact(path, kind=kind, inputs=inputs)
    return artifact.body, dict(artifact.tensors)


def open_artifact(path: Path, *, kind: str, inputs: Mapping[str, str] | None = None, edited: bool = False) -> Artifact:
    """Read an artefact and check that it is whole and made from what the caller has.

    Args:
        path: the JSON file.
        kind: the noun that is expected.
        inputs: digests that the artefact must carry, by name; names that are not given are not checked.
        edited: read one whose JSON was changed by hand as well; its reader checks what it says.

    Raises:
        CorruptArtifact: missing, not JSON, of another kind, or its content does not match its digest.
        StaleArtifact: an input digest differs, or the format is newer than this version reads.
    """
    document = read_header(path, edited=edited)
    if document["kind"] != kind:
        raise CorruptArtifact(f"{path} is a {shown(document['kind'])}, not a {kind}")
    for name, digest in (inputs or {}).items():
        recorded = document["inputs"].get(name)
        if recorded != digest:
            raise StaleArtifact(
                f"{path} was made from another {name} (it has {shown(str(recorded)[:12])}, this one is {digest[:12]}); "
                f"make the {kind} again, or pass the {name} that it was made from"
            )
    tensors: dict[str, torch.Tensor] = {}
    if "tensors" in document:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        name = document["tensors"]
        if not _is_plain_name(name) or Path(name).suffix != ".safetensors":
            raise CorruptArtifact(f"{path} names {shown(repr(name))} as the file of its tensors, which cannot be")
        check_file(path.parent, name, str(document.get("tensors_digest")), owner=path.name)
        try:
            tensors = load_file(path.with_name(name))
        except SafetensorError as error:
            raise CorruptArtifact(f"{path.with_name(name)} holds no tensors ({error}); make the {kind} again") from None
    files = document.get("files", {})
    if not isinstance(files, dict) or not all(
        _is_plain_name(name) and isinstance(digest, str) for name, digest in files.items()
    ):
        raise CorruptArtifact(f"{path} names {files!r:.80} as the files that belong to it, which cannot be")
    return Artifact(
        body=document["body"], inputs=document["inputs"], tensors=tensors, files=files, edited=not _is_whole(document)
    )


def check_file(folder: Path, name: str, digest: str, *, owner: str = "the artefact") -> None:
    """Check a file that belongs to an artefact, by the whole of its bytes.

    Args:
        folder: where it is.
        name: its name.
        digest: the SHA-256 that it must have.
        owner: who needs it, for the message.

    Raises:
        CorruptArtifact: it is missing or its bytes are others.
    """
    file = folder / name
    if not file.is_file():
        raise CorruptArtifact(f"{file} is missing; {owner} needs it")
    if file_digest(file) != digest:
        raise CorruptArtifact(f"{file}: the bytes do not match the digest in {owner}; it is damaged")


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\\" not in name


def read_header(path: Path, *, edited: bool = False) -> dict[str, Any]:
    """Read an artefact's JSON document without its tensors, checked against its digest unless it may be `edited`.

    Raises:
        CorruptArtifact: missing, not JSON, no artefact, or its content does not match its digest.
        StaleArtifact: the format is newer than this version reads.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptArtifact(f"{path} does not exist") from None
    except IsADirectoryError:
        raise CorruptArtifact(f"{path} is a folder, not an artefact's JSON file") from None
    except (ValueError, RecursionError) as error:  # what is no UTF-8 too, and whole numbers of thousands of digits
        raise CorruptArtifact(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or not all(isinstance(document.get(key), kind) for key, kind in _PARTS.items()):
        raise CorruptArtifact(f"{path} is JSON, but no artefact of coterie")
    if _is_deeper(document, _DEPTH):
        raise CorruptArtifact(f"{path}: lists and objects lie more than {_DEPTH} deep in each other")
    if type(document["format"]) is not int or document["format"] < 1:
        raise CorruptArtifact(f"{path} has format {shown(repr(document['format']))}, expected a whole number from 1 on")
    if document["format"] > FORMAT:
        raise StaleArtifact(
            f"{path} has format {shown(document['format'])}; this version reads up to {FORMAT}: upgrade coterie"
        )
    try:
        whole = _is_whole(document)
    except UnicodeEncodeError:
        raise CorruptArtifact(f"{path} holds half of a surrogate pair, which is no text") from None
    if not edited and not whole:
        raise CorruptArtifact(f"{path}: the content does not match its digest; the file was changed or damaged")
    fields = Fields(document, where=str(path))
    with fields.all_read():
        inputs = fields.nested("inputs")
        for name in inputs.names():
            inputs.text(name)
        fields.text("coterie")
        fields.ignore(*_PARTS, *_OTHERS)
    return document


def _is_deeper(content: object, depth: int) -> bool:
    """Tell whether lists and objects lie more than `depth` deep in each other, without going deep itself."""
    level = [content]
    for _ in range(depth):
        level = [
            inside
            for value in level
            if isinstance(value, dict | list)
            for inside in (value.values() if isinstance(value, dict) else value)
        ]
    return any(isinstance(value, dict | list) for value in level)


def _is_whole(document: Mapping[str, Any]) -> bool:
    """Tell whether the content of an artefact's JSON is what its digest was made from."""
    if document["format"] == 1:
        return bool(document.get("body_digest") == digest_of(document["body"]))
    return bool(document.get("digest") == digest_of({k: v for k, v in document.items() if k != "digest"}))
