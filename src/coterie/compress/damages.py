"""What storing each matrix in each type would cost, in nats a token: measured once, for whoever shares out the bytes.

To second order, an error E in a matrix raises the loss by half of sum over its elements of F E^2, with F the diagonal
of the Fisher information: the mean over tokens of (g x)^2, g the gradient of the token's loss with respect to the
output and x the input. E is that of nearest rounding of some rows of each matrix, scaled by what all of its rows weigh;
what error feedback makes good later is about the same share for all types but those in `UNDERRATED`.

Legend: R rows (outputs), C columns (inputs), T tokens, V vocabulary, D model width, F expert width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coterie.compress.projections import DOWN, GATE, UP, Projections, projections_of
from coterie.compress.source import Source
from coterie.compress.weights import PRICED_TYPES, Weight, weights_among
from coterie.compress.width_prices import by_width, expert_name
from coterie.model.arch.experts import Experts
from coterie.model.arch.layers import MoELayer
from coterie.model.disk.encodings.ggml import get_layout, rows_together, unwrapped
from coterie.model.disk.encodings.ggml.rounding import round_to_nearest
from coterie.model.stream.stream import Stage, Stream
from coterie.model.threads import each_computed
from coterie.profile.observation import Observation, observed

#: Rows of a matrix, and matrices of a layer's experts, that are rounded to see what a type costs.
ROWS, MATRICES = 32, 8

#: How many times as much as nearest rounding foretells some types cost in the end, beside all others: below two bits
#: error feedback makes good less, and the loss rises by more than its second order. On the bundled models matrices in
#: IQ1_S cost 3 to 6 times their price; the upper end, so that they are taken where nothing else is small enough.
UNDERRATED = {"IQ1_M": 6.0, "IQ1_S": 6.0}

#: An expert is priced as if so many more tokens had chosen it, each of which loses what is usual in its layer: a few
#: tokens say little of an expert that is rare in this text, and one that no token chose is not worthless.
PRIOR_TOKENS = 32

#: Tokens that types are priced on: fewer, and what is chosen fits those and no others.
PRICED_TOKENS = 32_768

#: By the pattern of a matrix and the name of a type: the rise of the loss in nats a token.
Damages = Mapping[str, Mapping[str, float]]

#: By the pattern of the matrices of a layer's experts: the share of each expert in what any type of them costs; they
#: add up to 1. A type's error is much the same share of every expert's numbers; how much these weigh is not.
Shares = Mapping[str, tuple[float, ...]]


@dataclass(kw_only=True)
class DamageMeter:
    """Sends text through a model and back, and prices every matrix in every type.

    Attributes:
        stream: the model, open.
        source: the same by its headers.
        batches: the text, ids (B, S) each.
        counts: of each batch, the loss of which tokens counts (B, S), bool; None where that of all does.
        types: which types are priced, where they fit.
        weights: the matrices that are priced; None for all that can be stored in fewer bits.
        widths: of the unit that was yielded last, what its experts would cost at other widths, see
            `coterie.compress.width_prices`.
        shares: of the same unit, how what its experts cost is shared among them; of those with tensors of their own.
    """

    stream: Stream
    source: Source
    batches: Sequence[Tensor]
    counts: Sequence[Tensor | None]
    types: Sequence[str] = PRICED_TYPES
    weights: Sequence[Weight] | None = None
    widths: dict[str, dict[str, float]] = field(default_factory=dict, init=False)
    shares: dict[str, tuple[float, ...]] = field(default_factory=dict, init=False)

    def measure(self, skip: Collection[str] = ()) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
        """Yield for each unit its name and the damages of its matrices; the head, priced last, is named "head".

        Args:
            skip: units, "embedding" or "head", that are not priced.
        """
        self._tokens = sum(
            ids_BS.numel() if counts_BS is None else int(counts_BS.sum())
            for ids_BS, counts_BS in zip(self.batches, self.counts, strict=True)
        )
        weights = self.source.weights if self.weights is None else self.weights
        seen: list[Tensor] = []
        jobs = [
            self.stream.loss_job(ids_BS, counts_BS, see=seen.append)
            for ids_BS, counts_BS in zip(self.batches, self.counts, strict=True)
        ]
        by_unit = {unit.name: weights_among(weights, unit.disk_names) for unit in self.stream.units}
        embedding = next((weight for weight in weights if weight.kind == "embedding"), None)
        rows: list[Tensor] = []
        with _watched_rows(self.stream.model.get_input_embeddings(), rows):
            for stage in self.stream.run(jobs, gradients=True):
                if not stage.backward or stage.unit.name not in by_unit or stage.unit.name in skip:
                    continue
                inner = [
                    weight for weight in by_unit[stage.unit.name] if weight.kind != "embedding" and not weight.head
                ]
                self._backward(stage, inner)
                self.widths, self.shares = {}, {}
                damages = dict(self._price(stage, inner))
                yield stage.unit.name, damages
        self.widths, self.shares = {}, {}
        if embedding is not None and not embedding.head and rows and "embedding" not in skip:
            yield "embedding", {embedding.pattern: self._price_embedding(embedding, rows[0])}
        heads = [weight for weight in weights if weight.head]
        for weight in heads[:1]:
            if "head" not in skip:
                yield "head", {weight.pattern: self._price_head(weight, self._predicting(seen))}

    def _predicting(self, seen: Sequence[Tensor]) -> Tensor:
        """Return what comes into the head, (T, D), where a token is predicted whose loss counts."""
        kept = []
        for hidden_BSD, counts_BS in zip(seen, self.counts, strict=True):
            if counts_BS is None:
                kept.append(hidden_BSD.flatten(0, 1))
            else:
                kept.append(hidden_BSD[:, :-1][counts_BS[:, 1:].to(hidden_BSD.device)])
        return torch.cat(kept)

    def _backward(self, stage: Stage, weights: Sequence[Weight]) -> None:
        """Send a unit's calls back, and fill `_fisher`."""
        model, unit = self.stream.model, stage.unit
        layers = tuple(layer for layer in self.source.architecture.layers if unit.holds(layer.experts))
        linear = {self.stream.conversion.memory_names[weight.names[0]] for weight in weights if weight.kind == "linear"}
        self._fisher: dict[Any, Tensor] = {}
        self._chosen: Counter[tuple[int, int]] = Counter()
        for call in stage.calls:
            behind: dict[int, Tensor] = {}
            with (
                _watched(model, linear, self._add),
                observed(model, layers, gradients=behind, fields=()) as observations,
            ):
                answer = call.compute()
            call.finish(answer)
            for observation in observations:
                if observation.layer.index in behind:
                    self._add_experts(observation, behind[observation.layer.index])

    @torch.no_grad()
    def _add(self, key: Any, gradient_TR: Tensor, input_TC: Tensor) -> None:
        fisher_RC = gradient_TR.float().square().T @ input_TC.float().square()
        self._fisher[key] = self._fisher[key] + fisher_RC if key in self._fisher else fisher_RC

    def _add_experts(self, observation: Observation, gradient_TD: Tensor) -> None:
        experts, index = observation.experts, observation.layer.index
        for expert, token_N, weight_N in observation.chosen():
            input_ND = observation.hidden_TD[token_N]
            gradient_ND = gradient_TD[token_N] * weight_N[:, None]
            self._chosen[index, expert] += len(token_N)
            for part, (gradient_NR, input_NC) in _through(experts, expert, input_ND, gradient_ND).items():
                self._add((index, expert, part), gradient_NR, input_NC)

    def _price(self, stage: Stage, weights: Sequence[Weight]) -> Iterator[tuple[str, dict[str, float]]]:
        model, conversion = self.stream.model, self.stream.conversion
        state = model.state_dict()
        by_layer: dict[int, Projections] = {}
        for weight in weights:
            if weight.layer is None:
                name = conversion.memory_names[weight.names[0]]
                if name in self._fisher:
                    yield weight.pattern, self._prices(weight, [(state[name], self._fisher[name])])
                continue
            layer = self.source.architecture.layers[weight.layer]
            if weight.layer not in by_layer:
                by_layer[weight.layer] = Projections(model, layer, conversion, stage.conversions)
            matrices = projections_of(by_layer[weight.layer].experts)
            parts = sorted(by_layer[weight.layer].held[weight.names[0]])
            pairs = [
                (matrices[part][expert], self._fisher[weight.layer, expert, part])
                for part in parts
                for expert in (range(layer.num_experts) if weight.expert is None else (weight.expert,))
                if (weight.layer, expert, part) in self._fisher
            ]
            if len(weight.names) > 1 and pairs:
                self.shares[weight.pattern] = self._shares(weight, matrices[parts[0]], parts[0])
            yield weight.pattern, self._prices(weight, pairs)
        for index, projections in by_layer.items():
            if all(weight.width_axis is not None for weight in weights if weight.layer == index):
                self.widths |= self._price_widths(self.source.architecture.layers[index], projections.experts)

    def _shares(self, weight: Weight, matrix_ERC: Tensor, part: int) -> tuple[float, ...]:
        """Return the share of each expert in what a projection of a layer's experts costs, see `PRIOR_TOKENS`."""
        weighs, tokens = [], []
        for expert in weight.experts:
            fisher_RC = self._fisher.get((weight.layer, expert, part))
            weighs.append(
                0.0 if fisher_RC is None else float((fisher_RC * matrix_ERC[expert].detach().float().square()).sum())
            )
            assert weight.layer is not None
            tokens.append(self._chosen[weight.layer, expert])
        usual = math.fsum(weighs) / sum(tokens)
        prior = [each + PRIOR_TOKENS * usual for each in weighs]
        total = math.fsum(prior)
        return tuple(each / total if total > 0 else 1 / len(prior) for each in prior)

    def _price_widths(self, layer: MoELayer, experts: Experts) -> dict[str, dict[str, float]]:
        """Return what the experts of a layer cost at each width, those that a token chose."""
        prices: dict[str, dict[str, float]] = {}
        for expert in range(layer.num_experts):
            fisher_DF = self._fisher.get((layer.index, expert, DOWN))
            if fisher_DF is not None:
                weight_DF = experts.down_EDF[expert].detach().float()
                cost_F = 0.5 * (fisher_DF * weight_DF.square()).sum(dim=0) / self._tokens
                prices[expert_name(layer.experts, expert)] = by_width(cost_F.tolist())
        return {name: each for name, each in prices.items() if each}

    def _prices(self, weight: Weight, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Return what each type costs, from matrices and what their elements weigh (not yet divided by T)."""
        pairs = [(matrix_RC.detach().float(), fisher_RC) for matrix_RC, fisher_RC in pairs]
        if not pairs:  # no token passed it
            return {}
        whole = sum(float((fisher_RC * matrix_RC.square()).sum()) for matrix_RC, fisher_RC in pairs)
        step = max(1, len(pairs) // MATRICES)
        kinds = list(dict.fromkeys(kind for wanted in self.types for kind in weight.fittings(wanted)))
        # Rows that are rounded, by how many there are and how many are stored together: the same for types alike.
        which = {kind: (rows_for(kind), rows_together(kind, weight.columns)) for kind in kinds}
        samples = {key: _sample(pairs[::step], *key) for key in dict.fromkeys(which.values())}

        def price(kind: str) -> float:
            matrix_NRC, fisher_NRC, importance_NC, part = samples[which[kind]]
            _, value_NRC = round_to_nearest(matrix_NRC, importance_NC, get_layout(kind))
            lost = float((fisher_NRC * (matrix_NRC - value_NRC).square()).sum())
            factor = 0.5 * UNDERRATED.get(unwrapped(kind), 1.0)
            return factor * whole * (lost / part if part > 0 else 0.0) / self._tokens

        return dict(zip(kinds, each_computed(price, kinds, pairs[0][0].device), strict=True))

    def _price_embedding(self, weight: Weight, fisher_VD: Tensor) -> dict[str, float]:
        matrix_VD = self.stream.read(weight.names[0]).float()
        used_V = fisher_VD.sum(dim=1) > 0
        if not bool(used_V.any()):
            return {}
        return self._prices(weight, [(matrix_VD[used_V], fisher_VD[used_V])])

    @torch.no_grad()
    def _price_head(self, weight: Weight, hidden_TD: Tensor) -> dict[str, float]:
        """The Fisher information of logits needs no labels: p (1 - p) on the diagonal."""
        matrix_VD = self.stream.read(weight.names[0]).float()
        fisher_VD = torch.zeros_like(matrix_VD)
        for some_TD in torch.split(hidden_TD.cpu().float(), 256):
            p_TV = (some_TD @ matrix_VD.T).softmax(dim=-1)
            fisher_VD += (p_TV * (1 - p_TV)).T @ some_TD.square()
        return self._prices(weight, [(matrix_VD, fisher_VD)])


def rows_for(kind: str) -> int:
    """Return how many rows of a matrix tell what a type costs: few, of types whose codes take long to choose."""
    return ROWS // 4 if unwrapped(kind) in UNDERRATED else ROWS


def _sample(pairs: Sequence[tuple[Tensor, Tensor]], rows: int, together: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return some rows of matrices, what their elements and columns weigh, and what all of these rows weigh."""
    some = [_some_rows(*pair, rows, together) for pair in pairs]
    matrix_NRC, fisher_NRC = (torch.stack(each) for each in zip(*some, strict=True))
    importance_NC = fisher_NRC.mean(dim=1)
    importance_NC = torch.where(importance_NC.sum(dim=-1, keepdim=True) > 0, importance_NC, 1.0)
    return matrix_NRC, fisher_NRC, importance_NC, float((fisher_NRC * matrix_NRC.square()).sum())


def _some_rows(matrix_RC: Tensor, fisher_RC: Tensor, rows: int, together: int) -> tuple[Tensor, Tensor]:
    """Return rows of a matrix, as many side by side as are stored together, and their weights."""
    step = max(1, len(matrix_RC) // max(rows, together) // together)
    missing, columns = -len(matrix_RC) % together, matrix_RC.shape[-1]
    # Rows that are made up weigh nothing; of an embedding only those are here that the text has.
    padded = [nn.functional.pad(each, (0, 0, 0, missing)) for each in (matrix_RC, fisher_RC)]
    some = [each.reshape(-1, together, columns)[::step].flatten(0, 1) for each in padded]
    return some[0], some[1]


def _through(experts: Experts, expert: int, input_ND: Tensor, gradient_ND: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Return for each projection of an expert the gradient of what it puts out, and what it received."""
    bias = {GATE: experts.gate_bias_EF, UP: experts.up_bias_EF, DOWN: experts.down_bias_ED}

    def project(part: int, received: Tensor) -> Tensor:
        row = bias[part]
        return nn.functional.linear(
            received, projections_of(experts)[part][expert], None if row is None else row[expert]
        )

    with torch.enable_grad():
        gate_NF = None if experts.gate_EFD is None else project(GATE, input_ND).detach().requires_grad_()
        up_NF = project(UP, input_ND).detach().requires_grad_()
        hidden_NF = experts.combine(gate_NF, up_NF)
        plain_ND = project(DOWN, hidden_NF)
        output_ND = plain_ND if experts.finish is None else experts.finish(plain_ND)
        wanted = {UP: up_NF, DOWN: plain_ND} | ({} if gate_NF is None else {GATE: gate_NF})
        gradients = torch.autograd.grad(output_ND, list(wanted.values()), gradient_ND.to(output_ND.dtype))
    received = {GATE: input_ND, UP: input_ND, DOWN: hidden_NF.detach()}
    return {part: (gradient.detach(), received[part]) for part, gradient in zip(wanted, gradients, strict=True)}


@contextmanager
def _watched(model: nn.Module, names: set[str], add: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Within the block, `add` gets (name, gradient of the output (T, R), input (T, C)) of every call of a module."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                input_TC = args[0].detach().flatten(0, -2)
                output.register_hook(lambda gradient: add(name, gradient.flatten(0, -2), input_TC))  # type: ignore[no-untyped-call]

        return keep

    handles = [model.get_submodule(name.rpartition(".")[0]).register_forward_hook(hook(name)) for name in sorted(names)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watched_rows(embedding: nn.Module, rows: list[Tensor]) -> Iterator[None]:
    """Within the block, gradients of what an embedding puts out are squared and summed by token, (V, D), into `rows`.

    What a family multiplies the embedding's output by counts: the gradient is that of the output itself.
    """

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        ids_T = args[0].detach().flatten().cpu()

        def add(gradient: Tensor) -> None:
            square_TD = gradient.detach().cpu().float().square().flatten(0, -2)
            if not rows:  # only now, when all layers are done
                table: Any = module
                rows.append(torch.zeros(int(table.weight.shape[0]), square_TD.shape[-1]))
            rows[0].index_add_(0, ids_T, square_TD)

        if output.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]

    handle = embedding.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
