"""Which tokens a sample holds: those whose places have the lowest priorities, in whatever run they are measured.

The priority of a place is a hash of the seed, the domain, all tokens of the sequence and the position in it. It does
not depend on what else there is in the text, so the k lowest of a whole text are the k lowest of those of its parts: a
bottom-k sample (Cohen and Kaplan, PODC 2007). Sequences that are the same token for token have the same priorities;
between their tokens the bytes decide that were measured.

Legend: N chosen places, S tokens of a sequence, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 256  # sequences whose priorities are held at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Places in the tokens of one domain, sequence after sequence, ascending.

    Attributes:
        position_N: number of the token, among those that count.
        priority_N: its priority, int64, not negative.
    """

    position_N: Tensor
    priority_N: Tensor


def chosen_places(domain: str, ids_NS: Tensor, *, count: int, seed: int, counts_NS: Tensor | None = None) -> Places:
    """Return the `count` places with the lowest priorities, and those beside that share the highest of these.

    Args:
        domain: its name.
        ids_NS: its token ids, one sequence a row.
        count: how many; all when there are fewer.
        seed: seed of the draw.
        counts_NS: which tokens there are to be chosen from, bool, and numbers are given to; None for all.
    """
    begin = 0
    positions, priorities = (np.zeros(0, dtype=np.int64) for _ in range(2))
    for start in range(0, len(ids_NS), _BLOCK):
        rows = [_priorities(domain, ids_S, seed) for ids_S in ids_NS[start : start + _BLOCK]]
        if counts_NS is not None:
            counts = counts_NS[start : start + _BLOCK].numpy()
            rows = [row[counts_S] for row, counts_S in zip(rows, counts, strict=True)]
        stop = begin + sum(map(len, rows))
        priorities = np.concatenate((priorities, *rows))
        positions = np.concatenate((positions, np.arange(begin, stop)))
        begin = stop
        if len(priorities) > count:
            keep = priorities <= np.partition(priorities, count - 1)[count - 1]
            positions, priorities = positions[keep], priorities[keep]
    return Places(position_N=torch.from_numpy(positions), priority_N=torch.from_numpy(priorities))


def _priorities(domain: str, ids_S: Tensor, seed: int) -> NDArray[np.int64]:
    """Return the priorities of the places in one sequence: SplitMix64 from a digest of the sequence."""
    digest = hashlib.sha256(f"{seed}\0{domain}\0".encode() + ids_S.numpy().astype("<i8").tobytes())
    start = np.uint64(int.from_bytes(digest.digest()[:8], "little"))
    value = start + np.arange(1, len(ids_S) + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ value >> np.uint64(shift)) * np.uint64(factor)
    return ((value ^ value >> np.uint64(31)) >> np.uint64(1)).astype(np.int64)


def lowest(tensors: Mapping[str, Tensor], counts: Sequence[int]) -> dict[str, Tensor]:
    """Return the rows with the lowest priorities of each domain, domain by domain and in the order of priority.

    Args:
        tensors: of a sample, by name; all (T, ...), ``domain_T`` and ``priority_T`` among them.
        counts: rows of each domain at most.
    """
    domain_T, priority_T = (tensors[name].numpy() for name in ("domain_T", "priority_T"))
    order = np.lexsort((priority_T, domain_T))
    same = (np.diff(domain_T[order]) == 0) & (np.diff(priority_T[order]) == 0)
    if same.any():
        bytes_T = np.zeros(len(order), dtype="S64")
        for row in order[np.append(same, False) | np.append(False, same)]:
            bytes_T[row] = _digest(tensors, row)
        order = np.lexsort((bytes_T, priority_T, domain_T))
    kept = [order[domain_T[order] == domain][:count] for domain, count in enumerate(counts)]
    index_N = torch.from_numpy(np.concatenate(kept))
    return {name: tensor[index_N] for name, tensor in tensors.items()}


def _digest(tensors: Mapping[str, Tensor], row: int) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name][row].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest().encode()
