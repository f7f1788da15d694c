"""Which expert goes when a slot is needed: one class a policy, small tables of numbers, a name for each.

A policy is told what every layer asks for and says what each expert is worth; of those that may go, the one that is
worth least goes, of several the first by layer and number. It remembers experts that are not in memory too.

`decay` is the default: on traces of two trained models it had the most hits of those that do not know the future, 4 to
9 in a hundred more than `lru` with a quarter of the experts in memory. `lcu` and `edgemoe` are those of papers, to
compare with; `belady` knows the future and is the bound that no policy passes.

Legend: L layers, E experts of a layer; both count from 0 and may have gaps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from coterie.errors import InputError, UnknownName
from coterie.run.records import Key

#: What layers asked for: (step, layer, experts), in order. A step is what goes through all layers at once: a token.
Trace = Sequence[tuple[int, int, Sequence[int]]]

#: Steps after which a use of an expert counts half, with `decay`.
HALF_LIFE = 32.0

#: What is added to the distance between layers, so that a layer is near itself, and nothing is divided by zero.
NEAR = 0.1


class Policy(ABC):
    """What an expert is worth.

    Attributes:
        shape: L and E.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        """Know nothing yet.

        Args:
            shape: L and E, each one more than the largest number of a layer and of an expert.
        """
        self.shape = shape

    @abstractmethod
    def touch(self, layer: int, experts: Sequence[int], step: int) -> None:
        """Hear that a layer asks for some experts, each once.

        Args:
            layer: its number.
            experts: theirs, at least one.
            step: number of the token, or of what goes through all layers at once; never less than before.
        """

    @abstractmethod
    def worth(self) -> NDArray[np.float64]:
        """Return what every expert is worth at this moment, [L, E], less than infinity; it is not written to."""

    def victims(self, may_go_LE: NDArray[np.bool_], count: int) -> list[Key]:
        """Return the experts that are worth least of those that may go, the least first.

        Args:
            may_go_LE: which ones may.
            count: how many are wanted; at most as many as may go.
        """
        numbers = np.flatnonzero(may_go_LE)
        worth = self.worth().ravel()[numbers]
        victims = []
        for _ in range(count):
            place = int(worth.argmin())
            worth[place] = np.inf
            layer, expert = divmod(int(numbers[place]), self.shape[1])
            victims.append((layer, expert))
        return victims


class Lru(Policy):
    """Least recently used: worth is the time of the last use; within one call the later expert is the more recent."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self._last_LE = np.zeros(shape)
        self._clock = 0

    def touch(self, layer: int, experts: Sequence[int], step: int) -> None:
        """Set the times of the last use."""
        count = len(experts)
        self._last_LE[layer, experts] = np.arange(self._clock + 1, self._clock + 1 + count)
        self._clock += count

    def worth(self) -> NDArray[np.float64]:
        """Return the times of the last uses."""
        return self._last_LE


class Lfu(Policy):
    """Least frequently used: worth is the number of uses; of equals, the one that was used last is worth more."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self._uses_LE = np.zeros(shape)
        self._recent = Lru(shape)

    def touch(self, layer: int, experts: Sequence[int], step: int) -> None:
        """Count a use of each."""
        self._uses_LE[layer, experts] += 1
        self._recent.touch(layer, experts, step)

    def worth(self) -> NDArray[np.float64]:
        """Return the numbers of uses, and less than one for being recent."""
        last_LE = self._recent.worth()
        worth_LE: NDArray[np.float64] = self._uses_LE + last_LE / (last_LE.max() + 1)
        return worth_LE


class Decay(Policy):
    """The number of uses, of which each counts half after `HALF_LIFE` steps.

    A sum of decaying parts falls as a whole, so what comes before what changes with uses alone. Therefore worth is kept
    as the logarithm, to base 2, of the sum that it would be at step 0, which no number of steps overflows.
    """

    def __init__(self, shape: tuple[int, int], *, half_life: float = HALF_LIFE) -> None:
        """Know nothing yet.

        Args:
            shape: L and E.
            half_life: steps after which a use counts half.
        """
        super().__init__(shape)
        self._half_life = half_life
        self._log_uses_LE = np.full(shape, -np.inf)

    def touch(self, layer: int, experts: Sequence[int], step: int) -> None:
        """Add a use to each."""
        before_E = self._log_uses_LE[layer, experts]
        self._log_uses_LE[layer, experts] = np.logaddexp2(before_E, step / self._half_life)

    def worth(self) -> NDArray[np.float64]:
        """Return logarithms of decayed numbers of uses, up to a constant."""
        return self._log_uses_LE


class Lcu(Policy):
    """Least costly used, after MoE-APEX (ASPLOS 2026, doi 10.1145/3779212.3790187, equations 3 and 4).

    Worth of expert t is C_t / T, and 1 / D more where the last step used it: C_t is the number of its uses, all of one
    cost here, where all experts are read in one precision; T the number of steps so far; D the number of layers until
    the one of t comes, counted from the layer that asks, and `NEAR` (0.1 in the paper). The last step is the whole pass
    before the one under way. The paper counts anew in each text; here that is a new policy.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self._uses_LE = np.zeros(shape)
        self._last_step_LE = np.zeros(shape, dtype=bool)
        self._this_step_LE = np.zeros(shape, dtype=bool)
        self._first: int | None = None
        self._step = self._layer = 0

    def touch(self, layer: int, experts: Sequence[int], step: int) -> None:
        """Count a use of each, and begin a new step where it is one."""
        if self._first is None:
            self._first = self._step = step
        if step != self._step:
            self._last_step_LE, self._this_step_LE = self._this_step_LE, np.zeros(self.shape, dtype=bool)
            self._step = step
        self._layer = layer
        self._uses_LE[layer, experts] += 1
        self._this_step_LE[layer, experts] = True

    def worth(self) -> NDArray[np.float64]:
        """Return uses for each step so far, and the nearness of what the last step used."""
        num_steps = self._step - (self._first or 0) + 1
        nearness_L1 = 1 / _distances(self.shape[0], self._layer)
        return self._uses_LE / num_steps + self._last_step_LE * nearness_L1


class EdgeMoe(Policy):
    """Frequency over distance, after EdgeMoE (arXiv 2308.14352, section III-C), with one deviation.

    Worth of an expert is the number of its uses divided by the number of layers until its own comes, counted from the
    layer that asks, and `NEAR`. The paper's formula counts the distance the other way round, so that what the next
    layer is about to need goes first; its text says that what is farther away goes first, and that is what is done
    here.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self._uses_LE = np.zeros(shape)
        self._layer = 0

    def touch(self, layer: int, experts: Sequence[int], step: int) -> None:
        """Count a use of each."""
        self._layer = layer
        self._uses_LE[layer, experts] += 1

    def worth(self) -> NDArray[np.float64]:
        """Return uses over distances."""
        return self._uses_LE / _distances(self.shape[0], self._layer)


def _distances(num_layers: int, layer: int) -> NDArray[np.float64]:
    """Return how far ahead of a layer each layer is, round and round, and `NEAR`: [L, 1]."""
    distances_L: NDArray[np.float64] = (np.arange(num_layers, dtype=np.float64) - layer) % num_layers + NEAR
    return distances_L[:, None]


class Belady(Policy):
    """What is needed last goes first (Belady 1966): the most hits that there can be, for who knows the future."""

    def __init__(self, shape: tuple[int, int], trace: Trace) -> None:
        """Read the future.

        Args:
            shape: L and E.
            trace: what is about to be touched, in order.
        """
        super().__init__(shape)
        self._trace = trace
        self._position = 0
        # Where in the trace each expert is needed next, from behind; what is never needed again is worth least.
        next_LE = np.full(shape, np.inf)
        self._next_uses: list[NDArray[np.float64]] = []
        for position in reversed(range(len(trace))):
            _, layer, experts = trace[position]
            self._next_uses.append(next_LE[layer, experts])
            next_LE[layer, experts] = position
        self._next_uses.reverse()
        self._worth_LE = -next_LE

    def touch(self, layer: int, experts: Sequence[int], step: int) -> None:
        """Go on to the next entry of the trace.

        Raises:
            InputError: the trace says something else.
        """
        known = self._trace[self._position] if self._position < len(self._trace) else None
        if known is None or (step, layer, list(experts)) != (known[0], known[1], list(known[2])):
            asked = f"experts {list(experts)} of layer {layer} in step {step}"
            raise InputError(
                f"entry {self._position} of the trace is {known}, and not {asked}; belady replays a trace only"
            )
        self._worth_LE[layer, experts] = -self._next_uses[self._position]
        self._position += 1

    def worth(self) -> NDArray[np.float64]:
        """Return how soon each is needed: minus its next place in the trace."""
        return self._worth_LE


POLICIES: dict[str, type[Policy]] = {
    "decay": Decay,
    "lru": Lru,
    "lfu": Lfu,
    "lcu": Lcu,
    "edgemoe": EdgeMoe,
    "belady": Belady,
}


def policy_named(name: str, shape: tuple[int, int], trace: Trace | None = None) -> Policy:
    """Return a new policy.

    Args:
        name: one of `POLICIES`.
        shape: L and E.
        trace: what will be asked for, for the policy that knows it.

    Raises:
        UnknownName: there is no such policy.
        InputError: it has to know the future, and there is no trace.
    """
    if name not in POLICIES:
        raise UnknownName("policy", name, POLICIES)
    if name != "belady":
        return POLICIES[name](shape)
    if trace is None:
        raise InputError("the policy 'belady' knows what will be asked for: it needs a trace, and runs in replays only")
    return Belady(shape, trace)


def shape_of(keys: Iterable[Key]) -> tuple[int, int]:
    """Return L and E: one more than the largest number of a layer, and of an expert."""
    layers, experts = zip(*keys, strict=True)
    return max(layers) + 1, max(experts) + 1


def replay(trace: Trace, slots: int, policy: str = "decay") -> int:
    """Return how many experts would have been in memory when they were asked for; see `replay_each`."""
    return sum(replay_each(trace, slots, policy))


def replay_each(trace: Trace, slots: int, policy: str = "decay") -> list[int]:
    """Return for each entry how many experts would have been in memory, with nothing prefetched.

    What is asked for at once is in memory at once, as in `coterie.run.residency`: it makes others go and never itself.

    Args:
        trace: what layers ask for, in order; experts of an entry are different.
        slots: how many experts memory holds.
        policy: one of `POLICIES`.

    Raises:
        UnknownName: there is no such policy.
        InputError: an entry asks for more than there are slots.
    """
    if not trace:
        return []
    shape = shape_of((layer, expert) for _, layer, experts in trace for expert in experts)
    chosen = policy_named(policy, shape, trace)
    resident_LE = np.zeros(shape, dtype=bool)
    hits: list[int] = []
    num_resident = 0
    for step, layer, experts in trace:
        if len(experts) > slots:
            raise InputError(
                f"step {step} asks layer {layer} for {len(experts)} experts at once; {slots} slots hold less"
            )
        chosen.touch(layer, experts, step)
        missing = [expert for expert in experts if not resident_LE[layer, expert]]
        hits.append(len(experts) - len(missing))
        may_go_LE = resident_LE.copy()
        may_go_LE[layer, experts] = False
        num_out = max(0, num_resident + len(missing) - slots)
        for victim in chosen.victims(may_go_LE, num_out):
            resident_LE[victim] = False
        resident_LE[layer, missing] = True
        num_resident += len(missing) - num_out
    return hits
