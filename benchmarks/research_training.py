"""What the study in research.py tries that the package does not have: more scores, and training with every choice open.

Training has the original in memory beside the compressed model, and asks it for its predictions piece by piece. What
the package itself does is in `coterie.compress.methods.slim` and `coterie.train`, whose loop is the study's too.

Legend: B sequences, S tokens of a sequence, V vocabulary, T tokens, K chosen experts, E experts, F expert width, D
model width, N tokens of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.compress.methods import segment
from coterie.compress.methods.slim import RANKINGS, SCORES, energy_scores
from coterie.model.arch.experts import Experts, canonical_experts, native_experts
from coterie.model.arch.layers import MoELayer
from coterie.model.arch.seam import intercepted, routed_output
from coterie.profile.profile import Sample
from coterie.train.loop import Loop
from coterie.train.model import experts_apart
from coterie.train.optimiser import Adam, Optimiser, load_optimiser
from coterie.train.predictions import Predictions
from coterie.train.schedule import WARM_UP, Schedule, rate_at, shuffled
from research_optimisers import OPTIMISERS, Together

#: Tokens that are computed at once.
MICRO_TOKENS = 1_024

#: Tokens from which the second moments of the matrices' inputs are made.
MOMENT_TOKENS = 8_192

#: The original is sure of a token where its most probable one has more than this.
SURE = 0.9


# Scores that the package does not have.

Statistics = Mapping[str, Tensor]

#: By name: the score (E, F) from statistics, and the statistics that it reads. Those that begin with "study" are made
#: by `study_statistics`.
ADDED: dict[str, tuple[Callable[[Statistics], Tensor], tuple[str, ...]]] = {
    "study-activation": (
        lambda statistics: statistics["hidden_square"] * statistics["study_norm"],
        ("hidden_square", "study_norm"),
    ),
    "study-fisher": (lambda statistics: statistics["channel_fisher"], ("channel_fisher",)),
    "study-mean": (
        lambda statistics: (statistics["channel_fisher"] * energy_scores(statistics)).sqrt(),
        ("channel_fisher", "gated_hidden_square", "gradient_energy", "tokens"),
    ),
    "study-removal": (lambda statistics: statistics["study_removal"], ("study_removal",)),
}


@contextmanager
def added_scores() -> Iterator[None]:
    """Within the block, the package knows the scores of `ADDED`."""
    for name, (function, needed) in ADDED.items():
        SCORES[name] = (lambda statistics, down_EDF, function=function: function(statistics), needed)  # type: ignore[misc]
        RANKINGS[name] = function
    try:
        yield
    finally:
        for name in ADDED:
            del SCORES[name], RANKINGS[name]


@contextmanager
def router_gap(gap: float) -> Iterator[None]:
    """Within the block, parts of an expert are that far apart in the router."""
    before, segment.GAP = segment.GAP, gap
    try:
        yield
    finally:
        segment.GAP = before


def study_statistics(experts: Experts, sample: Sample, names: Sequence[str]) -> dict[str, Tensor]:
    """Return statistics that a profile does not hold, each (1, E, F): the text counts as one domain.

    ``study_norm``: |w_k|^2 of the down projection's column of each neuron. ``study_removal``: see `removal_scores`.
    """
    statistics = {}
    if "study_norm" in names:
        statistics["study_norm"] = experts.down_EDF.double().square().sum(1)[None]
    if "study_removal" in names:
        statistics["study_removal"] = removal_scores(experts, sample)[None]
    return statistics


def removal_scores(experts: Experts, sample: Sample, prior: float = 16.0) -> Tensor:
    """Return what it costs to remove each neuron when its turn comes, (E, F) float64; optimal brain surgeon.

    In each expert the neuron goes next whose removal adds least to the squared error of the expert's output on the
    sample, the others' down columns being solved for anew each time. What it adds is its score, and never less than
    what the one before it added, so that a ranking by score is the order of removal.

    Args:
        experts: the original ones.
        sample: its tokens.
        prior: strength of the ridge, in tokens of average activations.
    """
    width = experts.width
    moments_EFF = torch.zeros(experts.num_experts, width, width, dtype=torch.float64)
    for expert in range(experts.num_experts):
        token_N, slot_N = (sample.index_TK == expert).nonzero(as_tuple=True)
        weight_N1 = sample.weight_TK[token_N, slot_N, None].float()
        hidden_NF = (weight_N1 * experts.hidden(expert, sample.inputs_TD[token_N].float())).double()
        moments_EFF[expert] = hidden_NF.T @ hidden_NF
        mean = float(moments_EFF[expert].diagonal().mean())
        moments_EFF[expert].diagonal().add_(max(prior * mean / max(1, len(token_N)), 1e-30))
    added_EF, order_EF = greedy_removal(moments_EFF, experts.down_EDF.double())
    # A hair more for each step, so that neurons that cost nothing keep their order too.
    cost_EF = added_EF.cummax(1).values * (1 + 1e-9 * torch.arange(width, dtype=torch.float64))
    return torch.zeros_like(cost_EF).scatter_(1, order_EF, cost_EF)


def greedy_removal(moments_EFF: Tensor, down_EDF: Tensor) -> tuple[Tensor, Tensor]:
    """Remove neurons one after the other, the cheapest first, the others' down columns solved for anew each time.

    With H the moments of an expert's activations and P = H^-1, the output without neuron k comes nearest to what it was
    with columns w_j - w_k P_kj / P_kk, and the squared error rises by |w_k|^2 / P_kk. Only the products of columns are
    needed, not the columns.

    Returns:
        By how much each step raises the squared error (E, F), and which neuron goes then (E, F).
    """
    count, width = moments_EFF.shape[:2]
    rows_E = torch.arange(count)
    inverse_EFF = torch.linalg.inv(moments_EFF)
    products_EFF = down_EDF.mT @ down_EDF
    alive_EF = torch.ones(count, width, dtype=torch.bool)
    added, order = [], []
    for _ in range(width):
        costs_EF = products_EFF.diagonal(dim1=1, dim2=2) / inverse_EFF.diagonal(dim1=1, dim2=2)
        next_E = costs_EF.masked_fill(~alive_EF, torch.inf).argmin(1)
        added.append(costs_EF[rows_E, next_E].clamp(min=0))
        order.append(next_E)
        share_EF = inverse_EFF[rows_E, next_E] / inverse_EFF[rows_E, next_E, next_E, None]
        lost_EF = products_EFF[rows_E, next_E]
        inverse_EFF = inverse_EFF - share_EF[:, :, None] * inverse_EFF[rows_E, next_E][:, None]
        products_EFF = (
            products_EFF
            - share_EF[:, :, None] * lost_EF[:, None]
            - lost_EF[:, :, None] * share_EF[:, None]
            + lost_EF[rows_E, next_E, None, None] * share_EF[:, :, None] * share_EF[:, None]
        )
        # What is gone costs and shares nothing more; ones keep the next quotients finite.
        for matrix_EFF in (inverse_EFF, products_EFF):
            matrix_EFF[rows_E, next_E] = 0
            matrix_EFF[rows_E, :, next_E] = 0
        inverse_EFF[rows_E, next_E, next_E] = 1
        alive_EF[rows_E, next_E] = False
    return torch.stack(added, 1), torch.stack(order, 1)


# Training.


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How a compressed model is trained.

    Attributes:
        tokens: tokens in all.
        step_tokens: tokens of a step of the optimizer.
        rate: largest step of an entry, relative to the root mean square of its tensor.
        pool: tokens of text, seen again and again; None for as many as `tokens`, so that each is seen once.
        classes: the loss compares so many of the original's most probable tokens and one class for the rest; None for
            the whole vocabulary.
        others: the rate of attention and norms, as a share of `rate`; 0 leaves them as they are.
        hidden: weight of the error of the hidden states behind all layers, beside the divergence.
        optimizer: "adam", "muon" (matrices of the experts) or "eigenbasis" (Adam, see `research_optimisers.Turned`).
        falls_late: whether the rate is that of the package, which falls in the last steps only, instead of one that
            falls from the first step on, as a cosine does.
        average: share of the steps, the last ones, of whose results the mean is taken; the rate then stays where it is
            instead of falling. 0 takes what the last step made.
        own_text: whether the text is the original model's own.
        sure: how much more a token counts of which the original is sure, see `SURE`; the whole vocabulary is compared.
        asked: what the domains that questions are asked of weigh in the text; the others weigh 1.
        order: of the sequences; another number for another order.
    """

    tokens: int = 65_536
    step_tokens: int = 2_048
    rate: float = 0.005
    pool: int | None = None
    classes: int | None = None
    others: float = 0.0
    hidden: float = 0.0
    optimizer: Literal["adam", "muon", "eigenbasis"] = "adam"
    falls_late: bool = False
    average: float = 0.0
    own_text: bool = False
    sure: float = 0.0
    asked: float = 1.0
    order: int = 0

    def scaled(self, scale: float) -> Training:
        """Return the same with another amount of text."""
        pool = None if self.pool is None else round(self.pool * scale)
        return replace(self, tokens=round(self.tokens * scale), pool=pool)

    def rate_at(self, step: int, steps: int) -> float:
        """Return the rate of a step, counted from 0."""
        if self.falls_late:
            return rate_at(step, steps, self.rate)
        rate = self.rate * min(1.0, (step + 1) / WARM_UP)
        return rate if self.average else rate * 0.5 * (1 + math.cos(math.pi * step / steps))

    def schedule(self, count: int, seq_len: int, seed: int) -> Schedule:
        """Return which of `count` sequences each step sees, and its rate."""
        steps = max(1, round(self.tokens / self.step_tokens))
        return Schedule(
            steps=steps,
            rows=shuffled(count, max(1, self.step_tokens // seq_len), seed),
            rate=lambda step: self.rate_at(step, steps),
        )


class Student:
    """A compressed model on its way; its experts are trained in canonical form, so that every matrix is one.

    Attributes:
        model: the model.
        experts: its experts by name of their module.
        matrices: the tensors of the experts and the routers, by name.
        others: all else that has a gradient, without embeddings and head, by name; empty unless asked for.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoELayer], *, others: bool) -> None:
        """Prepare a model.

        Args:
            model: float32; `put_back` changes it, steps change its routers (and its others) at once.
            layers: its MoE layers.
            others: whether attention and norms are trained too.
        """
        model.requires_grad_(False)
        self.model = model
        self.experts: dict[str, Experts] = {}
        self.matrices: dict[str, Tensor] = {}
        for layer in layers:
            own = canonical_experts(model.get_submodule(layer.experts)).map(Tensor.clone)
            self.experts[layer.experts] = own
            self.matrices |= {f"{layer.experts}.{name}": tensor for name, tensor in own.tensors().items()}
        routers = {name for layer in layers for name, _ in layer.router_tensors}
        inside = tuple(f"{layer.experts}." for layer in layers)
        whole: Any = model
        ends = (whole.get_input_embeddings(), whole.get_output_embeddings())
        fixed = {id(tensor) for module in ends if module is not None for tensor in module.parameters()}
        self.others: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if name in routers:
                self.matrices[name] = parameter
            elif others and not name.startswith(inside) and id(parameter) not in fixed:
                self.others[name] = parameter
        for tensor in self.weights.values():
            tensor.requires_grad_(True)

    @property
    def weights(self) -> dict[str, Tensor]:
        """All tensors that are trained."""
        return self.matrices | self.others

    @torch.no_grad()
    def add_to(self, sums: dict[str, Tensor]) -> None:
        """Add the weights as they are now to sums by name."""
        for name, tensor in self.weights.items():
            sums[name] = sums.get(name, 0) + tensor.detach().double()

    @torch.no_grad()
    def take_mean(self, sums: Mapping[str, Tensor], count: int) -> None:
        """Set the weights to sums of `count` states divided by their number."""
        for name, tensor in self.weights.items():
            tensor.copy_(sums[name] / count)

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the experts into the model."""
        for name, experts in self.experts.items():
            module = self.model.get_submodule(name)
            for key, tensor in native_experts(module, experts).items():
                module.get_parameter(key).copy_(tensor)


def train(
    model: PreTrainedModel,
    original: PreTrainedModel,
    layers: Sequence[MoELayer],
    ids_BS: Tensor,
    training: Training,
    *,
    seed: int = 0,
) -> list[float]:
    """Train a compressed model towards the original's predictions.

    Args:
        model: the compressed model, float32; it is changed.
        original: the original model, float32.
        layers: its MoE layers; those of the compressed model have the same names.
        ids_BS: text.
        training: how.
        seed: of the order of the sequences.

    Returns:
        The mean divergence on the text of each step before it is taken, nats per token.
    """
    schedule = training.schedule(*ids_BS.shape, seed)
    student = Student(model, layers, others=training.others > 0)
    averaged = round(training.average * schedule.steps)
    sums: dict[str, Tensor] = {}
    divergences: list[float] = []
    part_sums: list[float] = []  # of the step that is being computed: the sum over its sequences, part by part

    def loss(rows_N: Tensor) -> Tensor:
        divergence, minimised = _loss(model, original, ids_BS[rows_N], training)
        part_sums.append(float(divergence.detach()) * len(rows_N))
        return minimised

    def after(step: int, _: float) -> None:
        divergences.append(sum(part_sums) / len(schedule.rows(step - 1)))
        part_sums.clear()
        if step > schedule.steps - averaged:
            student.add_to(sums)

    loop = Loop(
        student.weights,
        loss,
        optimiser=_optimiser(student, training, lambda: _moments(student, layers, ids_BS, schedule)),
        schedule=schedule,
        micro=max(1, MICRO_TOKENS // ids_BS.shape[1]),
    )
    with experts_apart(model, student.experts), experts_apart(original):
        loop.run(says="distilling", after=after)
    if averaged:
        student.take_mean(sums, averaged)
    student.put_back()
    model.requires_grad_(False)
    return divergences


def _loss(
    model: PreTrainedModel, original: PreTrainedModel, ids_BS: Tensor, training: Training
) -> tuple[Tensor, Tensor]:
    """Return the divergence, nats per token, and what is minimised."""
    options = {"use_cache": False, "output_hidden_states": training.hidden > 0}
    with torch.no_grad():
        original_output: Any = original(input_ids=ids_BS, **options)
    output: Any = model(input_ids=ids_BS, **options)
    if training.classes is None:
        log_p_TV, log_q_TV = (
            either.logits.float().log_softmax(-1).flatten(0, 1) for either in (original_output, output)
        )
        divergence_T = nn.functional.kl_div(log_q_TV, log_p_TV, reduction="none", log_target=True).sum(-1)
        divergence = divergence_T.mean()
        if training.sure:
            weight_T = 1 + training.sure * (log_p_TV.amax(-1) > math.log(SURE))
            return divergence, (weight_T * divergence_T).sum() / weight_T.sum()
    else:
        divergence = Predictions.of(original_output.logits, training.classes).divergence(output.logits)
    if not training.hidden:
        return divergence, divergence
    pairs = zip(output.hidden_states[1:], original_output.hidden_states[1:], strict=True)
    errors = [(own - target).square().mean() / target.square().mean() for own, target in pairs]
    return divergence, divergence + training.hidden * torch.stack(errors).sum()


def _optimiser(student: Student, training: Training, moments: Callable[[], dict[str, Tensor]]) -> Optimiser:
    """Return what trains a student: matrices of the experts as asked for, all else by Adam."""
    special: dict[str, Tensor] = {}
    options: dict[str, Any] = {}
    if training.optimizer == "muon":
        special = {name: tensor for name, tensor in student.matrices.items() if tensor.ndim == 3}
    elif training.optimizer == "eigenbasis":
        options["moments"] = moments()
        special = {name: tensor for name, tensor in student.matrices.items() if name in options["moments"]}
    plain = {name: tensor for name, tensor in student.matrices.items() if name not in special}
    groups = [
        (special, load_optimiser(OPTIMISERS[training.optimizer]), options, 1.0),
        (plain, Adam, {}, 1.0),
        (student.others, Adam, {}, training.others),
    ]
    return Together(
        list(student.weights),
        [(tuple(group), make(group, **more), share) for group, make, more, share in groups if group],
    )


@torch.no_grad()
def _moments(student: Student, layers: Sequence[MoELayer], ids_BS: Tensor, schedule: Schedule) -> dict[str, Tensor]:
    """Return the second moments of what each matrix of experts and routers receives, by name of the matrix.

    Gate, up and router of a layer share one matrix (D, D); the down projections have one for each expert (E, F, F), of
    activations times routing weights.
    """
    inputs: dict[int, Tensor] = {}
    hidden: dict[int, Tensor] = {}

    def observe(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        experts = canonical_experts(module)
        inner_EFF = hidden.setdefault(id(module), torch.zeros(experts.num_experts, experts.width, experts.width))
        inputs[id(module)] = inputs.get(id(module), 0) + hidden_TD.T @ hidden_TD

        def visit(expert: int, token_N: Tensor, slot_N: Tensor, hidden_NF: Tensor, output_ND: Tensor) -> None:
            weighted_NF = hidden_NF * weight_TK[token_N, slot_N, None]
            inner_EFF[expert] += weighted_NF.T @ weighted_NF

        return routed_output(experts, hidden_TD, index_TK, weight_TK, visit=visit)

    count = max(1, MOMENT_TOKENS // ids_BS.shape[1])
    rows = torch.cat([schedule.rows(step) for step in range(schedule.steps)])[:count]
    with intercepted(student.model, observe):
        for part in torch.split(rows, max(1, MICRO_TOKENS // ids_BS.shape[1])):
            student.model(input_ids=ids_BS[part], use_cache=False)
    moments: dict[str, Tensor] = {}
    for layer in layers:
        key = id(student.model.get_submodule(layer.experts))
        routers = [name for name, _ in layer.router_tensors]
        for name in (f"{layer.experts}.gate_EFD", f"{layer.experts}.up_EFD", *routers):
            tensor = student.matrices.get(name)
            if tensor is not None and tensor.ndim > 1 and tensor.shape[-1] == len(inputs[key]):
                moments[name] = inputs[key]
        moments[f"{layer.experts}.down_EDF"] = hidden[key]
    return moments
