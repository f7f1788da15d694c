"""Round matrices to a type, column after column; each error may be made good by the columns that follow.

Legend: N matrices, R rows (outputs), C columns (inputs), B columns of a block, v columns coded together, K bytes,
G blocks, c codes of a block.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from coterie.model.disk.encodings.ggml import GRAIN
from coterie.model.disk.encodings.ggml.block_type import Codes, Wrapped, join_codes, join_rows
from coterie.model.threads import each_computed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from coterie.model.disk.encodings.ggml.block_type import BlockType, Layout, Scales


#: Columns that an error reaches at once; those behind them are told of the errors of all of them together.
_NEAR = 32

#: Numbers of a block of columns that are rounded at once, by whether codes are looked up in a grid of some columns:
#: searching it takes hundreds of bytes a number, all else some forty.
NUMBERS_AT_ONCE = {False: 2**19, True: 2**18}

#: Numbers whose scales are fitted at a time on a CPU, where what is computed of them stays in its cache.
_FITTED_AT_ONCE = 2**17

#: Bytes that this takes at most in each thread.
ROUNDING_BYTES = 2**28


def round_to_nearest(weight_NRC: Tensor, importance_NC: Tensor, kind: Layout) -> tuple[Tensor, Tensor]:
    """Round matrices to the nearest numbers, scales fitted by the importance of columns; see `round_columns`.

    Raises:
        ValueError: columns that are no whole blocks.
    """
    return round_columns(weight_NRC, importance_NC.to(torch.float32), None, kind)


def round_columns(
    weight_NRC: Tensor, importance_NC: Tensor, upper_NCC: Tensor | None, kind: Layout
) -> tuple[Tensor, Tensor]:
    """Round column after column; with an upper factor the later columns make good the error of each.

    Args:
        weight_NRC: the matrices.
        importance_NC: how much the error of each column weighs where scales are fitted.
        upper_NCC: U with H^-1 = U^T U, see `coterie.compress.quantisers.gptq`; None for the nearest codes.
        kind: the format.

    Returns:
        Bytes (N, R, K), uint8, and values (N, R, C), float32; where blocks run on from row to row, R / rows that are
        stored together, and as many more bytes.

    Raises:
        ValueError: columns, or rows that are stored together, that are no whole blocks.
    """
    if isinstance(kind, Wrapped):
        return _round_wrapped(weight_NRC, importance_NC, upper_NCC, kind.inner)
    num_columns = weight_NRC.shape[-1]
    if num_columns % kind.block:
        raise ValueError(f"{num_columns} columns are no whole blocks of {kind.block}, as {kind.name} has them")
    at_once = max(1, NUMBERS_AT_ONCE[1 < kind.together < kind.block] // (len(weight_NRC) * kind.block))
    return _shared_out(lambda some_NRC: _round_rows(some_NRC, importance_NC, upper_NCC, kind), weight_NRC, at_once)


def _shared_out(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], weight_NRC: Tensor, at_once: int
) -> tuple[Tensor, Tensor]:
    """Return what a function makes of rows, some at a time, one below the other."""
    some = torch.split(weight_NRC, at_once, dim=1)
    byte_parts, value_parts = zip(*each_computed(function, some, weight_NRC.device), strict=True)
    return torch.cat(byte_parts, dim=1), torch.cat(value_parts, dim=1)


def _round_rows(
    weight_NRC: Tensor, importance_NC: Tensor, upper_NCC: Tensor | None, kind: BlockType
) -> tuple[Tensor, Tensor]:
    """Round some rows of all matrices: rows do not hang on each other."""
    num_columns = weight_NRC.shape[-1]
    # Nearest codes of columns that are coded one by one do not hang on each other.
    together = kind.sub_block if upper_NCC is None and kind.together == 1 else kind.together
    # Errors reach the columns of a block in few large products, not one by one.
    near = max(together, min(kind.block, _NEAR))
    rest_NRC = weight_NRC.to(torch.float32).clone()
    value_NRC, packed = torch.empty_like(rest_NRC), []
    for start in range(0, num_columns, kind.block):
        stop = start + kind.block
        block_NRB, error_NRB = rest_NRC[..., start:stop].clone(), torch.zeros_like(rest_NRC[..., start:stop])
        scales, codes = _fit(block_NRB, importance_NC[:, None, start:stop], kind), list[Codes]()
        for column in range(start, stop, together):
            end = column + together
            here = slice(column - start, end - start)
            if upper_NCC is None:
                metric_Nvv = torch.diag_embed(importance_NC[:, column:end].sqrt())
            else:
                metric_Nvv = _inverse_of_upper(upper_NCC[:, column:end, column:end])
            chosen, value_NRv = kind.choose(block_NRB[..., here], scales, column - start, metric_Nvv)
            codes.append(chosen)
            value_NRC[..., column:end] = value_NRv
            if upper_NCC is None:
                continue
            error_NRB[..., here] = error_NRv = (block_NRB[..., here] - value_NRv) @ metric_Nvv
            first = column - (column - start) % near
            last = first + near
            block_NRB[..., end - start : last - start] -= error_NRv @ upper_NCC[:, column:end, end:last]
            if end == last:
                errors_NRn = error_NRB[..., first - start : last - start]
                block_NRB[..., last - start :] -= errors_NRn @ upper_NCC[:, first:last, last:stop]
        if upper_NCC is not None:
            rest_NRC[..., stop:] -= error_NRB @ upper_NCC[:, start:stop, stop:]
        packed.append(kind.pack(scales, join_codes(codes)))
    return torch.cat(packed, dim=-1), value_NRC


def _round_wrapped(
    weight_NRC: Tensor, importance_NC: Tensor, upper_NCC: Tensor | None, kind: BlockType
) -> tuple[Tensor, Tensor]:
    """Round matrices whose blocks run on from row to row, column after column.

    A block then holds columns of several rows, so scales are fitted before the first column is rounded. Columns that
    are coded together lie at the same place of a block in every row, or every second, and so on: those are one step.
    """
    num_matrices, num_rows, num_columns = weight_NRC.shape
    together_rows = math.lcm(num_columns, kind.block) // num_columns
    if num_columns % GRAIN or num_rows % together_rows:
        raise ValueError(
            f"{num_rows} rows of {num_columns} columns are no whole blocks of {kind.block}, as {kind.name} has them, "
            f"or rows no multiple of {GRAIN}"
        )
    at_once = max(1, NUMBERS_AT_ONCE[kind.together > 1] // (num_matrices * GRAIN) // together_rows) * together_rows

    def rounded(some_NRC: Tensor) -> tuple[Tensor, Tensor]:
        return _round_wrapped_rows(some_NRC, importance_NC, upper_NCC, kind, together_rows)

    return _shared_out(rounded, weight_NRC, at_once)


def _round_wrapped_rows(
    weight_NRC: Tensor, importance_NC: Tensor, upper_NCC: Tensor | None, kind: BlockType, together_rows: int
) -> tuple[Tensor, Tensor]:
    num_matrices, num_rows, num_columns = weight_NRC.shape
    rest_NRC, value_NRC = weight_NRC.to(torch.float32).clone(), torch.empty_like(weight_NRC, dtype=torch.float32)
    scales = _fit_wrapped(rest_NRC, importance_NC, kind)
    together = kind.sub_block if upper_NCC is None and kind.together == 1 else kind.together
    every = together_rows * num_columns // kind.block  # blocks of rows that are stored together
    code_NGc: Tensor | None = None
    negative_NGB: Tensor | None = None
    for start in range(0, num_columns, _NEAR):
        stop = min(start + _NEAR, num_columns)
        error_NRn = torch.zeros_like(rest_NRC[..., start:stop])
        for column in range(start, stop, together):
            end = column + together
            if upper_NCC is None:
                metric_Nvv = torch.diag_embed(importance_NC[:, column:end].sqrt())
            else:
                metric_Nvv = _inverse_of_upper(upper_NCC[:, column:end, column:end])
            for row in range(together_rows):
                block, place = divmod(row * num_columns + column, kind.block)
                rows, blocks = slice(row, None, together_rows), slice(block, None, every)
                weight_NRv = rest_NRC[:, rows, column:end]
                codes, value_NRC[:, rows, column:end] = kind.choose(
                    weight_NRv, scales.of_rows(blocks), place, metric_Nvv
                )
                width = codes.code_NRc.shape[-1]
                if code_NGc is None:
                    num_blocks = num_rows * num_columns // kind.block
                    code_NGc = codes.code_NRc.new_empty(num_matrices, num_blocks, kind.block * width // together)
                    if codes.negative_NRv is not None:
                        negative_NGB = codes.negative_NRv.new_empty(num_matrices, num_blocks, kind.block)
                first = place * width // together
                code_NGc[:, blocks, first : first + width] = codes.code_NRc
                if negative_NGB is not None and codes.negative_NRv is not None:
                    negative_NGB[:, blocks, place : place + together] = codes.negative_NRv
            if upper_NCC is None:
                continue
            error_NRv = (rest_NRC[..., column:end] - value_NRC[..., column:end]) @ metric_Nvv
            error_NRn[..., column - start : end - start] = error_NRv
            rest_NRC[..., end:stop] -= error_NRv @ upper_NCC[:, column:end, end:stop]
        if upper_NCC is not None:
            rest_NRC[..., stop:] -= error_NRn @ upper_NCC[:, start:stop, stop:]
    assert code_NGc is not None
    byte_NGK = kind.pack(scales, Codes(code_NRc=code_NGc, negative_NRv=negative_NGB))
    return byte_NGK.reshape(num_matrices, num_rows // together_rows, -1), value_NRC


def _fit_wrapped(weight_NRC: Tensor, importance_NC: Tensor, kind: BlockType) -> Scales:
    """Fit the scales of all blocks, some at a time."""
    num_matrices, _, num_columns = weight_NRC.shape
    block_NGB = weight_NRC.reshape(num_matrices, -1, kind.block)
    at_once = max(1, NUMBERS_AT_ONCE[kind.together > 1] // (num_matrices * kind.block))
    parts = []
    for start in range(0, block_NGB.shape[1], at_once):
        place_GB = torch.arange(start * kind.block, min(start + at_once, block_NGB.shape[1]) * kind.block)
        importance_NGB = importance_NC[:, (place_GB % num_columns).view(-1, kind.block)]
        parts.append(_fit(block_NGB[:, start : start + at_once], importance_NGB, kind))
    return join_rows(parts)


def _fit(weight_NRB: Tensor, importance_NRB: Tensor, kind: BlockType) -> Scales:
    """Fit the scales of blocks, on a CPU as many at a time as its cache holds."""
    if weight_NRB.device.type != "cpu":
        return kind.fit(weight_NRB, importance_NRB)
    at_once = max(1, _FITTED_AT_ONCE // (len(weight_NRB) * kind.block))
    importance_NRB = importance_NRB.expand_as(weight_NRB)
    some = zip(torch.split(weight_NRB, at_once, dim=1), torch.split(importance_NRB, at_once, dim=1), strict=True)
    return join_rows([kind.fit(*each) for each in some])


def _inverse_of_upper(upper_Nvv: Tensor) -> Tensor:
    size = upper_Nvv.shape[-1]
    if size == 1:
        return upper_Nvv.reciprocal()
    eye_vv = torch.eye(size, device=upper_Nvv.device).expand_as(upper_Nvv)
    inverse_Nvv: Tensor = torch.linalg.solve_triangular(upper_Nvv, eye_vv, upper=True)
    return inverse_Nvv
