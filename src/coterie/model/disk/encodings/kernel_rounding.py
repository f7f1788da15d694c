"""Numbers and scales of `coterie.model.disk.encodings.kernel_matrix`: the nearest, with scales that fit them.

Scales are searched by the squared error: from several shares of the range on, numbers are rounded and scale and offset
fitted to them by least squares, in turn. What was stored in few bits before keeps its numbers where a scale in bfloat16
without an offset says them: these are tried as well, and have no error.

Legend: R rows, C columns, G groups of a row, K columns of a group.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Shares of a group's range that 16 numbers are spread over first; outside of it weights are clipped.
_SHARES = (1.0, 0.9, 0.8)

#: Roundings from each share on, with a fit in between.
_ROUNDS = 3

#: Numbers that the largest weight of a row of 8 bits is tried as: bfloat16 rounds a scale by up to 0.4 %. Of weights
#: that were stored in few bits, it was one of the largest.
_LARGEST = (127.0, 126.5, 126.0, 125.5)
_LARGEST_ON_GRID = tuple(float(number) for number in range(128, 99, -1))

#: The largest power of two that weights are counted in, and the smallest.
_POWERS = 120


def by_group(value_RC: Tensor, group: int, *, on_grid: bool = False) -> tuple[Tensor, Tensor, float]:
    """Round a matrix to 16 numbers in each group of columns.

    Args:
        value_RC: the matrix, float32, finite; groups are whole.
        group: columns that share scale and offset.
        on_grid: it was stored in few bits before.

    Returns:
        Codes (R, C) from 0 to 15, uint8; scale and offset (R, G, 2), bfloat16; and the sum of squared errors.
    """
    rows, columns = value_RC.shape
    value_RGK, power_RG = _in_units(value_RC.view(rows, columns // group, group))
    best_RGK = torch.full_like(value_RGK, 8, dtype=torch.uint8)
    scale_RG = torch.ones(value_RGK.shape[:2])
    offset_RG, least_RG = torch.zeros_like(scale_RG), torch.full_like(scale_RG, torch.inf)
    for scale, offset in (*_symmetric(value_RGK), *_spread(value_RGK)) if on_grid else _spread(value_RGK):
        rounds = 1 if offset is None else _ROUNDS
        step_RG, shift_RG = scale, torch.zeros_like(scale) if offset is None else offset
        for number in range(rounds):
            step_RG, shift_RG = _as_stored(step_RG), _as_stored(shift_RG)
            step_RG = torch.where(step_RG == 0, 1.0, step_RG)
            code_RGK = _codes(value_RGK, step_RG, shift_RG)
            error_RG = _error(value_RGK, code_RGK, step_RG, shift_RG)
            better_RG = error_RG < least_RG
            least_RG = torch.where(better_RG, error_RG, least_RG)
            scale_RG = torch.where(better_RG, step_RG, scale_RG)
            offset_RG = torch.where(better_RG, shift_RG, offset_RG)
            best_RGK = torch.where(better_RG[..., None], code_RGK.to(torch.uint8), best_RGK)
            if number + 1 < rounds:
                step_RG, shift_RG = _fitted(value_RGK, code_RGK - 8, step_RG, shift_RG)
    scales_RG2 = _as_stored(torch.ldexp(torch.stack((scale_RG, offset_RG), dim=-1), power_RG[..., None]))
    return best_RGK.view(rows, columns), scales_RG2.to(torch.bfloat16), _total(least_RG, power_RG)


def by_row(value_RC: Tensor, *, on_grid: bool = False) -> tuple[Tensor, Tensor, float]:
    """Round a matrix to numbers from -128 to 127 with a scale for each row; see `by_group`.

    Returns:
        Numbers (R, C), int8; scales (R), bfloat16; and the sum of squared errors.
    """
    value_RC, power_R = _in_units(value_RC)
    largest_R = value_RC.abs().amax(dim=1)
    best_RC = torch.zeros_like(value_RC, dtype=torch.int8)
    scale_R, least_R = torch.ones_like(largest_R), torch.full_like(largest_R, torch.inf)
    for number in _LARGEST_ON_GRID if on_grid else _LARGEST:
        step_R = _as_stored(largest_R / number)
        step_R = torch.where(step_R == 0, 1.0, step_R)
        number_RC = (value_RC / step_R[:, None]).round_().clamp_(-128, 127)
        error_R = (number_RC * step_R[:, None] - value_RC).square_().sum(dim=1)
        better_R = error_R < least_R
        least_R, scale_R = torch.where(better_R, error_R, least_R), torch.where(better_R, step_R, scale_R)
        best_RC = torch.where(better_R[:, None], number_RC.to(torch.int8), best_RC)
    return best_RC, _as_stored(torch.ldexp(scale_R, power_R)).to(torch.bfloat16), _total(least_R, power_R)


def _in_units(value_ZK: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights in a power of two of which the largest of each Z has about one, and which power that is.

    So squares of very large and very small weights are numbers; bfloat16 rounds in any such unit alike.
    """
    _, power_Z = torch.frexp(value_ZK.abs().amax(dim=-1))
    power_Z = power_Z.clamp(-_POWERS, _POWERS)
    return torch.ldexp(value_ZK, -power_Z[..., None]), power_Z


def _total(error_Z: Tensor, power_Z: Tensor) -> float:
    """Return the sum of squared errors in units of powers of two."""
    return float(torch.ldexp(error_Z.to(torch.float64), 2 * power_Z).sum())


def _spread(value_RGK: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield scales and offsets with which the numbers lie evenly over shares of each group's range."""
    low_RG, high_RG = value_RGK.amin(dim=-1), value_RGK.amax(dim=-1)
    middle_RG, range_RG = low_RG / 2 + high_RG / 2, high_RG / 15 - low_RG / 15
    for share in _SHARES:
        scale_RG = share * range_RG
        yield scale_RG, middle_RG + scale_RG / 2  # the middle of the numbers is half a one below 8


def _symmetric(value_RGK: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield scales, without an offset, with which the largest weight of each group is one of the numbers."""
    largest_RG = value_RGK.abs().amax(dim=-1)
    for number in range(8, 0, -1):
        yield largest_RG / number, None
        yield -largest_RG / number, None


def _codes(value_RGK: Tensor, scale_RG: Tensor, offset_RG: Tensor) -> Tensor:
    number_RGK = (value_RGK - offset_RG[..., None]).div_(scale_RG[..., None]).round_()
    return number_RGK.add_(8).clamp_(0, 15)


def _error(value_RGK: Tensor, code_RGK: Tensor, scale_RG: Tensor, offset_RG: Tensor) -> Tensor:
    wrong_RGK = (code_RGK - 8).mul_(scale_RG[..., None]).add_(offset_RG[..., None]).sub_(value_RGK)
    return wrong_RGK.square_().sum(dim=-1)


def _fitted(value_RGK: Tensor, number_RGK: Tensor, scale_RG: Tensor, offset_RG: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and offset with the least squared error for these numbers; as they were where all are the same."""
    number_mean_RG, value_mean_RG = number_RGK.mean(dim=-1), value_RGK.mean(dim=-1)
    number_RGK = number_RGK - number_mean_RG[..., None]
    variance_RG = number_RGK.square().sum(dim=-1)
    slope_RG = (number_RGK * value_RGK).sum(dim=-1) / variance_RG
    is_fit_RG = (variance_RG > 0) & (slope_RG != 0)
    fitted_RG = torch.where(is_fit_RG, slope_RG, scale_RG)
    return fitted_RG, torch.where(is_fit_RG, value_mean_RG - number_mean_RG * fitted_RG, offset_RG)


def _as_stored(scale: Tensor) -> Tensor:
    """Return scales rounded to bfloat16, in float32; those beyond its range are its largest."""
    largest = torch.finfo(torch.bfloat16).max
    return scale.clamp(-largest, largest).to(torch.bfloat16).to(torch.float32)
