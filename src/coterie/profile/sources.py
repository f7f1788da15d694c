"""Sources of text: from what ``--text`` names to the documents of each domain. No torch here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coterie.errors import InputError, TextError, UnknownName
from coterie.model.disk.files import is_hub_id
from coterie.paths import user_path
from coterie.profile.data_sets import DataSet, is_data_set_name, local_place
from coterie.profile.documents import check_name, document_pieces, text_files
from coterie.profile.rows import Document, document_of
from coterie.profile.shares import checked_weights

#: Which tokens count in statistics and in losses: all, or those of answers.
On = Literal["all", "assistant"]

#: Tokens at the begin of a data set of the hub that are read; such a set may be larger than any disk.
HUB_TOKENS = 2**23


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The text of one domain.

    Attributes:
        origin: where it is from, for messages.
        read: gives its documents.
        limit: tokens that are read of it; None for all.
    """

    origin: str
    read: Callable[[], Iterator[Document]]
    limit: int | None = None


def check_on(on: str) -> None:
    """Raise UnknownName unless it says which tokens count."""
    if on not in ("all", "assistant"):
        raise UnknownName("choice of tokens", on, ("all", "assistant"))


def text_sources(source: str | Path, domains: tuple[str, ...] | None = None, *, on: str = "all") -> dict[str, Source]:
    """Return the text of each domain by name, sorted; nothing is read yet.

    Args:
        source: a text folder, see `coterie.profile.documents`, or ``hf:`` and the name of a data set.
        domains: only these.
        on: which tokens count.

    Raises:
        TextError: no text, or text without answers where only these count.
        UnknownName: a domain that is not there.
    """
    check_on(on)
    if is_data_set_name(source):
        data_set = DataSet.parse(str(source))
        check_name(data_set.domain, "a data set")
        if domains is not None and not domains:
            raise TextError(f"the domain {data_set.domain} was not asked for; name it or leave the choice out")
        for name in domains or ():
            if name != data_set.domain:
                raise UnknownName("domain", name, (data_set.domain,))
        read = functools.partial(_rows, data_set)
        return {data_set.domain: Source(origin=str(source), read=read, limit=HUB_TOKENS)}
    files = text_files(source, domains)
    if on == "assistant":
        for file in files.values():
            if ".txt" in file.suffixes[-2:]:
                raise TextError(f"{file} is plain text, in which nothing is an answer; leave it or --on assistant out")
    return {
        name: Source(origin=str(file), read=functools.partial(document_pieces, file)) for name, file in files.items()
    }


def chosen_sources(
    source: str | Path,
    *,
    tokens: int | None,
    domains: tuple[str, ...] | None,
    weights: Mapping[str, float] | None,
    on: str = "all",
) -> tuple[dict[str, Source], Mapping[str, float]]:
    """Return the text of the domains that are wanted, and the weight of each; see `coterie.profile.calibration`."""
    if weights is None:
        sources = text_sources(source, domains, on=on)
        return sources, dict.fromkeys(sources, 1)
    if domains is not None or tokens is None:
        raise InputError("weights share out a number of tokens, and name the domains: give tokens, and no domains")
    chosen = checked_weights(weights)
    # A domain of weight 0 must be there too.
    text_sources(source, tuple(weights))
    return text_sources(source, tuple(chosen), on=on), chosen


def source_name(source: str | Path) -> str:
    """Return a source of text without the way to it: "self", a folder's last name, or ``hf:`` and a data set's name."""
    if str(source) == "self":
        return "self"
    if not is_data_set_name(source):
        return user_path(source).resolve().name
    place = user_path(local_place(source))
    if not place.exists() and is_hub_id(str(local_place(source)), owner=False):
        return str(source)
    return str(source).replace(str(local_place(source)), place.resolve().name, 1)


def _rows(data_set: DataSet) -> Iterator[Document]:
    return (document_of(row, place, from_table=True) for place, row in data_set.rows())
