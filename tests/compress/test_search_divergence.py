"""Divergences of a search against whole models with rounded weights on disk, loaded by stock transformers."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from coterie.compress.moments import Moments, watching
from coterie.compress.projections import DOWN, UP
from coterie.compress.search.bank import Bank
from coterie.compress.search.divergence import Divergences
from coterie.compress.source import Source
from coterie.model.disk.encodings.ggml import get_layout
from coterie.model.disk.encodings.ggml.rounding import round_to_nearest
from coterie.model.stream.stream import Stream
from coterie.testing import tiny_checkpoint

IDS = torch.randint(5, 250, (9, 16), generator=torch.Generator().manual_seed(0))
COUNTS = torch.rand(9, 16, generator=torch.Generator().manual_seed(1)) < 0.5

#: Experts apart, and a head that is the embedding; fused, transposed and with biases; with shared experts.
FAMILIES = {
    "qwen3_moe": {"moe_intermediate_size": 64, "tie_word_embeddings": True},
    "gpt_oss": {"intermediate_size": 32},
    "deepseek_v3": {"moe_intermediate_size": 32},
}


@pytest.fixture(
    scope="module",
    params=[name if name == "qwen3_moe" else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES],
)
def model(request, tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", request.param, **FAMILIES[request.param])


def meter_of(folder, stream, counts=COUNTS):
    source = Source.open(folder)
    weights = [weight for weight in source.weights if weight.fitting("Q4_0")]
    return Divergences(stream=stream, source=source, weights=weights, ids_NS=IDS, counts_NS=counts, bank=Bank(None))


def types_like(weights, *kinds):
    """Give matrices types in turn."""
    return {weight.pattern: weight.fitting(kinds[number % len(kinds)]) for number, weight in enumerate(weights)}


def importance_of(importance, weight, name, number):
    """Return what columns of one tensor weigh, of each expert in it."""
    if weight.layer is not None:
        each_EC = importance.of_experts(weight.layer, DOWN if "down" in name else UP)
        return each_EC[[weight.experts[number]]] if weight.experts else each_EC
    return importance.linear[name][None] if name in importance.linear else torch.ones(1, weight.columns)


def rounded_checkpoint(folder, out, types, importance):
    """Write a checkpoint with each matrix rounded to its type."""
    shutil.copytree(folder, out)
    [file] = out.glob("*.safetensors")
    tensors = load_file(file)
    for weight in (each for each in Source.open(folder).weights if each.pattern in types):
        for number, name in enumerate(weight.names):
            rows = tensors[name].transpose(weight.axis, -1).contiguous()
            matrix_NRC = rows.reshape(-1, *rows.shape[-2:])
            importance_NC = importance_of(importance, weight, name, number)
            _, value_NRC = round_to_nearest(matrix_NRC, importance_NC, get_layout(types[weight.pattern]))
            tensors[name] = value_NRC.reshape(rows.shape).transpose(weight.axis, -1).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return out


def kl_of_whole_models(folder, other, rows, counts):
    """Return the mean KL(original || other) token by token, in float64."""
    both = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (folder, other)]
    total, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            p_SV, q_SV = (each(IDS[row][None]).logits[0].double().log_softmax(-1) for each in both)
        for place in range(len(p_SV) - 1):
            if counts is None or counts[row, place + 1]:
                total += float((p_SV[place].exp() * (p_SV[place] - q_SV[place])).sum())
                tokens += 1
    return total / tokens


@pytest.mark.parametrize(
    "counts",
    [pytest.param(COUNTS, id="some tokens"), pytest.param(None, id="all tokens", marks=pytest.mark.long)],
)
def test_divergences_are_those_of_whole_models_with_rounded_weights(model, counts, tmp_path):
    rows = [0, 2, 3, 8]
    with Stream(Source.open(model).checkpoint) as stream:
        meter = meter_of(model, stream, counts)
        weights = meter.weights
        candidates = [
            types_like(weights, "Q4_0", "Q8_0", "Q5_0"),
            types_like(weights, "Q4_0", "Q8_0", "Q5_0"),
            types_like(weights, "Q4_0"),
        ]
        candidates[1] = candidates[0] | {weights[-1].pattern: weights[-1].fitting("Q4_1")}  # late, or never in the base
        meter.read_original()
        measured = meter.of(candidates, rows)
        importance = meter._importance
    for number, types in enumerate(candidates):
        other = rounded_checkpoint(model, tmp_path / str(number), types, importance)
        expected = kl_of_whole_models(model, other, rows, counts)
        assert expected > 1e-6
        assert measured[number] == pytest.approx(expected, rel=2e-3)
    assert len(set(measured)) == 3


def test_a_model_alone_has_the_divergence_that_it_has_among_others(model):
    with Stream(Source.open(model).checkpoint) as stream:
        meter = meter_of(model, stream)
        candidates = [types_like(meter.weights, *kinds) for kinds in (("Q4_0", "Q8_0"), ("Q8_0", "Q5_0"), ("Q4_0",))]
        meter.read_original()
        together = meter.of(candidates, [1, 4, 5])
        assert [meter.of([each], [1, 4, 5])[0] for each in candidates] == together
        assert meter.of([candidates[0], candidates[0]], [1, 4, 5]) == [together[0]] * 2


def test_columns_weigh_what_moments_have_on_their_diagonal(model):
    source = Source.open(model)
    with Stream(source.checkpoint) as stream:
        meter = meter_of(model, stream)
        meter.read_original()
        linear = [each for each in meter.weights if each.kind == "linear" and not each.head]
        moments = {}
        for stage in stream.run([stream.base_job(IDS)]):
            layers = [layer for layer in source.architecture.layers if stage.unit.holds(layer.experts)]
            names = [stream.conversion.memory_names[each.names[0]] for each in linear]
            inside = [name for name in names if name in stage.unit.names]
            sums = Moments(compares=False)
            with watching(
                stream.model, stage.unit.name, stream.model.get_submodule(stage.unit.name), inside, layers
            ) as seen:
                stage.calls[0].compute(seen.stand_in)
            sums.add(seen, None, COUNTS.flatten())
            moments |= {name: sums.linear_inputs(name) for name in inside}
            moments |= {
                (layer.index, part): sums.expert_inputs(layer.index, between=part == DOWN)
                for layer in layers for part in (UP, DOWN)
            }  # fmt: skip
        assert moments
        for key, inputs in moments.items():
            expected = inputs.hessian_NCC.diagonal(dim1=-2, dim2=-1)
            own = meter._importance.linear[key][None] if isinstance(key, str) else meter._importance.of_experts(*key)
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-8)


def test_a_bank_gives_back_what_rounding_gave_and_rounds_once(monkeypatch):
    matrix_NRC = torch.randn(3, 64, 256, generator=torch.Generator().manual_seed(0))
    importance_NC = torch.rand(3, 256, generator=torch.Generator().manual_seed(1)) + 0.1
    bank = Bank(None)
    for kind in ("Q4_K", "IQ2_XXS", "Q8_0", "Q3_K.W"):
        bank.add("matrix", kind, matrix_NRC, importance_NC)
        _, value_NRC = round_to_nearest(matrix_NRC, importance_NC, get_layout(kind))
        assert torch.equal(bank.values("matrix", kind), value_NRC), kind
        assert ("matrix", kind) in bank
    assert ("matrix", "Q6_K") not in bank
