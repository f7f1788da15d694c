"""Planes of bits as types: codes against float64 loops, results beside what they were made from, prefixes of theirs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.compress.layer_plan import ragged_plan
from coterie.compress.moments import Inputs
from coterie.compress.quantisers.corrected import corrected
from coterie.compress.quantisers.gptq import gptq
from coterie.compress.quantisers.nearest import nearest
from coterie.errors import Infeasible, InputError, UnknownName
from coterie.export.run import export
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings import plane_groups
from coterie.model.disk.encodings.bit_planes import BitPlanes, read_in_fewer_bits
from coterie.model.disk.encodings.block_types import SIZES, bits_of, get_layout, get_type
from coterie.model.disk.encodings.plane_types import PLANE_NAMES, PLANES
from coterie.model.disk.open import open_checkpoint
from coterie.publish.modeling_coterie import CoterieModel
from coterie.testing import tiny_checkpoint

TEXT = {"tokens": 128, "seq_len": 32}


def problem(columns, rows=4, matrices=1, seed=0):
    """Return weights, and Hessians of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(matrices, columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    inputs = torch.randn(matrices, 2 * columns, columns, generator=generator) @ mix
    weight = torch.randn(matrices, rows, columns, generator=generator)
    return weight, Inputs(hessian_NCC=inputs.mT @ inputs, missed_NCC=None, num_tokens=(1,) * matrices)


def half(value):
    return float(np.float16(value))


def slow_value(code, scales):
    """Return what a code stands for in two bits, in three and so on: base in the lowest two bits, signs above."""
    step, *signs = scales
    values = [((code & 3) - 1.5) * step]
    for plane, counts in enumerate(signs):
        values.append(values[-1] + (-counts if code >> plane + 2 & 1 else counts))
    return np.array(values)


def slow_scales(values, weights, bits):
    """Return the step that leaves the least in all planes, of those that are tried, and what signs then count."""
    best, least = None, np.inf
    for share in [0.4 + 0.05 * place for place in range(13)]:
        step = half(share * np.abs(values).max() / 1.5)
        levels = np.clip(np.floor(values / step), -2, 1) + 0.5
        scales, missing = [step], values - levels * step
        for _ in range(bits - 2):
            counts = half((weights * np.abs(missing)).sum() / weights.sum())
            missing = np.array([left + counts if left < 0 else left - counts for left in missing])
            scales.append(counts)
        if (error := (weights * missing**2).sum()) < least:
            best, least = scales, error
    return best


def slow_gptq(weight, hessian, bits, group, counts, damping=0.01):
    """Optimal brain surgery in float64, one column after the other (arXiv:2208.11580, eq. 3; arXiv:2210.17323).

    Numbers of each number of bits go their own way, and have their codes in common: `counts` says how much each counts.
    """
    ways, columns = [weight.copy() for _ in counts], weight.shape[1]
    damped = hessian + damping * np.diag(hessian).mean() * np.eye(columns)
    pivots, inverse = [], np.linalg.inv(damped)
    for column in range(columns):
        pivots.append(inverse[column, column])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    inverse, values = np.linalg.inv(damped), [np.zeros_like(weight) for _ in counts]
    for column in range(columns):
        if column % group == 0:
            some = slice(column, column + group)
            scales = [slow_scales(row[some], 1 / np.array(pivots[some]), bits) for row in ways[-1]]
        for number, of_row in enumerate(scales):
            wanted = np.array([way[number, column] for way in ways])
            choices = [slow_value(code, of_row) for code in range(2**bits)]
            chosen = min(choices, key=lambda choice, wanted=wanted: (counts * (wanted - choice) ** 2).sum())
            for value, each in zip(values, chosen, strict=True):
                value[number, column] = each
        for place, value in enumerate(values):
            wrong = (ways[place][:, column] - value[:, column]) / inverse[column, column]
            ways[place] = ways[place] - np.outer(wrong, inverse[column])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return values


def losses(weight, values, hessian):
    """Return how far off outputs are, of each matrix."""
    wrong = (values - weight).double()
    return torch.einsum("nrc,ncd,nrd->n", wrong, hessian.double(), wrong)


def prefixes(byte_NRK, name, shape):
    """Return the values in two bits, in three and so on, of bytes that a quantiser returned."""
    bits, group = PLANES[name]
    encoding = BitPlanes(bits=bits, group=group, dtype="F32")
    byte_K = encoding.in_planes(byte_NRK).flatten()
    return [encoding.unpack_prefix(byte_K, tuple(shape), fewer) for fewer in range(2, bits + 1)]


@pytest.mark.parametrize(
    ("name", "weight"), [("PLANES4_G32", 0.0), ("PLANES3_G64", 0.0), ("PLANES4_G32", 0.5), ("PLANES3_G32", 2.0)]
)
def test_feedback_is_the_papers_elimination(name, weight):
    (bits, group), (matrix, inputs) = PLANES[name], problem(64)
    byte_NRK, value = gptq(matrix, inputs, get_layout(name), prefix_weight=weight)
    counts = weight ** np.arange(bits - 2, -1, -1.0)
    hessian = inputs.hessian_NCC
    expected = slow_gptq(matrix[0].double().numpy(), hessian[0].double().numpy(), bits, group, counts)
    found = prefixes(byte_NRK, name, matrix.shape)
    assert torch.equal(found[-1], value)
    for place, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        different = np.abs(mine[0].numpy() - theirs) > 1e-5
        # What lies between two numbers may go either way, and the columns behind it with it.
        assert not different[:, : group // 2].any()
        assert different.mean() < 0.1
        if counts[place]:
            errors = [losses(matrix, values, hessian) for values in (mine, torch.tensor(theirs)[None])]
            assert float(errors[0]) == pytest.approx(float(errors[1]), rel=0.05)


@pytest.mark.parametrize("name", PLANES)
def test_bytes_are_values_and_feedback_makes_the_error_smaller(name):
    matrix, inputs = problem(128, rows=6, matrices=2)
    kind, size = get_type(name), SIZES[name][1]
    errors = []
    for quantiser, options in ((nearest, {}), (gptq, {}), (corrected, {}), (corrected, {"prefix_weight": 0.1})):
        byte_NRK, value = quantiser(matrix, inputs, kind, **options)
        assert byte_NRK.shape == (2, 6, 128 // kind.block * size)
        assert torch.equal(kind.unpack(byte_NRK.unflatten(-1, (-1, size))).flatten(-2), value)
        assert torch.equal(prefixes(byte_NRK, name, value.shape)[-1], value)
        errors.append(losses(matrix, value, inputs.hessian_NCC).sum())
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] == errors[1]  # nothing is known that could be corrected
    assert errors[3] > errors[1]


def test_the_more_fewer_bits_weigh_the_better_they_are_and_the_worse_all():
    matrix, inputs = problem(128, rows=32)
    errors = []
    for weight in (0.0, 0.1, 0.5, 2.0):
        byte_NRK, _ = gptq(matrix, inputs, get_type("PLANES4_G64"), prefix_weight=weight)
        values = prefixes(byte_NRK, "PLANES4_G64", matrix.shape)
        errors.append([float(losses(matrix, value, inputs.hessian_NCC)) for value in values])
    base, _, whole = zip(*errors, strict=True)
    assert list(base) == sorted(base, reverse=True)
    assert list(whole) == sorted(whole)
    assert errors[1][1] < errors[0][1]


def test_rows_that_are_rounded_apart_are_the_same(monkeypatch):
    matrix, inputs = problem(64, rows=10, matrices=3)
    whole = gptq(matrix, inputs, get_type("PLANES3_G32"), prefix_weight=0.3)
    monkeypatch.setattr(plane_groups, "_TARGETS_AT_ONCE", 3 * 64 * 4)
    apart = gptq(matrix, inputs, get_type("PLANES3_G32"), prefix_weight=0.3)
    assert all(torch.equal(*each) for each in zip(whole, apart, strict=True))
    with pytest.raises(ValueError, match="40 columns are no whole groups of 32, as PLANES3_G32 has them"):
        gptq(*problem(40), get_type("PLANES3_G32"), prefix_weight=0.3)


def test_types_have_names_sizes_and_bits():
    assert {name for name in SIZES if name.startswith("PLANES")} == set(PLANES)
    assert set(PLANE_NAMES.values()) <= set(PLANES)
    assert [bits_of(name) for name in ("PLANES4_G32", "PLANES4_G128", "PLANES3_G64")] == [5.5, 4.375, 3.5]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose rows have 128 numbers, but for those of down, which have 64."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "moe_intermediate_size": 64}
    return tiny_checkpoint(tmp_path_factory.mktemp("planes") / "model", "qwen3_moe", **sizes)


@pytest.mark.parametrize("recipe", ["nearest", "gptq"])
def test_a_result_is_read_as_it_was_written_whole_and_in_part(model, text_folder, tmp_path, recipe):
    """With Coterie, with transformers alone, and in fewer bits from the same file."""
    out = tmp_path / "out"
    result = compress(model, out, type="planes4", target="packed", recipe=recipe, text=text_folder, **TEXT)
    assert result.logits_error <= 1e-6
    kinds = {name.rpartition(".layers.0.")[2]: kind for name, kind in result.plan.types.items()}
    assert kinds["mlp.experts.*.gate_proj.weight"] == kinds["self_attn.q_proj.weight"] == "PLANES4_G128"
    assert kinds["mlp.experts.*.down_proj.weight"] == "PLANES4_G64"
    assert result.plan.predicted_bytes == Checkpoint.open(out).num_bytes
    before, after = (load_model(folder, dtype=torch.float32).state_dict() for folder in (model, out))
    far = {name: float((before[name] - after[name]).norm() / before[name].norm()) for name in before}
    experts = next(far[name] for name in far if "gate_up" in name)
    assert 0.05 < experts < 0.2  # a matrix in the place of another one would be off by 1.4
    stock = CoterieModel.from_pretrained(out, dtype=torch.float32).state_dict()
    assert stock.keys() == after.keys()
    assert all(torch.equal(stock[name], after[name]) for name in after)
    checkpoint, plain = open_checkpoint(out), open_checkpoint(model)
    name = "model.layers.0.mlp.experts.1.gate_proj.weight"
    with plain.reader() as original, checkpoint.reader() as packed:
        wanted, whole = original.read(name).double(), packed.read(name).double()
    values = [read_in_fewer_bits(out, checkpoint.tensors[name], bits).double() for bits in (2, 3, 4)]
    assert torch.equal(values[-1], whole)
    first, second, third = (float((value - wanted).square().mean() / wanted.square().mean()) for value in values)
    assert third < 0.5 * second < 0.2 * first < 0.2


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("gpt_oss", {"hidden_size": 64, "intermediate_size": 64}),
        ("qwen3_vl_moe", {"moe_intermediate_size": 32}),
        ("mixtral", {"intermediate_size": 64}),
    ],
)
def test_other_families_are_read_too(family, sizes, text_folder, tmp_path):
    """Experts in one tensor with transposed matrices, and gate and up that take turns; and w1, w2, w3."""
    model, out = tiny_checkpoint(tmp_path / "model", family, **sizes), tmp_path / "out"
    result = compress(model, out, type="PLANES3", target="packed", recipe="gptq", text=text_folder, **TEXT)
    assert result.logits_error <= 1e-6
    assert {kind for name, kind in result.plan.types.items() if ".experts" in name} <= {*PLANES}
    assert result.plan.predicted_bytes == Checkpoint.open(out).num_bytes
    before, after = (load_model(folder, dtype=torch.float32).state_dict() for folder in (model, out))
    packed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("experts" in name for name in packed)
    assert all(float((before[name] - after[name]).norm() / before[name].norm()) < 0.4 for name in packed)
    stock = CoterieModel.from_pretrained(out, dtype=torch.float32).state_dict()
    assert all(torch.equal(stock[name], after[name]) for name in after)


@pytest.mark.long
def test_experts_of_differing_widths_and_types_are_read_too(text_folder, tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "qwen3_moe", num_hidden_layers=1, moe_intermediate_size=128)
    made = plan(model, type="PLANES4_G32", target="packed", recipe="gptq")
    own = {name.replace("*", "2"): "PLANES3_G32" for name in made.types if ".*.down_proj" in name}
    widths = [(32, 0, 96, 128)[number % 4] for number in range(made.layers[0].num_experts)]
    narrow = replace(made, layers=(ragged_plan(widths),), types=made.types | own)
    out = compress(model, tmp_path / "out", plan=narrow, text=text_folder, **TEXT)
    assert out.plan.predicted_bytes == Checkpoint.open(out.out).num_bytes
    tensors = open_checkpoint(out.out).tensors
    down = [tensors[f"model.layers.0.mlp.experts.{number}.down_proj.weight"].packed.encoding for number in range(4)]
    assert [encoding.inner.bits for encoding in down[:3]] == [4, 4, 3]
    expected = load_model(out.out, dtype=torch.float32).state_dict()
    stock = CoterieModel.from_pretrained(out.out, dtype=torch.float32).state_dict()
    assert all(torch.equal(stock[name], expected[name]) for name in expected)


def test_how_much_fewer_bits_weigh_is_an_option_of_a_plan(model, text_folder, tmp_path):
    whole = plan(model, type="PLANES4_G64", recipe="gptq", target="packed")
    assert set(whole.types.values()) == {"PLANES4_G64", "Q6_K.W"}  # which a head gets at least
    nested = replace(whole, quantiser=("gptq", {"prefix_weight": 1}))
    results = {"whole": compress(model, tmp_path / "whole", plan=whole, text=text_folder, **TEXT)}
    results["nested"] = compress(model, tmp_path / "nested", plan=nested, text=text_folder, **TEXT)
    assert results["nested"].plan.predicted_bytes == Checkpoint.open(tmp_path / "nested").num_bytes
    assert results["nested"].logits_error <= 1e-6
    name = "model.layers.0.mlp.experts.1.gate_proj.weight"
    whole, nested = (
        read_in_fewer_bits(tmp_path / folder, open_checkpoint(tmp_path / folder).tensors[name], 2)
        for folder in ("whole", "nested")
    )
    assert not torch.equal(whole, nested)


def test_the_commands_take_them_together_with_their_reader(model, text_folder, tmp_path):
    wanted = ["--type", "planes3", "--target", "packed", "--recipe", "gptq"]
    planned = CliRunner().invoke(app, ["plan", str(model), *wanted, "--json"])
    assert planned.exit_code == 0, planned.output
    assert "PLANES3_G128" in json.loads(planned.stdout)["types"].values()
    made = ["compress", str(model), str(tmp_path / "out"), "--text", str(text_folder), "--tokens", "128"]
    foretold = CliRunner().invoke(app, [*made, *wanted, "--seq-len", "32", "--dry-run"])
    assert foretold.exit_code == 0, foretold.output
    refused = CliRunner().invoke(app, [*made, *wanted[:2]])
    assert refused.exit_code != 0
    assert not (tmp_path / "out").exists()


def test_what_cannot_hold_them_is_refused(model, text_folder, tmp_path):
    for target in (None, "gguf", "compressed-tensors"):
        with pytest.raises(InputError, match=r"PLANES4 is a type that no GGUF file holds: say --target packed"):
            plan(model, type="planes4", recipe="nearest", target=target)
    with pytest.raises(UnknownName, match="type 'PLANES8'"):
        plan(model, type="PLANES8", recipe="nearest", target="packed")
    whole = plan(model, type="PLANES3", recipe="nearest", target="packed")
    down = "model.layers.0.mlp.experts.*.down_proj.weight"
    wrong = replace(whole, types={**whole.types, down: "PLANES3_G128"})
    with pytest.raises(Infeasible, match=r"in blocks of 128; its rows have 64 numbers: take PLANES3_G64"):
        compress(model, tmp_path / "out", plan=wrong, text=text_folder, **TEXT)
    wrong = replace(whole, types={**whole.types, down: "PLANES3_G128.W"})
    with pytest.raises(Infeasible, match=r"stores .* as PLANES3_G128.W; types that can be written are"):
        compress(model, tmp_path / "out", plan=wrong, text=text_folder, **TEXT)
    trained = replace(whole, result_steps=(("distill-blocks", {}),))
    with pytest.raises(
        Infeasible, match=r"in planes of bits, and distill-blocks trains scales of blocks: leave it out"
    ):
        compress(model, tmp_path / "out", plan=trained, text=text_folder, **TEXT)
    assert not (tmp_path / "out").exists()
    out = compress(model, tmp_path / "out", plan=whole, text=text_folder, **TEXT).out
    with pytest.raises(InputError, match=r"is stored as planes of bits, which no GGUF file can hold; .* --type Q4_K"):
        export(out, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_rows_that_are_no_whole_groups_are_refused(model, tmp_path):
    with pytest.raises(Infeasible, match=r"down_proj.weight have 64 numbers, .* groups of 128: take PLANES4_G64"):
        plan(model, type="PLANES4_G128", recipe="nearest", target="packed")
    narrow = tiny_checkpoint(tmp_path / "narrow", "qwen3_moe", num_hidden_layers=1, moe_intermediate_size=48)
    with pytest.raises(Infeasible, match=r"have 48 numbers, .* groups of 32, 64, 128: take another type"):
        plan(narrow, type="PLANES4", recipe="nearest", target="packed")


def test_they_are_never_chosen_by_themselves(model):
    for bits in (5.6, 4.4, 3.6):
        chosen = plan(model, bits=bits, recipe="nearest", target="packed").types.values()
        assert not set(chosen) & set(PLANES)
