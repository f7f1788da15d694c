"""Files as wholes: what goes over byte for byte, what is said, what is refused, and disks that fill up."""

import errno
import json
import os
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import coterie
from coterie import artifact, export
from coterie.cli.main import app
from coterie.errors import InputError, NotACheckpoint, OutOfSpace, OutputExists, ReloadMismatch
from coterie.export import blocks, run
from coterie.export.blocks import encode
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.mxfp4 import Mxfp4
from coterie.model.disk.quantized import dequantized
from coterie.testing import tiny_checkpoint
from export_cases import MIXED, STORED_IN_BLOCKS, WIDE, packed
from llama_runtime import after, llama, numbers, predicted, stock_predicted


def tensors(file):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def field(file, key):
    return gguf.GGUFReader(file).get_field(key).contents()


def test_numbers_are_those_of_the_checkpoint(tiny, tmp_path):
    checkpoint = tiny("qwen3_moe", dtype=torch.bfloat16)
    done = export(checkpoint, tmp_path / "model.gguf")
    found = tensors(tmp_path / "model.gguf")
    assert done.tensors == len(found)
    assert done.num_bytes == sum(int(tensor.n_bytes) for tensor in found.values())
    with Checkpoint.open(checkpoint).reader() as reader:
        for expert in range(8):
            up = reader.read(f"model.layers.1.mlp.experts.{expert}.up_proj.weight")
            bits = found["blk.1.ffn_up_exps.weight"].data[expert].view(np.int16)
            assert torch.equal(torch.from_numpy(bits.copy()).view(torch.bfloat16), up)
        router = reader.read("model.layers.1.mlp.gate.weight").float()
        assert torch.equal(torch.from_numpy(found["blk.1.ffn_gate_inp.weight"].data.copy()), router)
    assert {tensor.tensor_type.name for tensor in found.values() if len(tensor.shape) > 1} == {"BF16", "F32"}


@pytest.mark.parametrize("number_type", ["f32", "f16", "q8_0"])
def test_matrices_have_the_type_that_is_asked_for(number_type, tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "model", "qwen3_moe", **WIDE)
    export(checkpoint, tmp_path / "model.gguf", type=number_type)
    found = tensors(tmp_path / "model.gguf")
    with Checkpoint.open(checkpoint).reader() as reader:
        embedding = reader.read("model.embed_tokens.weight")
    kind = gguf.GGMLQuantizationType[number_type.upper()]
    read_back = torch.from_numpy(gguf.dequantize(found["token_embd.weight"].data, kind).copy())
    assert found["token_embd.weight"].tensor_type is kind
    assert (read_back - embedding).abs().max() <= {"f32": 0.0, "f16": 1e-3, "q8_0": 0.01}[number_type]
    assert found["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_rows_that_hold_no_whole_blocks_stay_numbers_and_it_is_said(tiny, tmp_path, caplog):
    caplog.set_level("INFO", logger="coterie")
    export(tiny("qwen3_moe"), tmp_path / "model.gguf", type="q8_0")  # experts of width 24
    types = {name: tensor.tensor_type.name for name, tensor in tensors(tmp_path / "model.gguf").items()}
    assert types["blk.0.ffn_down_exps.weight"] == "BF16"
    assert types["blk.0.ffn_up_exps.weight"] == "Q8_0"
    assert (
        "rows such as the 24 columns of blk.0.ffn_down_exps.weight are not made of whole blocks of Q8_0" in caplog.text
    )


def test_blocks_go_over_byte_for_byte(tmp_path):
    model = packed(tmp_path / "model", "qwen3_moe", MIXED, **WIDE)
    export(model, tmp_path / "model.gguf")
    found = tensors(tmp_path / "model.gguf")
    with Checkpoint.open(model).reader() as reader:
        for projection, kind in (("gate", "Q4_K"), ("up", "Q4_0"), ("down", "Q6_K")):
            there = found[f"blk.1.ffn_{projection}_exps.weight"]
            assert there.tensor_type.name == kind
            for expert in range(8):
                content = reader.read(f"model.layers.1.mlp.experts.{expert}.{projection}_proj.weight")
                assert there.data[expert].tobytes() == content.numpy().tobytes()


@pytest.mark.long
@pytest.mark.parametrize("which", STORED_IN_BLOCKS)
def test_a_file_of_several_types_predicts_what_the_checkpoint_predicts(which, tmp_path):
    family, types, changes = STORED_IN_BLOCKS[which]
    model = packed(tmp_path / "model", family, types, **changes)
    done = export(model, tmp_path / "model.gguf", type="f32")
    assert {kind for kind, _ in types.values()} <= set(done.types)
    # The values that the file holds, in a file of plain numbers and in transformers.
    plain = tiny_checkpoint(tmp_path / "plain", family, **changes)
    checkpoint = dequantized(Checkpoint.open(model), "float32")
    with checkpoint.reader() as reader:
        save_file(
            {name: reader.read(name) for name in checkpoint.tensors}, plain / "model.safetensors", {"format": "pt"}
        )
    export(plain, tmp_path / "plain.gguf", type="f32")
    found, meant = tensors(tmp_path / "model.gguf"), tensors(tmp_path / "plain.gguf")
    for name, tensor in found.items():
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.allclose(values, meant[name].data, rtol=1e-5, atol=1e-6), name
    ids = numbers(50)
    with llama(tmp_path / "model.gguf") as server:
        difference = (predicted(server, ids, 272) - stock_predicted(plain, ids)).abs()
    # llama.cpp rounds what it multiplies blocks with to 8 bits.
    assert difference.mean() < 0.1


def test_blocks_that_run_along_another_axis_become_numbers_and_it_is_said(tmp_path, caplog):
    caplog.set_level("INFO", logger="coterie")
    changes = {"kv_lora_rank": 256, "num_hidden_layers": 2}
    model = packed(tmp_path / "model", "deepseek_v3", {"kv_b_proj.weight": ("Q4_0", -1)}, **changes)
    export(model, tmp_path / "model.gguf")
    found = tensors(tmp_path / "model.gguf")
    assert found["blk.0.attn_k_b.weight"].tensor_type.name == "BF16"
    assert found["blk.0.attn_v_b.weight"].tensor_type.name == "Q4_0"
    assert "2 tensors lose their blocks, such as blk.0.attn_k_b.weight" in caplog.text


def test_experts_of_one_projection_in_several_types_are_refused(tmp_path):
    types = {"experts.0.up_proj.weight": ("Q4_0", -1)}
    model = packed(tmp_path / "model", "qwen3_moe", types, **WIDE)
    with pytest.raises(InputError, match="its experts are stored as Q4_0 and plain numbers"):
        export(model, tmp_path / "model.gguf")


def test_blocks_that_run_on_from_row_to_row_become_numbers_and_it_is_said(tmp_path, caplog):
    caplog.set_level("INFO", logger="coterie")
    model = packed(
        tmp_path / "model", "qwen3_moe", {"down_proj.weight": ("Q4_K", -1)}, columns=96, moe_intermediate_size=96
    )
    export(model, tmp_path / "model.gguf", type="f32")
    with dequantized(Checkpoint.open(model), "float32").reader() as reader:
        expected = reader.read("model.layers.0.mlp.experts.1.down_proj.weight")
    stack = tensors(tmp_path / "model.gguf")["blk.0.ffn_down_exps.weight"]
    assert stack.tensor_type.name == "F32"
    assert torch.equal(torch.from_numpy(stack.data[1].copy()), expected)
    assert "lose their blocks, such as blk.0.ffn_down_exps.weight" in caplog.text


def test_mxfp4_of_a_checkpoint_stays_mxfp4_to_the_bit(tmp_path):
    """As gpt-oss comes: experts in pairs of 4-bit floats go over as they are, in llama.cpp's order of numbers."""
    model = tiny_checkpoint(tmp_path / "model", "gpt_oss", hidden_size=64, intermediate_size=96)
    content = load_file(model / "model.safetensors")
    for name in [name for name in content if name.endswith(("gate_up_proj", "down_proj"))]:
        packed = Mxfp4().pack(content.pop(name).float())
        content |= {name + suffix: tensor.contiguous() for suffix, tensor in packed.items()}
    save_file(content, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    exported = export(model, tmp_path / "model.gguf", type="f32")
    assert "MXFP4" in exported.types
    there = tensors(tmp_path / "model.gguf")
    with dequantized(Checkpoint.open(model), "float32").reader() as reader:
        fused, down = (reader.read(f"model.layers.1.mlp.experts.{name}") for name in ("gate_up_proj", "down_proj"))
    expected = {"gate": fused[..., ::2], "up": fused[..., 1::2], "down": down}
    for projection, stack_EDF in expected.items():
        tensor = there[f"blk.1.ffn_{projection}_exps.weight"]
        assert tensor.tensor_type.name == "MXFP4"
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values, stack_EDF.transpose(1, 2).numpy())


def test_a_result_with_fewer_experts_says_what_was_done_and_is_predicted_alike(tiny, text, tmp_path):
    result = tmp_path / "half"
    coterie.compress(tiny("qwen3_moe"), result, keep=0.5, recipe="reap", text=text, tokens=512, seq_len=64)
    file = tmp_path / "model.gguf"
    export(result, file, type="f32")
    assert field(file, "general.architecture") == "qwen3moe"
    assert field(file, "general.name") == "half"
    assert field(file, "general.quantization_version") == gguf.GGML_QUANT_VERSION
    assert field(file, "qwen3moe.expert_count") == 4
    assert field(file, "coterie.recipe") == "reap"
    assert field(file, "coterie.original") == tiny("qwen3_moe").name
    assert field(file, "tokenizer.chat_template").startswith("{% for message in messages %}")
    ids = numbers(50)
    with llama(file) as server:
        found = predicted(server, ids, 272)
    assert (found - after(coterie.load_model(result, dtype=torch.float32), ids)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "options", [{"recipe": "m-smoe", "router": "map"}, {"recipe": "heapr-ragged"}], ids=["map", "ragged"]
)
def test_results_that_only_coterie_loads_are_refused(options, tiny, text, tmp_path):
    result = tmp_path / "result"
    coterie.compress(tiny("qwen3_moe"), result, keep=0.5, text=text, tokens=512, seq_len=64, **options)
    with pytest.raises(InputError, match="one router row and one width for every expert"):
        export(result, tmp_path / "model.gguf")


def test_nothing_that_exists_is_replaced(tiny, tmp_path):
    checkpoint = tiny("qwen3_moe")
    file = tmp_path / "model.gguf"
    export(checkpoint, file)
    before = file.read_bytes()
    with pytest.raises(OutputExists, match="exists"):
        export(checkpoint, file)
    assert file.read_bytes() == before
    with pytest.raises(OutputExists, match="is a folder"):
        export(checkpoint, tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    with pytest.raises(InputError, match="is inside the model folder"):
        export(copy, copy / "model.gguf")
    with pytest.raises(NotACheckpoint):
        export(tmp_path / "nothing", tmp_path / "new.gguf")
    with pytest.raises(InputError, match="type is 'q2'"):
        export(checkpoint, tmp_path / "new.gguf", type="q2")


def test_equal_checkpoints_give_equal_files(tiny, tmp_path):
    for name in ("a", "b"):
        export(tiny("qwen3_moe"), tmp_path / f"{name}.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_disk_that_is_too_small_is_seen_beforehand(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "free_space", lambda place: (place, 1000))
    with pytest.raises(OutOfSpace, match=r"0\.98 KiB free"):
        export(tiny("qwen3_moe"), tmp_path / "model.gguf")
    assert not any(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tiny, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(blocks, "encode", full)
    monkeypatch.setattr("coterie.export.blocks.encode", full)
    with pytest.raises(OutOfSpace, match="filled up"):
        export(tiny("qwen3_moe"), tmp_path / "model.gguf")
    assert not any(tmp_path.iterdir())


def test_a_file_that_reads_back_otherwise_does_not_appear(tiny, tmp_path, monkeypatch):
    real = artifact.atomic_path

    def damaged(path, outputs):
        os.truncate(path, path.stat().st_size - 64)
        check(path, outputs)

    check = run.check_file
    monkeypatch.setattr(run, "check_file", damaged)
    assert real is run.atomic_path
    with pytest.raises((ReloadMismatch, ValueError)):
        export(tiny("qwen3_moe"), tmp_path / "model.gguf")
    assert not any(tmp_path.iterdir())


def test_numbers_that_a_type_cannot_hold_are_refused():
    with pytest.raises(InputError, match="too large for F16; take bf16"):
        list(encode(torch.tensor([[1e6, 1.0]]), "F16", "blk.0.attn_q.weight"))


def test_without_the_package_it_is_said_which_to_install(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'coterie\[gguf\]'"):
        export(tiny("qwen3_moe"), tmp_path / "model.gguf")


def test_the_command_does_what_the_function_does(tiny, tmp_path):
    def command(*arguments):
        result = CliRunner().invoke(app, ["export", *map(str, arguments)])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    dry = json.loads(command(tiny("qwen3_moe"), tmp_path / "model.gguf", "--dry-run", "--json"))
    assert not any(tmp_path.iterdir())
    assert command(tiny("qwen3_moe"), tmp_path / "model.gguf").startswith(f"{dry['tensors']} tensors (")
    assert dry["num_bytes"] == sum(int(tensor.n_bytes) for tensor in tensors(tmp_path / "model.gguf").values())
