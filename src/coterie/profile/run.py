"""Run text through a model once and keep what its experts did: checkpoint + tokens -> Profile.

Legend: E experts, D model width, T tokens, K chosen experts, G domains.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.errors import ArchitectureMismatch, InputError, OutputExists
from coterie.model.checkpoint import Checkpoint
from coterie.model.layers import Architecture, Experts, MoELayer, canonical_experts, find_router
from coterie.model.load import load_model, load_tokenizer, read_manifest
from coterie.model.seam import eager, intercepted, routed_output
from coterie.profile.calibration import TokenSet, tokenize
from coterie.profile.observation import Observation
from coterie.profile.profile import FILE, Profile, Sample
from coterie.profile.statistics import STATISTICS, Statistic, load_statistic
from coterie.progress import track

log = logging.getLogger(__name__)

#: Largest relative difference between a layer's own output and the recomputed one, by number format.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def profile(
    model: str | Path,
    out: str | Path | None = None,
    *,
    text: str | Path,
    tokens: int = 131_072,
    seq_len: int = 512,
    seed: int = 0,
    device: str = "cpu",
    sample_tokens: int = 8_192,
    domains: tuple[str, ...] | None = None,
    batch_size: int = 8,
) -> Profile:
    """Measure what the experts of a model do on text.

    Args:
        model: a model folder or hub id.
        out: folder for the profile; nothing is written when None.
        text: folder with one text file a domain, see `coterie.profile.calibration`.
        tokens: tokens in all, shared equally by the domains.
        seq_len: tokens in a sequence.
        seed: seed of the draw of text and of the token sample.
        device: where the model runs.
        sample_tokens: tokens of the sample of each layer, shared equally by the domains.
        domains: only these domains.
        batch_size: sequences in a batch; the result does not depend on it beyond rounding.

    Raises:
        OutputExists: `out` already holds a profile.
        TextError: no text, empty text, or text shorter than a sequence.
        NotACheckpoint, NotAMoE, CorruptCheckpoint: the model cannot be used.
        ArchitectureMismatch: a layer does not compute what its canonical experts compute.
    """
    if out is not None and (Path(out) / FILE).exists():
        raise OutputExists(f"{Path(out) / FILE} exists; choose another place or remove it")
    if tokens < 1 or sample_tokens < 1:
        raise InputError(f"nothing can be measured on {tokens} tokens with a sample of {sample_tokens}; ask for more")
    checkpoint = Checkpoint.open(model)
    manifest = read_manifest(checkpoint.path)
    if manifest is not None and manifest["router"] == "map":
        raise InputError(f"{checkpoint.path} is a mapped result; profile the model that it was made from")
    architecture = Architecture.of(checkpoint)
    token_set = tokenize(
        load_tokenizer(checkpoint.path), text, seq_len=seq_len, tokens=tokens, seed=seed, domains=domains
    )
    loaded = load_model(checkpoint.path, device=device)
    result = profile_model(
        loaded,
        architecture.layers,
        token_set,
        model_digest=checkpoint.digest,
        seed=seed,
        sample_tokens=sample_tokens,
        batch_size=batch_size,
    )
    if out is not None:
        result.save(out)
    return result


def profile_model(
    model: PreTrainedModel,
    layers: tuple[MoELayer, ...],
    token_set: TokenSet,
    *,
    model_digest: str,
    seed: int = 0,
    sample_tokens: int = 8_192,
    batch_size: int = 8,
    statistics: tuple[str, ...] = tuple(STATISTICS),
) -> Profile:
    """Measure a model that is in memory; see `profile`."""
    device = next(model.parameters()).device
    prove_layers(model, layers, next(token_set.batches(1))[1].to(device))
    measures = tuple(load_statistic(name) for name in statistics)
    collectors = [_Collector(token_set, measures, seed, sample_tokens) for _ in layers]
    batches = list(token_set.batches(batch_size))
    for domain, ids in track(batches, "profiling", total=len(batches)):
        with observed(model, layers) as observations, torch.no_grad():
            model.base_model(input_ids=ids.to(device), use_cache=False)
        for collector, observation in zip(collectors, observations, strict=True):
            collector.add(domain, observation)
    num_tokens = token_set.num_tokens
    return Profile(
        model_digest=model_digest,
        text_digest=token_set.digest,
        domains=token_set.domains,
        num_tokens=tuple(num_tokens[domain] for domain in token_set.domains),
        seq_len=token_set.seq_len,
        seed=seed,
        layers=layers,
        statistics=tuple(collector.statistics for collector in collectors),
        samples=tuple(collector.sample() for collector in collectors),
    )


@contextmanager
def observed(model: PreTrainedModel, layers: tuple[MoELayer, ...]) -> Iterator[list[Observation]]:
    """Within the block, one forward pass of `model` appends one Observation a layer to the list that is yielded."""
    by_module = {id(model.get_submodule(layer.experts)): layer for layer in layers}
    logits: dict[int, Tensor] = {}
    handles = []
    for layer in layers:
        found = find_router(model, layer.block)
        if found is not None:
            name, position = found
            handles.append(model.get_submodule(name).register_forward_hook(_keep_output(logits, layer.index, position)))
    observations: list[Observation] = []

    def observe(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        layer = by_module[id(module)]
        experts = canonical_experts(module)
        norm_TK = torch.zeros(index_TK.shape, dtype=torch.float32, device=index_TK.device)

        def visit(expert: int, token_N: Tensor, slot_N: Tensor, output_ND: Tensor) -> None:
            norm_TK[token_N, slot_N] = output_ND.float().norm(dim=-1)

        output_TD = routed_output(experts, hidden_TD, index_TK, weight_TK, visit=visit)
        scores = logits.pop(layer.index, None)
        observations.append(
            Observation(
                layer=layer,
                experts=experts,
                hidden_TD=hidden_TD,
                index_TK=index_TK,
                weight_TK=weight_TK,
                logits_TE=None if scores is None else scores.reshape(-1, layer.num_experts),
                norm_TK=norm_TK,
                output_TD=output_TD,
            )
        )
        return output_TD

    try:
        with intercepted(model, observe):
            yield observations
        seen = [observation.layer.index for observation in observations]
        if seen != [layer.index for layer in layers]:
            raise ArchitectureMismatch(f"a forward pass ran the MoE layers {seen}, expected each of {len(layers)} once")
    finally:
        for handle in handles:
            handle.remove()


def prove_layers(model: PreTrainedModel, layers: tuple[MoELayer, ...], ids: Tensor) -> dict[int, float]:
    """Check that every layer, recomputed from canonical experts, equals what the family's own code returns.

    The most chosen expert is computed once more with its channels in reverse order, which must not matter: it shows
    that gate, up and down projection were read with the same idea of what a channel is.

    Args:
        model: the model, with weights.
        layers: its MoE layers.
        ids: token ids (B, L).

    Returns:
        For each layer the largest absolute difference over the largest absolute output.

    Raises:
        ArchitectureMismatch: a difference above `TOLERANCE`, with the layer and the error.
    """
    by_module = {id(model.get_submodule(layer.experts)): layer for layer in layers}
    errors: dict[int, float] = {}

    def compare(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        layer = by_module[id(module)]
        with eager(module):
            own_TD: Tensor = module(hidden_TD, index_TK, weight_TK)
        experts = canonical_experts(module)
        error = _relative_error(routed_output(experts, hidden_TD, index_TK, weight_TK), own_TD)
        limit = TOLERANCE.get(own_TD.dtype, TOLERANCE[torch.float32])
        if not error <= limit:
            raise ArchitectureMismatch(
                f"{layer.experts}: recomputed from its weights, the layer differs from the model's own output by "
                f"{error:.2e} of its largest value (limit {limit:.0e}); this family computes something that Coterie "
                "does not know: please report it"
            )
        chosen = index_TK[index_TK < layer.num_experts].bincount(minlength=layer.num_experts).argmax()
        one = experts.select(chosen[None])
        channel_error = _relative_error(_with_channels_reversed(one).output(0, hidden_TD), one.output(0, hidden_TD))
        if not channel_error <= limit:
            raise ArchitectureMismatch(
                f"{layer.experts}: with its channels in another order, an expert's output differs by "
                f"{channel_error:.2e} of its largest value (limit {limit:.0e}); Coterie reads the gate and up "
                "projection of this family in a wrong layout: please report it"
            )
        errors[layer.index] = error
        return own_TD

    with intercepted(model, compare), torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)
    return errors


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute expected value."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference = (found.to(wide) - expected.to(wide)).abs().max().item()
    return difference / (expected.abs().max().item() or 1.0)


def _with_channels_reversed(experts: Experts) -> Experts:
    flipped: dict[str, Any] = {
        name: tensor.flip(-1 if name == "down_EDF" else 1)
        for name, tensor in experts.tensors().items()
        if name != "down_bias_ED"
    }
    return replace(experts, **flipped)


def _keep_output(kept: dict[int, Tensor], index: int, position: int):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        value = output[position] if isinstance(output, tuple) else output
        assert isinstance(value, Tensor)
        kept[index] = value.detach()

    return hook


class _Collector:
    """Adds up the statistics of one layer and keeps its token sample."""

    def __init__(self, token_set: TokenSet, measures: tuple[Statistic, ...], seed: int, sample_tokens: int) -> None:
        self.statistics: dict[str, Tensor] = {}
        self._measures = measures
        self._num_domains = len(token_set.domains)
        self._seen = [0] * self._num_domains
        share = max(1, sample_tokens // self._num_domains)
        # The same seed in every layer: the sample holds the same token positions everywhere.
        self._positions = [
            torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:share].sort().values
            for count in token_set.num_tokens.values()
        ]
        self._rows: list[dict[str, Tensor]] = []

    def add(self, domain: int, observation: Observation) -> None:
        for measure in self._measures:
            for name, value in measure(observation).items():
                if name not in self.statistics:
                    shape = (self._num_domains, *value.shape)
                    self.statistics[name] = torch.zeros(shape, dtype=torch.float64)
                self.statistics[name][domain] += value.cpu()
        self._keep_sample(domain, observation)

    def _keep_sample(self, domain: int, observation: Observation) -> None:
        start = self._seen[domain]
        stop = start + len(observation.hidden_TD)
        self._seen[domain] = stop
        positions = self._positions[domain]
        rows = (positions[(positions >= start) & (positions < stop)] - start).to(observation.hidden_TD.device)
        if not len(rows):
            return
        fields: Mapping[str, Tensor | None] = {
            "inputs_TD": observation.hidden_TD,
            "index_TK": observation.index_TK,
            "weight_TK": observation.weight_TK,
            "logits_TE": observation.logits_TE,
            "output_TD": observation.output_TD,
        }
        kept = {name: value[rows].cpu() for name, value in fields.items() if value is not None}
        kept["domain_T"] = torch.full((len(rows),), domain, dtype=torch.int64)
        self._rows.append(kept)

    def sample(self) -> Sample:
        joined = {name: torch.cat([rows[name] for rows in self._rows]) for name in self._rows[0]}
        return Sample(**({"logits_TE": None} | joined))  # type: ignore[arg-type]
