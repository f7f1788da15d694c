"""Blocks across the rows of a matrix: where rows are no whole blocks, its columns are."""

import itertools
import json
import re

import pytest
import torch

from checkpoints import weight_digests
from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.compress.frontier import frontier
from coterie.compress.moments import Inputs
from coterie.compress.plan import Plan
from coterie.compress.prices import Prices, price
from coterie.compress.quantisers.gptq import gptq
from coterie.compress.quantisers.nearest import nearest
from coterie.errors import Infeasible, InputError, UnknownName
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.ggml import get_layout, get_type
from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.testing import tiny_checkpoint
from coterie.train import distill
from coterie.train.blocks import Blocks

TEXT = {"tokens": 128, "seq_len": 32}

#: Experts stored alone, fused and transposed: rows of 32 numbers and columns of 256.
FAMILIES = {
    "olmoe": {"intermediate_size": 32},
    "granitemoe": {"intermediate_size": 32},
    "gpt_oss": {"intermediate_size": 32},
}


def problem(rows=256, columns=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    inputs = torch.randn(3 * columns, columns, generator=generator) @ mix
    weight = torch.randn(1, rows, columns, generator=generator)
    return weight, Inputs(hessian_NCC=(inputs.T @ inputs)[None], missed_NCC=None, num_tokens=(3 * columns,))


def slow_gptq(weight_RC, hessian_CC, kind, damping):
    """Optimal brain surgery (arXiv:2208.11580, eq. 3), column by column; each is rounded in blocks of its own."""
    weight = weight_RC.double().clone()
    eye = torch.eye(weight.shape[1], dtype=torch.float64)
    inverse = torch.linalg.inv(hessian_CC.double() + damping * hessian_CC.double().diagonal().mean() * eye)
    value = torch.zeros_like(weight)
    for column in range(weight.shape[1]):
        for start in range(0, weight.shape[0], kind.block):
            block_11B = weight[None, None, start : start + kind.block, column].float()
            scales = kind.fit(block_11B, torch.ones(1, 1, kind.block))
            for first in range(0, kind.block, kind.together):
                here = slice(first, first + kind.together)
                _, chosen = kind.choose(block_11B[..., here], scales, first, torch.eye(kind.together)[None])
                value[start + first : start + first + kind.together, column] = chosen[0, 0].double()
        wrong = (weight[:, column] - value[:, column]) / inverse[column, column]
        weight = weight - torch.outer(wrong, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return value


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "IQ2_XXS"])
def test_it_is_the_papers_elimination_with_blocks_of_columns(name):
    weight, inputs = problem(columns=40)
    _, value = gptq(weight, inputs, get_layout(f"{name}.T"), damping=0.01)
    expected = slow_gptq(weight[0], inputs.hessian_NCC[0], get_type(name), 0.01)
    # A number in the middle between two codes may go either way, and what follows goes with it.
    assert ((value[0].double() - expected).abs() > 1e-5)[:, :4].float().mean() < 0.01
    hessian = inputs.hessian_NCC[0].double()
    mine, theirs = (
        torch.einsum("rc,cd,rd->", wrong, hessian, wrong).item()
        for wrong in (value[0].double() - weight[0], expected - weight[0])
    )
    assert mine == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize("quantise", [nearest, gptq])
@pytest.mark.parametrize("name", ["Q8_0", "Q2_K", "IQ3_XXS"])
def test_bytes_are_values(quantise, name):
    weight, inputs = problem(rows=512)
    packed, value = quantise(weight, inputs, get_layout(f"{name}.T"))
    encoding = GgmlBlocks(type=name, axis=-2, dtype="F32")
    assert [("U8", tuple(packed.shape[1:]))] == list(encoding.stored(tuple(weight.shape[1:])).values())
    torch.testing.assert_close(encoding.unpack({"": packed[0]}), value[0], rtol=1e-6, atol=0)
    if quantise is nearest:
        assert torch.equal(packed[0], encoding.pack(weight[0])[""])
    blocks = Blocks(f"{name}.T", packed)
    assert blocks.shape == weight.shape
    torch.testing.assert_close(blocks.values(blocks.ones()), value, rtol=1e-6, atol=0)
    assert torch.equal(blocks.bytes(blocks.ones()), packed)


def test_rows_that_are_no_blocks_are_refused():
    weight, inputs = problem(rows=100)
    with pytest.raises(ValueError, match="100"):
        gptq(weight, inputs, get_layout("Q4_K.T"))
    with pytest.raises(UnknownName):
        get_layout("Q7_K.T")


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    folder, done = tmp_path_factory.mktemp("across"), {}

    def make(family):
        if family not in done:
            done[family] = tiny_checkpoint(
                folder / family, family, dtype=torch.float32, hidden_size=256, **FAMILIES[family]
            )
        return done[family]

    return make


def crossing(out):
    """Return the tensors of a result whose blocks run across rows."""
    [groups] = [json.loads((out / "config.json").read_text())["quantization_config"]["groups"]]
    plan_of = {name: (group["type"], group["axis"]) for group in groups for name in group["tensors"]}
    return {name: each for name, each in plan_of.items() if "down_proj" in name or "output_linear" in name}


@pytest.mark.parametrize("family", ["olmoe", *[pytest.param(name, marks=pytest.mark.long) for name in FAMILIES][1:]])
def test_every_weight_is_near_to_what_it_was_and_in_its_place(family, model_of, text_folder, tmp_path):
    model, out = model_of(family), tmp_path / "out"
    result = compress(model, out, type="Q6_K", target="packed", recipe="gptq", text=text_folder, **TEXT)
    types = crossing(out)
    assert {kind for kind, _ in types.values()} == {"Q6_K"}
    assert {axis for _, axis in types.values()} == {-1 if family == "gpt_oss" else -2}
    original, packed = (load_model(each, dtype=torch.float32).state_dict() for each in (model, out))
    for name, tensor in original.items():
        off = (tensor - packed[name]).norm() / tensor.norm().clamp(min=1e-9)
        assert off < 0.03, name
    assert result.logits_error <= 1e-6
    assert sum(info.num_bytes for info in Checkpoint.open(out).tensors.values()) == result.plan.predicted_bytes


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_of_columns_are_trained(family, model_of, text_folder, tmp_path, monkeypatch):
    model, settings = model_of(family), {"bits": 3, "target": "packed", "text": text_folder, **TEXT}
    untrained = compress(model, tmp_path / "untrained", effort="fast", **settings)
    falling = itertools.count(0.5, -0.01)  # whatever it is worth: random models may not gain
    monkeypatch.setattr(distill, "mean_loss", lambda *arguments, **options: next(falling))
    trained = compress(model, tmp_path / "trained", train_tokens=256, **settings)
    assert any(kind.endswith(".T") for kind in trained.plan.types.values())
    assert trained.plan.types == untrained.plan.types
    assert trained.logits_error <= 1e-6  # what is loaded computes what was trained
    assert weight_digests(trained.out) != weight_digests(untrained.out)
    stored = Checkpoint.open(trained.out).tensors.values()
    assert sum(info.num_bytes for info in stored) == trained.plan.predicted_bytes


def test_a_plan_of_it_is_smaller_and_runs(model_of, text_folder, tmp_path):
    model = model_of("olmoe")
    wide, narrow = (plan(model, type="Q2_K", target=target) for target in ("packed", "gguf"))
    assert wide.predicted_bytes < narrow.predicted_bytes
    assert not any(kind.endswith(".T") for kind in narrow.types.values())
    wide.save(tmp_path / "plan.json")
    result = compress(model, tmp_path / "out", plan=tmp_path / "plan.json", text=text_folder, **TEXT)
    assert result.plan.types == wide.types


def test_plans_say_what_cannot_cross(model_of, text_folder, tmp_path):
    model = model_of("olmoe")
    made = plan(model, type="Q4_K", target="packed")
    gate = next(name for name in made.types if "gate_proj" in name)
    for name, kind, message in (
        (gate, "Q4_K.T", "down projections and of linear layers alone"),
        ("lm_head.weight", "Q4_K.T", "down projections and of linear layers alone"),
        (gate.replace("gate", "down"), "Q9_K.T", "types that can be written"),
    ):
        body = made.body()
        body["types"] = {**made.types, name: kind}
        changed = Plan.from_body(body, made.inputs, where="here")
        with pytest.raises(Infeasible, match=re.escape(f"stores {name} as {kind}") + f".*{message}"):
            compress(model, tmp_path / "out", plan=changed, text=text_folder, **TEXT)


def test_prices_of_both_are_measured_and_the_target_says_which_count(model_of, text_folder, tmp_path):
    model = model_of("olmoe")
    prices = price(model, tmp_path / "prices", text=text_folder, **TEXT)
    down = next(name for name in prices.damages if "down_proj" in name)
    assert {"IQ4_NL", "Q2_K.T", "IQ2_XXS.T"} <= prices.damages[down].keys()
    up = next(name for name in prices.damages if "up_proj" in name)
    assert not any(kind.endswith(".T") for kind in prices.damages[up])
    assert Prices.load(tmp_path / "prices").damages == prices.damages
    with pytest.raises(Infeasible, match=r"rows of 32 numbers, as in .*down_proj.*--target packed"):
        plan(model, bits=2.2, prices=prices)
    packed = plan(model, bits=2.2, prices=prices, target="packed")
    assert any(kind.endswith(".T") for kind in packed.types.values())
    floors = [min(point.num_bytes for point in frontier(model, prices, target=t).mixed) for t in ("gguf", "packed")]
    assert floors[1] < floors[0]


def test_a_target_is_for_fewer_bits_only(model_of):
    with pytest.raises(InputError, match="--target packed is about weights in fewer bits"):
        plan(model_of("olmoe"), keep=0.5, target="packed")
    with pytest.raises(UnknownName, match="onnx"):
        plan(model_of("olmoe"), bits=4.5, target="onnx")
