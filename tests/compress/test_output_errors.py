"""What rounding matrices of experts does to a layer's output, against a slow computation of it in float64."""

import pytest
import torch

from coterie.compress.allocators import edgemoe
from coterie.compress.allocators.expert_types import by_expert, by_matrix
from coterie.compress.output_errors import OutputErrors
from coterie.compress.source import Source
from coterie.model.arch.experts import canonical_experts
from coterie.model.arch.load import load_model
from coterie.model.arch.seam import intercepted, routed_output
from coterie.model.disk.encodings.ggml import get_type
from coterie.model.disk.encodings.ggml.rounding import round_to_nearest
from coterie.model.stream.stream import Stream
from coterie.testing import tiny_checkpoint

TYPES = ("Q8_0", "Q4_0")
IDS = torch.randint(5, 250, (4, 12), generator=torch.Generator().manual_seed(0))
PARTS = ("gate", "up", "down")

#: Each expert by itself; with biases, all experts in one tensor, gate and up interleaved; ending in a norm.
FAMILIES = {
    "olmoe": {"intermediate_size": 32},
    "gpt_oss": {"intermediate_size": 32},
    "nemotron_h": {"moe_intermediate_size": 32},
}


def reached(model):
    """Return what reaches the experts of every layer, and the experts, by the module's number, in float64."""
    seen = []

    def keep(module, hidden_TD, index_TK, weight_TK):
        seen.append((canonical_experts(module), hidden_TD, index_TK, weight_TK))
        return routed_output(canonical_experts(module), hidden_TD, index_TK, weight_TK)

    with torch.no_grad(), intercepted(model, keep):
        model(input_ids=IDS, use_cache=False)
    return seen


def output(experts, hidden, index, weight):
    """Return the output of a layer, token by token."""
    total = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for slot in range(index.shape[1]):
            expert = int(index[token, slot])
            if weight[token, slot] != 0:
                total[token] += weight[token, slot] * experts.output(expert, hidden[token : token + 1])[0]
    return total


def with_rounded(experts, expert, parts, kind):
    """Return experts of which some projections of one, or of all, are rounded."""
    fields = {"gate": "gate_EFD", "up": "up_EFD", "down": "down_EDF"}
    changed = {}
    for part in parts:
        matrix = getattr(experts, fields[part])
        if matrix is None:
            continue
        matrix = matrix.clone()
        for e in range(len(matrix)) if expert is None else [expert]:
            ones = torch.ones(1, matrix.shape[-1])
            matrix[e] = round_to_nearest(matrix[e][None].float(), ones, get_type(kind))[1][0].double()
        changed[fields[part]] = matrix
    return type(experts)(**{name: changed.get(name, getattr(experts, name)) for name in experts.__slots__})


def rounded_in(group):
    """Return which expert (None for all) and which projections the names of a group hold."""
    parts = set()
    for weight in group.weights:
        leaf = weight.pattern.lower()
        parts |= {part for part in PARTS if part in leaf.rpartition("experts")[2]}
    return group.weights[0].expert, sorted(parts)


@pytest.mark.parametrize("groups", [by_expert, pytest.param(by_matrix, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "family", [name if name == "olmoe" else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
)
def test_it_is_how_far_the_output_of_the_layer_is_off(family, groups, tmp_path):
    folder = tiny_checkpoint(tmp_path / family, family, **FAMILIES[family])
    source, seen = Source.open(folder), reached(load_model(folder, dtype=torch.float32).double())
    with Stream(source.checkpoint) as stream:
        meter = OutputErrors(
            stream=stream, source=source, batches=list(IDS.split(2)), counts=[None] * 2, types=TYPES, groups=groups
        )
        measured = {key: values for _, some in meter.measure() for key, values in some.items()}
    every = groups(source.weights)
    assert measured.keys() == {group.key for group in every}
    few = every[:: max(1, len(every) // 6)]
    for group in few:
        experts, hidden, index, weight = seen[group.layer]
        expert, parts = rounded_in(group)
        plain = output(experts, hidden, index, weight)
        for kind in TYPES:
            off = output(with_rounded(experts, expert, parts, kind), hidden, index, weight) - plain
            assert measured[group.key][kind] == pytest.approx(float(off.norm()), rel=2e-3, abs=1e-9)
        chosen = (index == expert) & (weight != 0) if expert is not None else weight != 0
        assert measured[group.key]["usage"] == int(chosen.sum())
        assert measured[group.key]["gate_mass"] == pytest.approx(float(weight[chosen].sum()), rel=1e-5)
    assert any(values["Q4_0"] > 2 * values["Q8_0"] > 0 for values in measured.values())


@pytest.mark.long
def test_tokens_that_do_not_count_are_left_out(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", "olmoe", **FAMILIES["olmoe"])
    source, seen = Source.open(folder), reached(load_model(folder, dtype=torch.float32).double())
    counts = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    with Stream(source.checkpoint) as stream:
        meter = OutputErrors(
            stream=stream, source=source, batches=list(IDS.split(2)), counts=list(counts.split(2)), types=("Q4_0",),
            groups=by_expert,
        )  # fmt: skip
        measured = {key: values for _, some in meter.measure() for key, values in some.items()}
    for group in by_expert(source.weights)[:4]:
        experts, hidden, index, weight = seen[group.layer]
        rows = counts.flatten()
        hidden, index, weight = hidden[rows], index[rows], weight[rows]
        changed = with_rounded(experts, group.weights[0].expert, PARTS, "Q4_0")
        off = output(changed, hidden, index, weight) - output(experts, hidden, index, weight)
        assert measured[group.key]["Q4_0"] == pytest.approx(float(off.norm()), rel=2e-3, abs=1e-9)
        assert measured[group.key]["usage"] == int((index == group.weights[0].expert).sum())


@pytest.mark.long
def test_losses_by_expert_are_those_of_the_layer(tmp_path, monkeypatch):
    """Where all rows of all matrices are rounded, what single experts cost adds up to what all of them cost."""
    import coterie.compress.damages as damages_module

    monkeypatch.setattr(damages_module, "ROWS", 10**6)
    monkeypatch.setattr(damages_module, "MATRICES", 10**6)
    folder = tiny_checkpoint(tmp_path / "model", "olmoe", **FAMILIES["olmoe"])
    source, batches, nothing = Source.open(folder), list(IDS.split(2)), [None] * 2
    with Stream(source.checkpoint) as stream:
        apart = {k: v for _, some in edgemoe.meter(stream, source, batches, nothing).measure() for k, v in some.items()}
        meter = damages_module.DamageMeter(
            stream=stream, source=source, batches=batches, counts=nothing, types=edgemoe.TYPES.types
        )
        together = {k: v for _, some in meter.measure() for k, v in some.items()}
    assert apart.keys() == {group.key for group in by_matrix(source.weights)}
    for weight in source.weights:
        if weight.kind == "expert":
            for kind, price in together[weight.pattern].items():
                assert sum(apart[name].get(kind, 0.0) for name in weight.names) == pytest.approx(price, rel=1e-3)
