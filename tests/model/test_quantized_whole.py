"""Whole checkpoints in integers that other tools wrote: seen, loaded, compressed as the models that they stand for."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from coterie import compress, inspect, load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.quantized import dequantized
from coterie.testing import tiny_text
from integer_formats import (
    Matrix,
    awq,
    awq_config,
    compressed_bytes,
    compressed_config,
    compressed_words,
    gptq,
    gptq_config,
    read_all,
    under,
)
from some import first


def pack_compressed(weight, *, group=None, bits=4, symmetric=True, in_bytes=False):
    columns = weight.shape[1]
    group_of = [column // (group or columns) for column in range(columns)]
    matrix = Matrix(weight, bits, group_of, symmetric=symmetric, scale_dtype=torch.bfloat16)
    make = compressed_bytes if in_bytes else compressed_words
    return matrix.values(), make(matrix, zeros=not symmetric)


def pack_gptq(weight, *, bits=4, order=False):
    group_of = [column // 16 for column in range(weight.shape[1])]
    group_of = group_of[1::2] + group_of[::2] if order else group_of
    matrix = Matrix(weight, bits, group_of)
    return matrix.values(), gptq(matrix)


def pack_awq(weight):
    matrix = Matrix(weight, 4, [column // 16 for column in range(weight.shape[1])])
    return matrix.values(), awq(matrix)


#: How the matrices of a model are packed, and the settings.
WHOLE = {
    "compressed-tensors, 4 bits": (
        lambda weight: pack_compressed(weight, group=16),
        compressed_config(group_size=16, strategy="group", ignore=["lm_head", "re:.*gate$"]),
    ),
    "compressed-tensors, 4 bits with zeros": (
        lambda weight: pack_compressed(weight, group=16, symmetric=False),
        compressed_config(group_size=16, strategy="group", symmetric=False, ignore=["re:.*gate$"]),
    ),
    "compressed-tensors, 8 bits in bytes": (
        lambda weight: pack_compressed(weight, bits=8, in_bytes=True),
        compressed_config("int-quantized", num_bits=8, ignore=["re:.*gate$"]),
    ),
    "gptq, 4 bits": (pack_gptq, gptq_config(group_size=16)),
    "gptq, 4 bits, columns in any order": (
        lambda weight: pack_gptq(weight, order=True),
        gptq_config(group_size=16, desc_act=True),
    ),
    "gptq, 8 bits": (lambda weight: pack_gptq(weight, bits=8), gptq_config(bits=8, group_size=16)),
    "awq": (pack_awq, awq_config(group_size=16)),
}
FAMILIES = {"qwen3_moe": {"moe_intermediate_size": 32}, "mixtral": {"intermediate_size": 32}}


def whole(tiny, folder, family, case):
    """Return a packed tiny checkpoint, and the plain one that it stands for."""
    pack, described = WHOLE[case]
    source = tiny(family, dtype=torch.bfloat16, hidden_size=32, **FAMILIES[family])
    plain, packed = shutil.copytree(source, folder / "plain"), shutil.copytree(source, folder / "packed")
    expected, stored = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if "layers" in name and tensor.ndim == 2 and not module.endswith("gate"):
            value, parts = pack(tensor)
            expected[name] = value.bfloat16()
            stored |= under(module, parts)
        else:
            expected[name] = stored[name] = tensor
    save_file(expected, plain / "model.safetensors", metadata={"format": "pt"})
    stored = {name: tensor.contiguous().clone() for name, tensor in stored.items()}
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": described}))
    return packed, plain


@pytest.mark.parametrize("case", first(1, WHOLE))
def test_a_packed_checkpoint_is_the_plain_one(tiny, tmp_path, case):
    packed, plain = whole(tiny, tmp_path, "qwen3_moe", case)
    view, source = dequantized(Checkpoint.open(packed)), Checkpoint.open(plain)
    assert view.config == source.config
    assert {name: info.shape for name, info in view.tensors.items()} == {
        name: info.shape for name, info in source.tensors.items()
    }
    found, wanted = read_all(view), read_all(source)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    seen, expected = inspect(packed), inspect(plain)
    assert seen.total.parameters == expected.total.parameters
    assert seen.total.bytes == Checkpoint.open(packed).num_bytes < expected.total.bytes
    for mine, theirs in zip(seen.moe_layers, expected.moe_layers, strict=True):
        assert (mine.width, mine.hidden_size, mine.num_experts) == (
            theirs.width,
            theirs.hidden_size,
            theirs.num_experts,
        )
        assert mine.experts.parameters == theirs.experts.parameters


@pytest.mark.long
def test_matrices_of_several_bits_are_counted_as_what_they_are(tiny, tmp_path):
    packed, plain = whole(tiny, tmp_path, "qwen3_moe", "compressed-tensors, 4 bits")
    file, stored = packed / "model.safetensors", load_file(packed / "model.safetensors")
    for name, tensor in load_file(plain / "model.safetensors").items():
        if name.endswith("down_proj.weight"):
            stored |= under(name.removesuffix(".weight"), pack_compressed(tensor, bits=8)[1])
    save_file({name: tensor.clone() for name, tensor in stored.items()}, file, metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = compressed_config(targets=["re:.*down_proj"], num_bits=8)["config_groups"]["group_0"]
    (packed / "config.json").write_text(json.dumps(config))
    seen, expected = inspect(packed), inspect(plain)
    assert seen.total.parameters == expected.total.parameters
    assert [layer.width for layer in seen.moe_layers] == [layer.width for layer in expected.moe_layers]


@pytest.mark.long
@pytest.mark.parametrize("case", WHOLE)
def test_a_packed_checkpoint_loads_without_its_packer(tiny, tmp_path, case):
    packed, plain = whole(tiny, tmp_path, "qwen3_moe", case)
    found, wanted = load_model(packed).state_dict(), load_model(plain).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", WHOLE)
def test_compressing_a_packed_checkpoint_gives_what_compressing_the_plain_one_gives(tiny, tmp_path, family, case):
    text = tiny_text(tmp_path / "text", documents=3)
    results = [
        compress(model, tmp_path / f"half-{model.name}", experts=4, recipe="reap", text=text, tokens=256, seq_len=32)
        for model in whole(tiny, tmp_path, family, case)
    ]
    found, wanted = ({file.name: load_file(file) for file in each.out.glob("*.safetensors")} for each in results)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].keys() == wanted[name].keys()
        assert all(torch.equal(found[name][key], wanted[name][key]) for key in wanted[name])
    assert "quantization_config" not in json.loads((results[0].out / "config.json").read_text())


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_biases_that_a_quantiser_made_up_are_not_in_the_result(tiny, tmp_path, caplog, family):
    """GPTQ's tools write zeros beside every weight; those of the model itself stay."""
    packed, plain = whole(tiny, tmp_path, family, "gptq, 4 bits")
    file = packed / "model.safetensors"
    stored = load_file(file)
    made_up = {f"{name[:-7]}bias": torch.zeros(tensor.shape[1]) for name, tensor in stored.items() if "qweight" in name}
    save_file(stored | made_up, file, metadata={"format": "pt"})
    text = tiny_text(tmp_path / "text", documents=3)
    results = [
        compress(model, tmp_path / f"half-{model.name}", experts=4, recipe="reap", text=text, tokens=256, seq_len=32)
        for model in (packed, plain)
    ]
    found, wanted = (read_all(Checkpoint.open(each.out)) for each in results)
    assert len(made_up) > 50
    caplog.clear()
    load_model(packed)
    [record] = caplog.records
    assert record.getMessage().endswith(f"and {len(made_up) - 20} more"), "the line does not grow with the model"
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.long
def test_a_packed_checkpoint_becomes_one_in_blocks(tiny, tmp_path):
    text = tiny_text(tmp_path / "text", documents=3)
    results = [
        compress(
            model, tmp_path / f"small-{model.name}", recipe="nearest", type="Q4_0", text=text, tokens=256, seq_len=32
        )
        for model in whole(tiny, tmp_path, "qwen3_moe", next(iter(WHOLE)))
    ]
    found, wanted = (read_all(Checkpoint.open(each.out)) for each in results)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert json.loads((results[0].out / "config.json").read_text())["quantization_config"]["quant_method"] == "coterie"
