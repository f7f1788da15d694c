"""The one split into rows that are trained on and rows that are held out."""

from __future__ import annotations

import torch
from torch import Tensor


def split(count: int, every: int) -> tuple[Tensor, Tensor]:
    """Split rows, evenly spread over their order, as texts and domains follow one another.

    Args:
        count: how many rows there are: tokens of a sample, or sequences.
        every: each so many-th row is held out, the last of every such group; 1 holds out all.

    Returns:
        The numbers of the rows to train on, and of those that are held out, both ascending, int64.

    Raises:
        ValueError: `every` is below 1.
    """
    if every < 1:
        raise ValueError(f"every {every}-th row cannot be held out; give 1 or more")
    is_heldout_N = torch.arange(count) % every == every - 1
    return (~is_heldout_N).nonzero().flatten(), is_heldout_N.nonzero().flatten()
