"""What all block types share: their scales and codes, and the choice of the number that they are multiples of.

Legend: N matrices, R rows, B columns of a block, S sub-blocks of it, s columns of one, v columns that are coded
together, K bytes of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """What the columns of one block share, for every row.

    Attributes:
        scale_NR: the number that steps are multiples of; float32 that float16 holds.
        factor_NRS: which multiple, by sub-block; whole numbers, as they are stored.
        minimum_NR: the number that minima are multiples of, None where a type has none.
        minimum_factor_NRS: which multiple.
        sign_NRP: what the sign counts that each plane behind the base says, None where a type has no planes of bits.
    """

    scale_NR: Tensor
    factor_NRS: Tensor
    minimum_NR: Tensor | None = None
    minimum_factor_NRS: Tensor | None = None
    sign_NRP: Tensor | None = None

    def of_rows(self, some: slice) -> Scales:
        """Return those of some rows."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return replace(self, **{name: part[:, some] for name, part in parts.items() if part is not None})

    def at(self, place: int) -> Scales:
        """Return those of one sub-block."""
        minima = self.minimum_factor_NRS
        return Scales(
            scale_NR=self.scale_NR,
            factor_NRS=self.factor_NRS[..., place, None],
            minimum_NR=self.minimum_NR,
            minimum_factor_NRS=None if minima is None else minima[..., place, None],
        )

    def where(self, better_NR: Tensor, other: Scales | None) -> Scales:
        """Return these scales in the rows where they are better, elsewhere the others, if there are any."""
        if other is None:
            return self

        def chosen(name: str) -> Any:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is None:
                return None
            return torch.where(better_NR if mine.ndim == better_NR.ndim else better_NR[..., None], mine, theirs)

        return Scales(**{name: chosen(name) for name in self.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True, slots=True)
class Codes:
    """The numbers of some columns, as they are stored.

    Attributes:
        code_NRc: which level of each column, or which entry of the grid of each group of columns; int16.
        negative_NRv: whether each column is negative, None where codes say so themselves.
    """

    code_NRc: Tensor
    negative_NRv: Tensor | None = None


class BlockType(Protocol):
    """A type of blocks: its extents, and what is done with them."""

    @property
    def name(self) -> str:
        """As GGML calls it."""

    @property
    def block(self) -> int:
        """Columns of a block."""

    @property
    def sub_block(self) -> int:
        """Columns that share a step."""

    @property
    def together(self) -> int:
        """Columns that are coded together."""

    @property
    def numbers_at(self) -> slice:
        """Where in a block's bytes the float16 numbers lie that all its values are linear in; nowhere without any."""

    def fit(self, weight_NRB: Tensor, importance_NRB: Tensor) -> Scales:
        """Choose scales so that the error of nearest codes, weighted by importance, is small; all float32."""

    def choose(self, weight_NRv: Tensor, scales: Scales, column: int, metric_Nvv: Tensor) -> tuple[Codes, Tensor]:
        """Choose codes of the columns from `column` of a block on; return them and their values.

        The error of a row e is |e M|^2, with M the metric; for columns that are coded one by one M does not matter.
        """

    def pack(self, scales: Scales, codes: Codes) -> Tensor:
        """Return the bytes (N, R, K) of a block, from scales and the codes of all its columns; uint8."""

    def unpack(self, byte_NRK: Tensor) -> Tensor:
        """Return the values (N, R, B) of blocks, float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wrapped:
    """A type whose blocks run on from one row of a matrix to the next, for rows that are no whole blocks.

    Rows are a multiple of `coterie.model.disk.encodings.ggml.GRAIN` long: columns that share a step, or are coded
    together, are of one row.

    Attributes:
        inner: the type of the blocks.
    """

    inner: BlockType


#: How a matrix lies in blocks: every row in blocks of its own, as GGUF files hold it, or from row to row.
Layout = BlockType | Wrapped


def as_half(value: Tensor) -> Tensor:
    """Return numbers rounded to float16, in float32; those beyond its range are its largest."""
    largest = torch.finfo(torch.float16).max
    return value.clamp(-largest, largest).to(torch.float16).to(torch.float32)


def half_bytes(value_NR: Tensor) -> Tensor:
    """Return the two bytes (N, R, 2) of numbers as float16."""
    return value_NR.to(torch.float16).unsqueeze(-1).contiguous().view(torch.uint8)


def halves(byte_NR2: Tensor) -> Tensor:
    """Return the numbers (N, R) whose float16 bytes these are, float32."""
    return byte_NR2.contiguous().view(torch.float16).squeeze(-1).to(torch.float32)


def no_factors(byte_NRK: Tensor) -> Tensor:
    """Return the factors (N, R, 1) of blocks that have no sub-blocks."""
    return torch.ones((*byte_NRK.shape[:-1], 1), device=byte_NRK.device)


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return the quotient, 0 where there is nothing to divide by."""
    return above / torch.where(below == 0, torch.inf, below)


def join_rows(parts: list[Scales]) -> Scales:
    """Return the scales of rows one below the other."""
    lists = {name: [getattr(part, name) for part in parts] for name in Scales.__dataclass_fields__}
    joined: dict[str, Any] = {name: None if each[0] is None else torch.cat(each, dim=1) for name, each in lists.items()}
    return Scales(**joined)


def join_codes(parts: list[Codes]) -> Codes:
    """Return the codes of columns side by side."""
    signs = [part.negative_NRv for part in parts if part.negative_NRv is not None]
    return Codes(
        code_NRc=torch.cat([part.code_NRc for part in parts], dim=-1),
        negative_NRv=torch.cat(signs, dim=-1) if signs else None,
    )
