"""What a policy makes of a trace: how many experts would have been in memory when they were asked for.

Legend: L layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coterie.run.policies import Asked, Policy, Trace, policy_named, shape_of


def waves(experts: Sequence[int], in_memory: Sequence[bool], slots: int) -> list[list[int]]:
    """Split experts of a layer into groups to ask for one after the other, where there are more than slots.

    Those in memory come first, before they have to go. A group is half the slots, so that one can be read while another
    is computed with.

    Args:
        experts: numbers of experts, each once.
        in_memory: whether each of them is.
        slots: how many experts memory holds.
    """
    if len(experts) <= slots:
        return [list(experts)]
    size = max(1, slots // 2)
    order = sorted(zip(in_memory, experts, strict=True), key=lambda each: not each[0])
    return [[expert for _, expert in order[start : start + size]] for start in range(0, len(order), size)]


def replay(trace: Trace, slots: int, policy: Policy | str = "follow") -> int:
    """Return how many experts would have been in memory when they were asked for; see `replay_each`."""
    return sum(replay_each(trace, slots, policy))


def replay_each(trace: Trace, slots: int, policy: Policy | str = "follow") -> list[int]:
    """Return for each entry how many experts would have been in memory, with nothing prefetched.

    What is asked for at once is in memory at once, as in `coterie.run.residency`: it makes others go and never itself.
    More than there are slots is asked for in `waves`, as in `coterie.run.experts`.

    Args:
        trace: what layers ask for, in order.
        slots: how many experts memory holds.
        policy: a new one, or the name of one of `coterie.run.policies.POLICIES`.

    Raises:
        UnknownName: there is no such policy.
    """
    if not trace:
        return []
    entries = [Asked(*entry) for entry in trace]
    shape = shape_of((entry.layer, expert) for entry in entries for expert in entry.experts)
    chosen = policy_named(policy, shape, entries) if isinstance(policy, str) else policy
    resident_LE = np.zeros(shape, dtype=bool)
    hits: list[int] = []
    for step, layer, experts, tokens in entries:
        chosen.touch(layer, experts, step, tokens)
        hits.append(0)
        before: list[int] = []  # still in use while the next wave is read
        for wave in waves(experts, resident_LE[layer, experts].tolist(), slots):
            in_use = [*wave, *(before if 2 * len(before) <= slots else ())]
            hits[-1] += _ask(chosen, resident_LE, layer, wave, in_use, slots)
            before = wave
    return hits


def _ask(
    policy: Policy, resident_LE: NDArray[np.bool_], layer: int, wave: Sequence[int], in_use: Sequence[int], slots: int
) -> int:
    """Bring a wave into memory, and return how many of its experts were there."""
    missing = [expert for expert in wave if not resident_LE[layer, expert]]
    may_go_LE = resident_LE.copy()
    may_go_LE[layer, in_use] = False
    num_out = max(0, int(np.count_nonzero(resident_LE)) + len(missing) - slots)
    for victim in policy.victims(may_go_LE, num_out):
        resident_LE[victim] = False
    resident_LE[layer, missing] = True
    return len(wave) - len(missing)
