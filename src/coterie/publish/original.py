"""What a result's card takes over from the original: its hub id, and its licence, languages and task.

Nothing else of the original's card is carried: parameters, scores and examples in it are those of another model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coterie.model.disk.files import HubId, id_in_cache, is_hub_id
from coterie.paths import user_path

log = logging.getLogger(__name__)

#: Bytes of a card that are looked at.
_CARD_LIMIT = 2**20

#: Characters of a licence, language or task at most; longer ones are none.
_LONGEST = 300

#: First parts of relative paths that look like hub ids, but are what people call their folders.
_FOLDERS = frozenset(
    (
        "checkpoint", "checkpoints", "ckpt", "ckpts", "data", "home", "mnt", "model", "models", "out", "output",
        "outputs", "result", "results", "root", "run", "runs", "save", "saved", "tmp", "weights",
    )
)  # fmt: skip


def hub_id(model: str | Path, folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the hub id of a model, or None where nothing says it.

    Args:
        model: what was asked for: a hub id, or a folder.
        folder: where it is; in the hub's cache the folders above it name the id.
        config: its config.json, whose ``_name_or_path`` may say it.
    """
    asked_for = None if user_path(model).exists() else HubId.of(model)
    if asked_for is not None:
        return asked_for.name
    cached = id_in_cache(folder)
    if cached is not None:
        return cached
    said = config.get("_name_or_path")
    local = not isinstance(said, str) or not is_hub_id(said) or said.partition("/")[0].lower() in _FOLDERS
    return None if local or Path(str(said)).exists() else str(said)


def card_of(folder: Path) -> dict[str, Any]:
    """Return what the card of a model folder says of licence, languages and task; empty where it says nothing usable.

    Keys: license, license_name, license_link, pipeline_tag (texts) and languages (a tuple of them); only those that the
    card says.
    """
    head = read_head(folder / "README.md")
    said: dict[str, Any] = {}
    for name in ("license", "license_name", "license_link", "pipeline_tag"):
        text = _short_text(head.get(name))
        if text is not None:
            said[name] = text
    languages = head.get("language")
    listed = [_short_text(entry) for entry in (languages if isinstance(languages, list) else [languages])]
    if texts := tuple(text for text in listed if text is not None):
        said["languages"] = texts
    return said


def read_head(path: Path) -> dict[str, Any]:
    """Return the YAML at the head of a card; empty where there is no card, or none that can be read."""
    try:
        with path.open("rb") as file:
            text = file.read(_CARD_LIMIT).decode("utf-8", "replace")
    except OSError:
        return {}
    if not text.lstrip("\ufeff").startswith("---"):
        return {}
    from huggingface_hub import ModelCard

    try:
        return dict(vars(ModelCard(text.lstrip("\ufeff"), ignore_metadata_errors=True).data))
    except Exception as error:
        # Whatever is wrong in a stranger's card, it is no reason not to make one of our own.
        log.info("%s: its head cannot be read, so nothing is taken over from it (%s)", path, type(error).__name__)
        return {}


def _short_text(value: Any) -> str | None:
    # YAML reads the language code of Norwegian as false.
    if value is False:
        return "no"
    usable = isinstance(value, str) and value.strip() and value.isprintable() and len(value) <= _LONGEST
    return value.strip() if usable else None
