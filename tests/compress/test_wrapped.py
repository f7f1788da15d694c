"""Blocks that run on from row to row, where a row is no whole blocks."""

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
from coterie.errors import Infeasible, InputError, UnknownName, UnsupportedDtype
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings import encoding_from
from coterie.model.disk.encodings.ggml import OWN_TYPES, SIZES, get_layout, get_type
from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.publish.modeling_coterie import CoterieModel
from coterie.testing import tiny_checkpoint
from coterie.train import distill
from coterie.train.blocks import Blocks

TEXT = {"tokens": 128, "seq_len": 32}

#: Experts stored alone, fused, and transposed with gate and up in turns: rows of 96 and of 64 numbers.
FAMILIES = {
    "olmoe": {"hidden_size": 96, "intermediate_size": 64},
    "granitemoe": {"hidden_size": 96, "intermediate_size": 64},
    "gpt_oss": {"hidden_size": 96, "intermediate_size": 64},
}


def problem(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    inputs = torch.randn(3 * columns, columns, generator=generator) @ mix
    weight = torch.randn(1, rows, columns, generator=generator)
    return weight, Inputs(hessian_NCC=(inputs.T @ inputs)[None], missed_NCC=None, num_tokens=(3 * columns,))


def slow_gptq(weight_RC, hessian_CC, kind, damping):
    """Optimal brain surgery (arXiv:2208.11580, eq. 3), column by column; blocks are of the matrix read row by row."""
    weight = weight_RC.double().clone()
    rows, columns = weight.shape
    eye = torch.eye(columns, dtype=torch.float64)
    damped = hessian_CC.double() + damping * hessian_CC.double().diagonal().mean() * eye
    pivots, inverse = [], torch.linalg.inv(damped)
    for column in range(columns):  # what is on the diagonal when a column's turn comes
        pivots.append(inverse[column, column].item())
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    importance = (1 / torch.tensor(pivots)).repeat(rows)
    scales = [
        kind.fit(
            weight_RC.reshape(-1)[None, None, start : start + kind.block],
            importance[None, None, start : start + kind.block],
        )
        for start in range(0, rows * columns, kind.block)
    ]
    inverse = torch.linalg.inv(damped)
    value = torch.zeros_like(weight)
    for column in range(columns):
        for row in range(rows):
            block, place = divmod(row * columns + column, kind.block)
            one = weight[None, row, None, column : column + 1].float()
            _, chosen = kind.choose(one, scales[block], place, torch.ones(1, 1, 1))
            value[row, column] = chosen.item()
        wrong = (weight[:, column] - value[:, column]) / inverse[column, column]
        weight = weight - torch.outer(wrong, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return value


def lost(value, weight, inputs):
    wrong = (value - weight).double()
    return torch.einsum("nrc,ncd,nrd->", wrong, inputs.hessian_NCC.double(), wrong).item()


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "Q2_K"])
def test_it_is_the_papers_elimination_with_blocks_of_several_rows(name):
    weight, inputs = problem(rows=16, columns=96)
    _, value = gptq(weight, inputs, get_layout(f"{name}.W"), damping=0.01)
    expected = slow_gptq(weight[0], inputs.hessian_NCC[0], get_type(name), 0.01)
    # A number in the middle between two codes may go either way, and what follows goes with it.
    assert ((value[0].double() - expected).abs() > 1e-5)[:, :8].float().mean() < 0.01
    assert lost(value, weight, inputs) == pytest.approx(lost(expected[None], weight, inputs), rel=0.03)


@pytest.mark.parametrize("quantise", [nearest, gptq])
@pytest.mark.parametrize("name", [name for name in SIZES if name not in OWN_TYPES])
@pytest.mark.parametrize("columns", [96, 320])
def test_bytes_are_values(quantise, name, columns):
    weight, inputs = problem(rows=16, columns=columns)
    weight = torch.cat((weight, 3 * weight.flip(1)))
    inputs = Inputs(hessian_NCC=inputs.hessian_NCC.repeat(2, 1, 1), missed_NCC=None, num_tokens=(1, 1))
    packed, value = quantise(weight, inputs, get_layout(f"{name}.W"))
    encoding = GgmlBlocks(type=name, dtype="F32", columns=columns)
    assert [("U8", tuple(packed.shape[1:]))] == list(encoding.stored(tuple(weight.shape[1:])).values())
    assert encoding.shape_of(tuple(packed.shape)) == weight.shape
    assert encoding_from(encoding.config()) == encoding
    torch.testing.assert_close(encoding.unpack({"": packed}), value, rtol=1e-6, atol=0)
    blocks = Blocks(f"{name}.W", packed, columns)
    assert blocks.shape == weight.shape
    torch.testing.assert_close(blocks.values(blocks.ones()), value, rtol=1e-6, atol=0)
    if name != "MXFP4":
        assert torch.equal(blocks.bytes(blocks.ones()), packed)
    if quantise is gptq:  # what later columns make good
        _, plain = nearest(weight, inputs, get_layout(f"{name}.W"))
        assert lost(value, weight, inputs) < lost(plain, weight, inputs)
    else:
        again = encoding.unpack(encoding.pack(value))
        assert (again - value).norm() < 0.1 * value.norm()


@pytest.mark.parametrize("name", ["Q4_0", "Q2_K"])
def test_where_rows_are_whole_blocks_nothing_is_another(name):
    weight, inputs = problem(rows=4, columns=256)
    for layout in (get_layout(name), get_layout(f"{name}.W")):
        packed, _ = nearest(weight, inputs, layout)
        assert torch.equal(packed, nearest(weight, inputs, get_layout(name))[0])


def test_rows_that_make_no_blocks_are_refused():
    weight, inputs = problem(rows=12, columns=96)
    with pytest.raises(ValueError, match="12 rows of 96 columns are no whole blocks of 256"):
        gptq(weight, inputs, get_layout("Q4_K.W"))
    with pytest.raises(UnknownName):
        get_layout("Q7_K.W")
    encoding = GgmlBlocks(type="Q4_K", columns=96)
    with pytest.raises(UnsupportedDtype, match="a multiple of 8 along axis -2"):
        encoding.stored((12, 96))
    with pytest.raises(UnsupportedDtype, match="holds no rows of 96"):
        encoding.shape_of((4, 144))
    with pytest.raises(ValueError, match="columns is 90"):
        GgmlBlocks(type="Q4_K", columns=90)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    folder, done = tmp_path_factory.mktemp("across"), {}

    def make(family):
        if family not in done:
            done[family] = tiny_checkpoint(folder / family, family, dtype=torch.float32, **FAMILIES[family])
        return done[family]

    return make


def wrapped(out):
    """Return the patterns of tensors in a result whose blocks run on from row to row, with type and axis."""
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["groups"]
    return {name: (each["type"], each["axis"]) for each in groups for name in each["tensors"] if "columns" in each}


@pytest.mark.parametrize("family", ["olmoe", *[pytest.param(name, marks=pytest.mark.long) for name in FAMILIES][1:]])
def test_every_weight_is_near_to_what_it_was_and_in_its_place(family, model_of, text_folder, tmp_path):
    model, out = model_of(family), tmp_path / "out"
    result = compress(model, out, type="Q6_K", target="packed", recipe="gptq", text=text_folder, **TEXT)
    types = wrapped(out)
    assert set(types.values()) == {("Q6_K", -1)} | ({("Q6_K", -2)} if family == "gpt_oss" else set())
    gates = [name for name in types if "gate_up" in name or "gate_proj" in name or "input_linear" in name]
    assert len(gates) == (0 if family == "gpt_oss" else 2)  # there they take turns
    original, packed = (load_model(each, dtype=torch.float32).state_dict() for each in (model, out))
    for name, tensor in original.items():
        off = (tensor - packed[name]).norm() / tensor.norm().clamp(min=1e-9)
        assert off < 0.04, name
    for name, tensor in CoterieModel.from_pretrained(out, dtype=torch.float32).state_dict().items():
        assert torch.equal(tensor, packed[name]), name
    assert result.logits_error <= 1e-6
    assert sum(info.num_bytes for info in Checkpoint.open(out).tensors.values()) == result.plan.predicted_bytes


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_are_trained(family, model_of, text_folder, tmp_path, monkeypatch):
    model, settings = model_of(family), {"bits": 3.6, "target": "packed", "text": text_folder, **TEXT}
    untrained = compress(model, tmp_path / "untrained", effort="fast", **settings)
    falling = itertools.count(0.5, -0.01)  # whatever it is worth: random models may not gain
    monkeypatch.setattr(distill, "mean_loss", lambda *arguments, **options: next(falling))
    trained = compress(model, tmp_path / "trained", train_tokens=256, **settings)
    assert any(kind.endswith(".W") for kind in trained.plan.types.values())
    assert trained.plan.types == untrained.plan.types
    assert trained.logits_error <= 1e-6  # what is loaded computes what was trained
    assert weight_digests(trained.out) != weight_digests(untrained.out)
    stored = Checkpoint.open(trained.out).tensors.values()
    assert sum(info.num_bytes for info in stored) == trained.plan.predicted_bytes


def test_a_plan_of_it_is_smaller_and_runs(model_of, text_folder, tmp_path):
    model = model_of("olmoe")
    wide, narrow = (plan(model, type="Q2_K", target=target) for target in ("packed", "gguf"))
    assert wide.predicted_bytes < narrow.predicted_bytes
    assert not any(kind.endswith(".W") for kind in narrow.types.values())
    wide.save(tmp_path / "plan.json")
    result = compress(model, tmp_path / "out", plan=tmp_path / "plan.json", text=text_folder, **TEXT)
    assert result.plan.types == wide.types


def test_plans_say_what_cannot_be(model_of, text_folder, tmp_path):
    model = model_of("gpt_oss")
    made = plan(model, type="Q4_K", target="packed")
    gate, down = (next(name for name in made.types if part in name) for part in ("gate_up_proj", "down_proj"))
    for name, kind, message in (
        (gate, "Q4_K.W", "its rows take turns with those of another matrix"),
        (down, "Q9_K.W", "types that can be written"),
        (down, "Q4_K", "its rows have 64 numbers"),
    ):
        body = made.body()
        body["types"] = {**made.types, name: kind}
        changed = Plan.from_body(body, made.inputs, where="here")
        with pytest.raises(Infeasible, match=re.escape(f"stores {name} as {kind}") + f".*{message}"):
            compress(model, tmp_path / "out", plan=changed, text=text_folder, **TEXT)


@pytest.mark.long
def test_prices_of_both_are_measured_and_the_target_says_which_count(model_of, text_folder, tmp_path):
    model = model_of("olmoe")
    prices = price(model, tmp_path / "prices", text=text_folder, **TEXT)
    down = next(name for name in prices.damages if "down_proj" in name)
    assert {"IQ4_NL", "Q2_K.W", "IQ2_XXS.W"} <= prices.damages[down].keys()
    # The same numbers, in blocks that lie otherwise: about as many bits cost about as much.
    assert 0.3 < prices.damages[down]["Q4_K.W"] / prices.damages[down]["IQ4_NL"] < 3
    assert any(kind.endswith(".W") for kind in prices.damages["model.embed_tokens.weight"])
    assert Prices.load(tmp_path / "prices").damages == prices.damages
    with pytest.raises(Infeasible, match=r"rows of \d+ numbers, as in .*--target packed"):
        plan(model, bits=2.7, prices=prices)
    packed = plan(model, bits=2.7, prices=prices, target="packed")
    assert any(kind.endswith(".W") for kind in packed.types.values())
    floors = [min(point.num_bytes for point in frontier(model, prices, target=t).mixed) for t in ("gguf", "packed")]
    assert floors[1] < floors[0]


def test_a_target_is_for_fewer_bits_only(model_of):
    with pytest.raises(InputError, match="--target packed is about weights in fewer bits"):
        plan(model_of("olmoe"), keep=0.5, target="packed")
    with pytest.raises(UnknownName, match="onnx"):
        plan(model_of("olmoe"), bits=4.5, target="onnx")
