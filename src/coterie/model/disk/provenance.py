"""Provenance: what a result was made from and how, as far as its card says so and the rest of the manifest does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coterie.fields import Fields, plain_content

_TEXTS = (
    "model_id", "license", "license_name", "license_link", "pipeline_tag", "text", "recipe_summary", "recipe_paper",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What is known of the original, of the recipe and of the command; None or nothing where it is not.

    No path of the machine is in it: of folders only the last name.

    Attributes:
        model_id: hub id of the original.
        license, license_name, license_link: as the original's card says them.
        languages: the same.
        pipeline_tag: the same.
        text: last name of the folder of calibration text, or "self" for text that the model wrote.
        recipe_summary: what the recipe does, in a line.
        recipe_paper: arXiv number, or name, of its paper.
        commands: the commands that make the result again.
        active_before: parameters of the original that one token uses.
        active_after: parameters of the result that one token uses.
    """

    model_id: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    text: str | None = None
    recipe_summary: str | None = None
    recipe_paper: str | None = None
    commands: tuple[str, ...] = ()
    active_before: int | None = None
    active_after: int | None = None

    def content(self) -> Mapping[str, Any]:
        """Return it as JSON content."""
        return {name: plain_content(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_fields(cls, fields: Fields) -> Provenance:
        """Read it strictly."""
        with fields.all_read():
            said: dict[str, Any] = {name: None if fields.null(name) else fields.text(name) for name in _TEXTS}
            for name in ("active_before", "active_after"):
                said[name] = None if fields.null(name) else fields.whole(name)
            return cls(**said, languages=fields.texts("languages"), commands=fields.texts("commands"))
