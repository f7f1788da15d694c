"""Experts as a base that all of a layer share, and a difference of low rank for each."""

import json
import re
import shutil

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import coterie
from checkpoints import tensors_of, weight_digests
from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.compress.layers import LayerWriter
from coterie.compress.moments import Inputs
from coterie.compress.plan import Plan
from coterie.compress.quantisers.gptq import gptq
from coterie.compress.shared_base import best_base, best_factors, damped, factored, refitted
from coterie.errors import CorruptCheckpoint, Infeasible, InputError
from coterie.export.run import export
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.ggml import get_layout
from coterie.model.disk.encodings.shared_base import SharedBaseType
from coterie.model.disk.open import open_checkpoint
from coterie.publish.modeling_coterie import CoterieModel
from coterie.testing import tiny_checkpoint

TEXT = {"tokens": 256, "seq_len": 32}

#: Experts stored alone, fused, and transposed with gate and up in turns.
FAMILIES = ("olmoe", "granitemoe", "gpt_oss")


def hessian(columns, seed, tokens=300):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3 * torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    return inputs.T @ inputs


def experts(rows=24, columns=40, count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(rows, columns, generator=generator)
    each = common + 0.7 * torch.randn(count, rows, columns, generator=generator)
    return each, torch.stack([hessian(columns, seed + 1 + number) * (1 + number) for number in range(count)])


def lost(difference, own):
    """Return tr(D H D^T) in float64, summed up by hand."""
    difference, own = difference.double().numpy(), own.double().numpy()
    return float(numpy.trace(difference @ own @ difference.T))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 7, 23])
def test_what_factors_lose_is_the_tail_of_the_singular_values(shape, rank):
    weight, own = torch.randn(shape, generator=torch.Generator().manual_seed(3)), hessian(shape[1], seed=4)
    left, right = best_factors(weight, own, rank)
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    # Eckart and Young: with H = A A^T by its eigenvalues, not by a Cholesky factor.
    value, vector = numpy.linalg.eigh(own.double().numpy())
    root = vector * numpy.sqrt(value.clip(min=0))
    whitened = weight.double().numpy() @ root
    tail = (numpy.linalg.svd(whitened, compute_uv=False)[rank:] ** 2).sum()
    assert lost(weight - left @ right, own) == pytest.approx(tail, rel=1e-9)
    u, s, v = numpy.linalg.svd(whitened, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ v[:rank] @ numpy.linalg.inv(root)
    numpy.testing.assert_allclose((left @ right).numpy(), expected, rtol=0, atol=1e-8)


def test_factors_of_full_rank_lose_nothing():
    weight, own = experts()
    left, right = best_factors(weight[0], own[0], 24)
    torch.testing.assert_close(left @ right, weight[0].double(), rtol=1e-9, atol=1e-9)


def test_the_first_base_is_the_least_squares_of_all_experts():
    weight, own = experts()
    base = best_base(weight, own, rank=4, rounds=1)
    wide = own.double().numpy()
    expected = sum(w @ h for w, h in zip(weight.double().numpy(), wide, strict=True)) @ numpy.linalg.inv(wide.sum(0))
    numpy.testing.assert_allclose(base.numpy(), expected, rtol=1e-8, atol=1e-8)
    for step in (1e-3, -1e-3):  # nothing near it is better
        other = base + step * torch.randn(base.shape, generator=torch.Generator().manual_seed(9))
        assert sum(map(lost, weight - base, own)) < sum(map(lost, weight - other, own))


def test_every_round_loses_less():
    weight, own = experts()
    errors = []
    for rounds in (1, 2, 3, 4):
        base = best_base(weight, own, rank=4, rounds=rounds)
        pairs = [best_factors(each - base, h, 4) for each, h in zip(weight, own, strict=True)]
        errors.append(sum(lost(w - base - u @ v, h) for w, (u, v), h in zip(weight, pairs, own, strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]
    mean = weight.double().mean(0)
    pairs = [best_factors(each - mean, h, 4) for each, h in zip(weight, own, strict=True)]
    assert errors[0] < sum(lost(w - mean - u @ v, h) for w, (u, v), h in zip(weight, pairs, own, strict=True))


def with_gptq(matrix, inputs, name):
    return gptq(matrix, inputs, get_layout(name))


def test_what_comes_later_makes_good_what_rounding_did():
    weight, own = experts(rows=32, columns=64)
    inputs = Inputs(hessian_NCC=own, missed_NCC=None, num_tokens=(300,) * 5)

    def coarse(matrix, inputs, name):
        if name == "Q8_0":
            return with_gptq(matrix, inputs, name)
        rounded = matrix.sign().bfloat16()
        return rounded, rounded.float()

    full = SharedBaseType(base="Q4_0", rank=32, factors="Q8_0")
    stored = factored(weight, inputs, full, coarse)
    plain = SharedBaseType(base="BF16", rank=32, factors="Q8_0").encoding(64)
    assert (plain.unpack(stored) - weight).norm() < 0.02 * weight.norm()
    kind = SharedBaseType(base="Q8_0", rank=12, factors="Q4_0")
    encoding = kind.encoding(64)
    careful = encoding.unpack(factored(weight, inputs, kind, with_gptq))
    base = best_base(weight, damped(own), 12).float()
    pairs = [best_factors(each - base, h, 12) for each, h in zip(weight, damped(own), strict=True)]
    rounded = {"_base": encoding.base.pack(base)[""]}
    for side, suffix in enumerate(("_left", "_right")):
        vectors = torch.stack([(pair[0].T, pair[1])[side] for pair in pairs]).float()
        rounded[suffix] = encoding.factors.pack(vectors)[""]
    nearest = encoding.unpack(rounded)
    exact = sum(lost(w - base - u @ v, h) for w, (u, v), h in zip(weight, pairs, own, strict=True))
    errors = [sum(map(lost, weight - value, own)) for value in (careful, nearest)]
    assert exact < errors[0] < errors[1]


def test_right_factors_are_the_least_squares_of_what_left_ones_became():
    weight, _ = experts()
    left = weight[1, :, :6].round()
    expected = numpy.linalg.lstsq(left.double().numpy(), weight[0].double().numpy(), rcond=None)[0]
    numpy.testing.assert_allclose(refitted(left, weight[0]).numpy(), expected, rtol=1e-6, atol=1e-7)
    assert torch.isfinite(refitted(0 * left, weight[0])).all()


def test_options_of_the_quantiser_count_for_factors_too():
    weight, own = experts(rows=32, columns=64)
    inputs = Inputs(hessian_NCC=own, missed_NCC=0.3 * own.roll(1, 0), num_tokens=(300,) * 5)
    kind = SharedBaseType(base="BF16", rank=8, factors="BF16")
    usual = factored(weight, inputs, kind, with_gptq)
    for options in ({"damping": 0.5}, {"ridge": 0.9}):
        assert not torch.equal(usual["_left"], factored(weight, inputs, kind, with_gptq, **options)["_left"])


@pytest.mark.parametrize("tokens", [(300, 0, 300, 300, 300), (0,) * 5])
def test_experts_that_saw_nothing_are_factored_all_the_same(tokens):
    weight, own = experts(rows=32, columns=64)
    own = own * (torch.tensor(tokens) > 0)[:, None, None]
    inputs = Inputs(hessian_NCC=own, missed_NCC=None, num_tokens=tokens)
    kind = SharedBaseType(base="BF16", rank=16, factors="Q8_0")
    value = kind.encoding(64).unpack(factored(weight, inputs, kind, with_gptq))
    assert (value - weight)[1].norm() < 0.8 * weight[1].norm()
    assert torch.isfinite(torch.linalg.cholesky(damped(own))).all()


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    folder, done = tmp_path_factory.mktemp("shared"), {}

    def make(family, **sizes):
        key = (family, *sizes.items())
        if key not in done:
            sizes = {"hidden_size": 96, "intermediate_size": 64, **sizes}
            done[key] = tiny_checkpoint(folder / str(len(done)), family, dtype=torch.float32, **sizes)
        return done[key]

    return make


@pytest.fixture(scope="module")
def result_of(model_of, text_folder, tmp_path_factory):
    folder, done = tmp_path_factory.mktemp("shared-results"), {}

    def make(family, bits=6):
        if (family, bits) not in done:
            settings = {"bits": bits, "target": "packed", "recipe": "shared-base", "text": text_folder, **TEXT}
            done[family, bits] = compress(model_of(family), folder / f"{family}-{bits}", **settings)
        return done[family, bits]

    return make


@pytest.mark.parametrize("family", ["olmoe", "granitemoe", pytest.param("gpt_oss", marks=pytest.mark.long)])
def test_experts_are_near_to_what_they_were_and_all_loaders_agree(family, model_of, result_of):
    result = result_of(family)
    kinds = {kind for name, kind in result.plan.types.items() if "experts" in name or "input_linear" in name}
    assert any(SharedBaseType.parse(kind) for kind in kinds)
    assert result.logits_error <= 1e-6
    assert Checkpoint.open(result.out).num_bytes == result.plan.predicted_bytes
    original, packed = (load_model(each, dtype=torch.float32).state_dict() for each in (model_of(family), result.out))
    for name, tensor in original.items():
        off = (tensor - packed[name]).norm() / tensor.norm().clamp(min=1e-9)
        # Random experts are of no low rank, and what follows them makes good what they changed; in a wrong place: 1.4.
        assert off < (0.9 if "layers.1." in name or "experts." in name else 0.04), name
    for name, tensor in CoterieModel.from_pretrained(result.out, dtype=torch.float32).state_dict().items():
        torch.testing.assert_close(tensor, packed[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_bytes_of_the_experts_are_those_that_were_said(family, result_of):
    result = result_of(family)
    stored = {name: each for name, each in tensors_of(result.out).items() if re.search("_(base|left|right)$", name)}
    experts_only, hidden, width, count, layers = 0, 96, 64, 8, 2
    ranks = {SharedBaseType.parse(kind).rank for kind in result.plan.types.values() if SharedBaseType.parse(kind)}
    (rank,) = ranks
    in_blocks = 18 / 32  # IQ4_NL
    sides = [(2 * width, hidden)] if family == "granitemoe" else 2 * [(width, hidden)]
    for rows, columns in (*sides, (hidden, width)):
        experts_only += count * rank * (rows + columns) * in_blocks
        experts_only += rows * columns * 144 / 256  # Q4_K, whose blocks run on from row to row
    assert sum(each.numel() * each.element_size() for each in stored.values()) == layers * experts_only
    assert 8 * layers * experts_only <= 6 * layers * count * 3 * hidden * width
    assert 8 * experts_only * (rank + 1) / rank > 6 * count * 3 * hidden * width  # no rank more would fit


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_what_is_read_is_the_base_and_what_factors_add(family, model_of, result_of):
    out = result_of(family).out
    read, stored = open_checkpoint(out), Checkpoint.open(out)
    name = next(name for name in read.tensors if name not in stored.tensors)
    with read.reader() as reader:
        value = reader.read(name)
        if value.ndim == 3:
            assert torch.equal(reader.read_rows(name, 3, 5), value[3:5])
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["groups"]
    assert {"shared-base", "ggml"} == {group["encoding"] for group in groups}
    assert not any(re.search("_(base|left|right)$", each) for each in read.tensors)
    before, after = coterie.inspect(model_of(family)), coterie.inspect(out)
    assert {name: part.parameters for name, part in after.parts.items()} == {
        name: part.parameters for name, part in before.parts.items()
    }
    assert [each.block for each in after.moe_layers] == [each.block for each in before.moe_layers]
    shared = sum(each.num_bytes for name, each in stored.tensors.items() if re.search("_(base|left|right)$", name))
    assert after.parts["experts"].bytes == shared
    assert after.parts["router"].bytes == before.parts["router"].bytes


def test_the_rank_is_the_largest_that_fits(model_of):
    model = model_of("olmoe")
    outlined = plan(model, bits=5, target="packed", recipe="shared-base")
    rank = next(SharedBaseType.parse(kind).rank for kind in outlined.types.values() if SharedBaseType.parse(kind))
    again = plan(model, budget=outlined.predicted_bytes, target="packed", recipe="shared-base")
    assert again.types == outlined.types
    less = plan(model, budget=outlined.predicted_bytes - 1, target="packed", recipe="shared-base")
    assert next(SharedBaseType.parse(k).rank for k in less.types.values() if SharedBaseType.parse(k)) == rank - 1
    alone = plan(model, bits=5, target="packed", recipe="shared-base", experts_only=True)
    assert all("experts" in name for name in alone.types)
    assert not all("experts" in name for name in outlined.types)
    most = plan(model, bits=16, target="packed", recipe="shared-base")
    assert most.predicted_bytes < most.original_bytes


def test_what_cannot_be_is_refused_with_the_least(model_of, text_folder, tmp_path):
    model, settings = model_of("olmoe"), {"target": "packed", "recipe": "shared-base"}
    with pytest.raises(Infeasible, match=r"factors of rank 1 it is (\S+ \S+), and that is the least"):
        plan(model, budget="20KiB", **settings)
    with pytest.raises(InputError, match="no GGUF file holds: say --target packed"):
        plan(model, bits=4, recipe="shared-base")
    with pytest.raises(InputError, match="say how small with --bits or --budget"):
        plan(model, type="Q4_K", **settings)
    made = plan(model, bits=6, **settings)
    gate = next(name for name in made.types if "gate_proj" in name)
    for name, kind, message in (
        (gate, "Q4_K.W+65*Q8_0", "take a rank from 1 to 64"),
        (gate, "Q9_K+8*Q8_0", "take a rank from 1 to 64"),
        (gate, "Q4_K+8*Q8_0", "blocks that divide the 96 for the base"),
        (gate, "Q4_K.W+0*Q8_0", "types that can be written"),
        ("lm_head.weight", "Q8_0+8*Q8_0", "experts of one width"),
    ):
        body = made.body()
        body["types"] = {**made.types, name: kind}
        changed = Plan.from_body(body, made.inputs, where="here")
        with pytest.raises(Infeasible, match=re.escape(f"stores {name} as {kind}") + f".*{message}"):
            compress(model, tmp_path / "out", plan=changed, text=text_folder, **TEXT)
    for change, message in (
        ({"types": {**made.types, gate.replace("*", "3"): "Q8_0"}}, "all experts of a layer have together: name none"),
        ({"result_steps": [["distill-blocks", {}]]}, "distill-blocks trains scales of single matrices: leave it out"),
    ):
        changed = Plan.from_body({**made.body(), **change}, made.inputs, where="here")
        with pytest.raises(Infeasible, match=message):
            compress(model, tmp_path / "out", plan=changed, text=text_folder, **TEXT)


@pytest.mark.long
def test_experts_that_are_alike_keep_more_than_in_fewer_bits(model_of, text_folder, tmp_path):
    model = shutil.copytree(model_of("olmoe"), tmp_path / "alike")
    tensors, generator = load_file(model / "model.safetensors"), torch.Generator().manual_seed(5)
    for name, first in list(tensors.items()):
        if ".experts." in name and ".experts.0." not in name:
            first = tensors[re.sub(r"experts\.\d+", "experts.0", name)]
            left, right = (torch.randn(extent, 4, generator=generator) for extent in first.shape)
            tensors[name] = first + 0.1 * left @ right.T
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    settings, lost = {"bits": 2.7, "target": "packed", "text": text_folder, **TEXT}, {}
    original = load_model(model, dtype=torch.float32).state_dict()
    for recipe in ("gptq", "shared-base"):
        result = compress(model, tmp_path / recipe, recipe=recipe, experts_only=True, **settings)
        read = load_model(result.out, dtype=torch.float32).state_dict()
        first_layer = [name for name in original if "layers.0.mlp.experts" in name]  # what follows is corrected
        lost[recipe] = sum(float((original[name] - read[name]).square().sum()) for name in first_layer)
    assert lost["shared-base"] < 0.5 * lost["gptq"]


@pytest.mark.long
def test_an_edited_plan_runs(model_of, text_folder, tmp_path):
    model = model_of("olmoe")
    made = plan(model, bits=6, target="packed", recipe="shared-base")
    body = made.body()
    body["quantiser"] = ["corrected-gptq", {"damping": 0.3, "ridge": 0.5}]
    down = [name for name in made.types if "down_proj" in name]
    body["types"] = {**made.types, down[0]: "BF16+3*BF16", down[1]: "Q8_0"}
    changed = Plan.from_body(body, made.inputs, where="here").save(tmp_path / "plan.json")
    result = compress(model, tmp_path / "out", plan=changed, text=text_folder, **TEXT)
    assert result.plan.types == body["types"]
    assert result.logits_error <= 1e-6
    assert Checkpoint.open(result.out).num_bytes == result.plan.predicted_bytes
    packed = load_model(result.out, dtype=torch.float32).state_dict()
    for name, tensor in CoterieModel.from_pretrained(result.out, dtype=torch.float32).state_dict().items():
        torch.testing.assert_close(tensor, packed[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.long
def test_rows_that_are_no_blocks_get_plain_numbers(model_of, text_folder, tmp_path):
    model = model_of("olmoe", hidden_size=32, intermediate_size=24)
    settings = {"bits": 9, "target": "packed", "recipe": "shared-base", "text": text_folder, **TEXT}
    result = compress(model, tmp_path / "out", **settings)
    kinds = [SharedBaseType.parse(kind) for name, kind in result.plan.types.items() if "experts" in name]
    assert {kind.factors for kind in kinds} == {"BF16"}
    assert Checkpoint.open(result.out).num_bytes == result.plan.predicted_bytes
    assert result.logits_error <= 1e-6


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(model_of, result_of, text_folder, tmp_path, monkeypatch):
    model = model_of("olmoe")
    settings = {"bits": 6, "target": "packed", "recipe": "shared-base", "text": text_folder, **TEXT}
    packed, pack = [], LayerWriter._pack

    def stop_at_the_third(self, stage, layers, shard):
        packed.append(stage.unit.name)
        if len(packed) == 3:
            raise KeyboardInterrupt
        pack(self, stage, layers, shard)

    with monkeypatch.context() as patched:
        patched.setattr(LayerWriter, "_pack", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            compress(model, tmp_path / "killed", **settings)
    assert not (tmp_path / "killed").exists()
    resumed = compress(model, tmp_path / "killed", **settings)
    assert weight_digests(resumed.out) == weight_digests(result_of("olmoe").out)


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("_right", None, "_right' is missing"),
        ("_base", None, "_base' is missing"),
        ("_left", lambda tensor: tensor[1:], r"weight_left' \(U8 .* does not fit: factors of rank .* it is U8"),
        ("_right", lambda tensor: tensor[:, 18:], r"does not fit: \[64, 64\] cannot be stored as Q4_K"),
        ("_right", lambda tensor: tensor[:, 1:], "does not fit: .* holds no whole blocks of IQ4_NL"),
        ("_base", lambda tensor: tensor[:-1], "does not fit: .* as _base; it is U8"),
        ("_left", lambda tensor: tensor.float(), "does not fit: .* it is F32"),
    ],
)
def test_damaged_results_are_refused(suffix, change, message, result_of, tmp_path):
    out = shutil.copytree(result_of("olmoe").out, tmp_path / "out")
    file = next(file for file in sorted(out.glob("*.safetensors")) if any("_left" in name for name in load_file(file)))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(f"gate_proj.weight{suffix}"))
    if change is None:
        del tensors[name]
        for index in out.glob("*.index.json"):
            content = json.loads(index.read_text())
            del content["weight_map"][name]
            index.write_text(json.dumps(content))
    else:
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=message):
        load_model(out)
    with pytest.raises((ValueError, RuntimeError)):
        CoterieModel.from_pretrained(out)


def test_llama_cpp_has_no_such_experts(model_of, text_folder, tmp_path):
    model = model_of("qwen3_moe", moe_intermediate_size=32)
    settings = {"bits": 6, "target": "packed", "recipe": "shared-base", "text": text_folder, **TEXT}
    result = compress(model, tmp_path / "out", experts_only=True, **settings)
    with pytest.raises(InputError, match="a base that experts share and factors, which no GGUF file can hold"):
        export(result.out, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_result_that_was_cut_off_is_refused(result_of, tmp_path):
    out = shutil.copytree(result_of("olmoe").out, tmp_path / "out")
    file = max(out.glob("*.safetensors"), key=lambda each: each.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpoint):
        load_model(out)
