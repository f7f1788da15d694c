"""Round matrices to a type, column after column; each error may be made good by the columns that follow.

Legend: N matrices, R rows (outputs), C columns (inputs), B columns of a block, v columns coded together, K bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from coterie.model.disk.encodings.ggml.block_type import Across, Codes, join_codes

if TYPE_CHECKING:
    from torch import Tensor

    from coterie.model.disk.encodings.ggml.block_type import BlockType, Layout


#: Columns that an error reaches at once; those behind them are told of the errors of all of them together.
_NEAR = 32

#: Numbers of a block of columns that are rounded at once, by whether codes are looked up in a grid: searching it takes
#: hundreds of bytes a number, all else some forty.
NUMBERS_AT_ONCE = {False: 2**22, True: 2**18}

#: Bytes that this takes at most.
ROUNDING_BYTES = 2**28 + 2**25


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
        Bytes (N, R, K), uint8, and values (N, R, C), float32; where blocks run across rows, (N, K, C) with K bytes of
        a column.

    Raises:
        ValueError: columns that are no whole blocks, or rows where blocks run across them.
    """
    if isinstance(kind, Across):
        return _round_across(weight_NRC, upper_NCC, kind.inner)
    num_columns = weight_NRC.shape[-1]
    if num_columns % kind.block:
        raise ValueError(f"{num_columns} columns are no whole blocks of {kind.block}, as {kind.name} has them")
    at_once = max(1, NUMBERS_AT_ONCE[kind.together > 1] // (len(weight_NRC) * kind.block))
    parts = [
        _round_rows(some_NRC, importance_NC, upper_NCC, kind) for some_NRC in torch.split(weight_NRC, at_once, dim=1)
    ]
    byte_parts, value_parts = zip(*parts, strict=True)
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
        scales, codes = kind.fit(block_NRB, importance_NC[:, None, start:stop]), list[Codes]()
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


def _round_across(weight_NRC: Tensor, upper_NCC: Tensor | None, kind: BlockType) -> tuple[Tensor, Tensor]:
    """Round columns, each in blocks of its own: all numbers of a column weigh the same."""
    even_NR = torch.ones(weight_NRC.shape[:2], device=weight_NRC.device)
    if upper_NCC is None:
        byte_NCK, value_NCR = round_to_nearest(weight_NRC.transpose(1, 2), even_NR, kind)
        return byte_NCK.transpose(1, 2).contiguous(), value_NCR.transpose(1, 2).contiguous()
    num_columns = weight_NRC.shape[-1]
    rest_NRC = weight_NRC.to(torch.float32).clone()
    value_NRC, packed = torch.empty_like(rest_NRC), []
    for start in range(0, num_columns, _NEAR):
        stop = min(start + _NEAR, num_columns)
        error_NRn = torch.zeros_like(rest_NRC[..., start:stop])
        for column in range(start, stop):
            byte_N1K, value_N1R = round_to_nearest(rest_NRC[..., column][:, None], even_NR, kind)
            packed.append(byte_N1K[:, 0])
            value_NRC[..., column] = value_N1R[:, 0]
            wrong_NR = rest_NRC[..., column] - value_NRC[..., column]
            error_NR1 = (wrong_NR / upper_NCC[:, column, column, None])[..., None]
            error_NRn[..., column - start] = error_NR1[..., 0]
            rest_NRC[..., column + 1 : stop] -= error_NR1 @ upper_NCC[:, column, None, column + 1 : stop]
        rest_NRC[..., stop:] -= error_NRn @ upper_NCC[:, start:stop, stop:]
    return torch.stack(packed, dim=-1), value_NRC


def _inverse_of_upper(upper_Nvv: Tensor) -> Tensor:
    size = upper_Nvv.shape[-1]
    if size == 1:
        return upper_Nvv.reciprocal()
    eye_vv = torch.eye(size, device=upper_Nvv.device).expand_as(upper_Nvv)
    inverse_Nvv: Tensor = torch.linalg.solve_triangular(upper_Nvv, eye_vv, upper=True)
    return inverse_Nvv
