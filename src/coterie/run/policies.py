"""Which expert goes when a slot is needed: one class a policy, small tables of numbers, a name for each.

A policy is told what every layer asks for and says what each expert is worth; of those that may go, the one that is
worth least goes, of several the first by layer and number. It remembers experts that are not in memory too.

`follow` is the default: on traces of three trained models it had the most hits of those that do not know the future, 9
to 12 in a hundred more than `lru` with a quarter of the experts in memory and 2 to 3 more than `decay`, which knows how
often an expert was used lately and nothing of what follows what. `lcu` and `edgemoe` are those of papers, to compare
with; `belady` knows the future and is the bound that no policy passes.

Legend: L layers, E experts of a layer; both count from 0 and may have gaps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coterie.errors import InputError, UnknownName
from coterie.run.records import Key

#: For each of some experts, the places in a pass of the tokens that chose it, ascending, one at least.
Tokens = Sequence[Sequence[int]]


class Asked(NamedTuple):
    """What a layer asks for in a pass, which is a token, or a chunk of a prompt.

    Attributes:
        step: tokens that came before the pass.
        layer: number of the layer.
        experts: numbers of experts, each once.
        tokens: which tokens of the pass chose each of them; None where the pass is one token.
    """

    step: int
    layer: int
    experts: Sequence[int]
    tokens: Tokens | None = None


#: What layers asked for, in order.
Trace = Sequence[Asked]

#: Tokens after which a use of an expert counts half, with `decay`.
HALF_LIFE = 20.0

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

    @classmethod
    def num_bytes(cls, shape: tuple[int, int]) -> int:
        """Return the bytes of what it counts, where that is more than some numbers an expert."""
        return 0

    @abstractmethod
    def touch(self, layer: int, experts: Sequence[int], step: int, tokens: Tokens | None = None) -> None:
        """Hear what a layer asks for in a pass.

        Args:
            layer: its number.
            experts: numbers of experts, each once, at least one.
            step: tokens that came before the pass; never less than before.
            tokens: which tokens of the pass chose each of the experts; None where the pass is one token.
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
    """Least recently used: worth is the time of the last use.

    Within a call the expert that a later token chose last is the more recent, of several the later one.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self._last_LE = np.zeros(shape)
        self._clock = 0

    def touch(self, layer: int, experts: Sequence[int], step: int, tokens: Tokens | None = None) -> None:
        """Set the times of the last use."""
        count = len(experts)
        if tokens is not None:
            experts = [experts[place] for place in np.argsort([each[-1] for each in tokens], kind="stable")]
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

    def touch(self, layer: int, experts: Sequence[int], step: int, tokens: Tokens | None = None) -> None:
        """Count the uses of each."""
        self._uses_LE[layer, experts] += _counts(tokens)
        self._recent.touch(layer, experts, step, tokens)

    def worth(self) -> NDArray[np.float64]:
        """Return the numbers of uses, and less than one for being recent."""
        last_LE = self._recent.worth()
        worth_LE: NDArray[np.float64] = self._uses_LE + last_LE / (last_LE.max() + 1)
        return worth_LE


class Decay(Policy):
    """The number of uses, of which each counts half after `HALF_LIFE` tokens.

    A sum of decaying parts falls as a whole, so what comes before what changes with uses alone. Therefore worth is kept
    as the logarithm, to base 2, of the sum that it would be at step 0, which no number of steps overflows.
    """

    def __init__(self, shape: tuple[int, int], *, half_life: float = HALF_LIFE) -> None:
        """Know nothing yet.

        Args:
            shape: L and E.
            half_life: tokens after which a use counts half.
        """
        super().__init__(shape)
        self._half_life = half_life
        self._log_uses_LE = np.full(shape, -np.inf)

    def touch(self, layer: int, experts: Sequence[int], step: int, tokens: Tokens | None = None) -> None:
        """Add its uses to each."""
        before_E = self._log_uses_LE[layer, experts]
        self._log_uses_LE[layer, experts] = np.logaddexp2(before_E, _log_uses(step, tokens, self._half_life))

    def worth(self) -> NDArray[np.float64]:
        """Return logarithms of decayed numbers of uses, up to a constant."""
        return self._log_uses_LE


class Follow(Policy):
    """When an expert is used next, guessed from how often it was used lately and from what the last token chose.

    The chance that the next token of a text chooses expert e of a layer is taken as ``r_e + min(1, g_e)``, where

    - ``r_e`` is the share of late tokens that chose it: ``ln(2) / HALF_LIFE`` for each use, of which each counts half
      after `HALF_LIFE` tokens, as with `decay`;
    - ``g_e`` is the same, times ``(P(e | f) / P(e)) ** BOLDNESS`` for each expert f of the layer that the last token
      chose: how many times as often as otherwise e is chosen right after f. Both are counted over all tokens so far:
      ``P(e) = (u_e + 1/2) / (T + 2)`` and ``P(e | f) = (n_fe + PRIOR P(e)) / (n_f + PRIOR)``, where u_e of T tokens
      chose e, and of n_f tokens behind one that chose f, n_fe did.

    The expert is then expected after one over that chance of tokens, and the part of a token until its layer comes; the
    sooner, the more it is worth.
    """

    #: How much of what followed before is believed: 1 as if the experts of a token did not hang together, 0 nothing.
    BOLDNESS = 0.5

    #: Tokens behind each expert that count as seen before there was any.
    PRIOR = 2.0

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        num_layers, num_experts = shape
        self._log_uses_LE = np.full(shape, -np.inf)
        self._uses_LE = np.zeros(shape)
        self._num_tokens_L = np.zeros(num_layers)
        self._behind_LE = np.zeros(shape)
        self._follows_LEE = np.zeros((num_layers, num_experts, num_experts), dtype=np.float32)
        self._last: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)] * num_layers
        self._chance_LE = np.zeros(shape)
        self._layer = 0

    @classmethod
    def num_bytes(cls, shape: tuple[int, int]) -> int:
        """Return the bytes of what is counted."""
        return 4 * shape[0] * shape[1] ** 2

    def touch(self, layer: int, experts: Sequence[int], step: int, tokens: Tokens | None = None) -> None:
        """Count uses and what followed what, and guess what follows now."""
        chosen = np.asarray(experts)
        before_E = self._log_uses_LE[layer, chosen]
        self._log_uses_LE[layer, chosen] = np.logaddexp2(before_E, _log_uses(step, tokens, HALF_LIFE))
        self._uses_LE[layer, chosen] += _counts(tokens)
        first = last = chosen
        if tokens is not None:
            mask_TE = np.zeros((1 + max(each[-1] for each in tokens), self.shape[1]), dtype=np.float32)
            for expert, places in zip(experts, tokens, strict=True):
                mask_TE[places, expert] = 1
            self._follows_LEE[layer] += mask_TE[:-1].T @ mask_TE[1:]
            self._behind_LE[layer] += mask_TE[:-1].sum(0)
            first, last = np.flatnonzero(mask_TE[0]), np.flatnonzero(mask_TE[-1])
            step += len(mask_TE) - 1
            self._num_tokens_L[layer] += len(mask_TE) - 1
        self._follows_LEE[layer, self._last[layer][:, None], first] += 1
        self._behind_LE[layer, self._last[layer]] += 1
        self._num_tokens_L[layer] += 1
        self._last[layer], self._layer = last, layer
        self._chance_LE[layer] = self._chances(layer, step)

    def _chances(self, layer: int, step: int) -> NDArray[np.float64]:
        """Return the chances of a layer's experts behind the token that was the last one, [E]."""
        last = self._last[layer]
        rate_E = np.exp2(self._log_uses_LE[layer] - step / HALF_LIFE) * (np.log(2) / HALF_LIFE)
        share_E = (self._uses_LE[layer] + 0.5) / (self._num_tokens_L[layer] + 2)
        behind_F1 = self._behind_LE[layer, last][:, None]
        lift_FE = (self._follows_LEE[layer, last] / share_E + self.PRIOR) / (behind_F1 + self.PRIOR)
        chance_E: NDArray[np.float64] = rate_E + np.minimum(1, rate_E * lift_FE.prod(0) ** self.BOLDNESS)
        return chance_E

    def worth(self) -> NDArray[np.float64]:
        """Return minus the number of tokens until the next use that is expected."""
        num_layers = self.shape[0]
        part_L1 = ((np.arange(num_layers) - self._layer - 1) % num_layers / num_layers)[:, None]
        return -(1 / np.maximum(self._chance_LE, 1e-300) + part_L1)


class Lcu(Policy):
    """Least costly used, after MoE-APEX (ASPLOS 2026, doi 10.1145/3779212.3790187, equations 3 and 4).

    Worth of expert t is C_t / T, and 1 / D more where the last step used it: C_t is the number of its uses, all of one
    cost here, where all experts are read in one precision; T the number of tokens so far; D the number of layers until
    the one of t comes, counted from the layer that asks, and `NEAR` (0.1 in the paper). The last step is the whole pass
    before the one under way. The paper counts anew in each text; here that is a new policy.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self._uses_LE = np.zeros(shape)
        self._last_step_LE = np.zeros(shape, dtype=bool)
        self._this_step_LE = np.zeros(shape, dtype=bool)
        self._first: int | None = None
        self._step = self._now = self._layer = 0

    def touch(self, layer: int, experts: Sequence[int], step: int, tokens: Tokens | None = None) -> None:
        """Count the uses of each, and begin a new step where it is one."""
        if self._first is None:
            self._first = self._step = step
        self._now = max(self._now, step + max((int(each[-1]) for each in tokens or ()), default=0))
        if step != self._step:
            self._last_step_LE, self._this_step_LE = self._this_step_LE, np.zeros(self.shape, dtype=bool)
            self._step = step
        self._layer = layer
        self._uses_LE[layer, experts] += _counts(tokens)
        self._this_step_LE[layer, experts] = True

    def worth(self) -> NDArray[np.float64]:
        """Return uses for each token so far, and the nearness of what the last step used."""
        num_steps = self._now - (self._first or 0) + 1
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

    def touch(self, layer: int, experts: Sequence[int], step: int, tokens: Tokens | None = None) -> None:
        """Count the uses of each."""
        self._layer = layer
        self._uses_LE[layer, experts] += _counts(tokens)

    def worth(self) -> NDArray[np.float64]:
        """Return uses over distances."""
        return self._uses_LE / _distances(self.shape[0], self._layer)


def _counts(tokens: Tokens | None) -> NDArray[np.int64] | int:
    """Return how many tokens chose each expert of a pass."""
    return 1 if tokens is None else np.array([len(each) for each in tokens])


def _log_uses(step: int, tokens: Tokens | None, half_life: float) -> NDArray[np.float64] | float:
    """Return the logarithm, to base 2, of what a pass adds to the decayed uses of each expert, as counted at step 0."""
    if tokens is None:
        return step / half_life
    return np.array([
        (step + each[-1]) / half_life + np.log2(np.exp2((np.asarray(each) - each[-1]) / half_life).sum())
        for each in tokens
    ])  # fmt: skip


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
            _, layer, experts, *_ = trace[position]
            self._next_uses.append(next_LE[layer, experts])
            next_LE[layer, experts] = position
        self._next_uses.reverse()
        self._worth_LE = -next_LE

    def touch(self, layer: int, experts: Sequence[int], step: int, tokens: Tokens | None = None) -> None:
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
    "follow": Follow,
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
