"""Packed checkpoints seen in full precision: every value as in a slow independent reference and in transformers."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from coterie import compress
from coterie.errors import CorruptCheckpoint, UnsupportedDtype
from coterie.model.arch.conversion import WeightConversion
from coterie.model.arch.layers import Architecture
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings import quantization_config, scaled
from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.model.disk.quantized import as_read, dequantized
from coterie.model.quiet import quiet
from coterie.testing import tiny_text
from hostile import changed, places, values
from some import first

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP8_MAX = 448.0

#: Sizes with whole blocks, remainders, and less than one block of 128.
SIZES = {"hidden_size": 160, "moe_intermediate_size": 136, "intermediate_size": 264, "vocab_size": 300}


# --- slow references ----------------------------------------------------------------------------------------------


def pack_blocks(weight, block):
    """Return 8-bit numbers and scales of a matrix, block by block."""
    rows, columns = weight.shape
    packed = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            part = weight[at].float()
            scales[i, j] = part.abs().max().clamp(min=1e-8) / FP8_MAX
            packed[at] = (part / scales[i, j]).to(torch.float8_e4m3fn)
    return packed, scales


def unpack_blocks(packed, scales, block):
    """Return the float32 values of a matrix, row by row and block by block."""
    out = torch.empty(packed.shape)
    for i in range(packed.shape[0]):
        for start in range(0, packed.shape[1], block[1]):
            part = packed[i, start : start + block[1]].float()
            out[i, start : start + block[1]] = part * float(scales[i // block[0], start // block[1]])
    return out


def four_bit(code):
    """Return the value of one E2M1 number from its sign, exponent and mantissa bits."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -magnitude if sign else magnitude


def unpack_groups(blocks, scales):
    """Return the float32 values of a stack of matrices, number by number, input axis first."""
    num_matrices, rows, groups, size = blocks.shape
    out = torch.zeros(num_matrices, groups * size * 2, rows)
    blocks, scales = blocks.tolist(), scales.tolist()
    for e in range(num_matrices):
        for row in range(rows):
            for group in range(groups):
                factor = 2.0 ** (scales[e][row][group] - 127)
                for at, byte in enumerate(blocks[e][row][group]):
                    column = (group * size + at) * 2
                    out[e, column, row] = four_bit(byte & 15) * factor
                    out[e, column + 1, row] = four_bit(byte >> 4) * factor
    return out


def pack_groups(weight):
    """Return blocks and scales of a stack of matrices (N, input, output); nearest values, groups of 32."""
    stack = weight.float().transpose(1, 2).contiguous()  # output axis first
    num_matrices, rows, columns = stack.shape
    parts = stack.view(num_matrices, rows, columns // 32, 32)
    exponents = (torch.log2(parts.abs().amax(-1).clamp(min=1e-30)) - 2).floor()
    values = torch.tensor([four_bit(code) for code in range(16)])
    scaled = parts / torch.exp2(exponents)[..., None]
    codes = (scaled[..., None] - values).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


# --- packed checkpoints -------------------------------------------------------------------------------------------


def repack(plain, out, pack, settings):
    """Copy a checkpoint, its tensors packed by `pack(name, tensor)`: None keeps a tensor, else what replaces it."""
    shutil.copytree(plain, out)
    file = out / "model.safetensors"
    stored = {}
    for name, tensor in load_file(file).items():
        replacement = pack(name, tensor)
        stored.update({name: tensor} if replacement is None else replacement)
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return out


@pytest.fixture(scope="module")
def in_blocks(tiny, tmp_path_factory):
    """A plain checkpoint, the same with its linear weights in 8-bit blocks, and what they unpack to."""
    plain = tiny("deepseek_v3", dtype=torch.bfloat16, **SIZES)
    expected = {}

    def pack(name, tensor):
        if not name.endswith("_proj.weight"):
            return None
        packed, scales = pack_blocks(tensor, (128, 128))
        expected[name] = unpack_blocks(packed, scales, (128, 128))
        return {name: packed, name + "_scale_inv": scales}

    return plain, repack(plain, tmp_path_factory.mktemp("fp8") / "model", pack, FP8), expected


@pytest.fixture(scope="module")
def in_groups(tiny, tmp_path_factory):
    """The same for experts in groups of 4-bit numbers."""
    plain = tiny("gpt_oss", dtype=torch.bfloat16, hidden_size=64, intermediate_size=96)
    expected = {}

    def pack(name, tensor):
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        blocks, scales = pack_groups(tensor)
        expected[name] = unpack_groups(blocks, scales)
        return {name + "_blocks": blocks, name + "_scales": scales}

    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
    return plain, repack(plain, tmp_path_factory.mktemp("mxfp4") / "model", pack, settings), expected


@pytest.fixture(params=first(1, ["in_blocks", "in_groups"]))
def packed(request):
    return request.getfixturevalue(request.param)


def read_all(checkpoint):
    with checkpoint.reader() as reader:
        return {name: reader.read(name) for name in checkpoint.tensors}


def hand_made(folder, tensors, settings=FP8, **config):
    folder.mkdir()
    described = {"model_type": "olmoe", "dtype": "bfloat16"} | config
    (folder / "config.json").write_text(json.dumps(described | {"quantization_config": settings}))
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_view_is_the_plain_checkpoint_with_the_values_that_were_packed(packed, dtype):
    plain, path, expected = packed
    assert len(expected) > 3
    stored, source = Checkpoint.open(path), Checkpoint.open(plain)
    view = dequantized(stored, dtype)
    assert {name: info.shape for name, info in view.tensors.items()} == {
        name: info.shape for name, info in source.tensors.items()
    }
    assert (view.path, view.digest, view.shards) == (stored.path, stored.digest, stored.shards)
    assert view.config == dict(source.config) | {"dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    assert stored.config["quantization_config"], "the input is as it was"

    original = load_file(plain / "model.safetensors")
    found = read_all(view)
    for name, tensor in found.items():
        assert tensor.shape == view.tensors[name].shape
        assert tensor.is_contiguous()
        assert tensor.numel() * tensor.element_size() == view.tensors[name].num_bytes
        if name in expected:
            assert tensor.dtype == DTYPES[dtype]
            assert view.tensors[name].dtype == dtype
            assert torch.equal(tensor, expected[name].to(DTYPES[dtype])), name
        else:
            assert tensor.dtype == original[name].dtype
            assert torch.equal(tensor, original[name]), name
    assert view.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in found.values())
    assert view.num_bytes > stored.num_bytes


def test_packing_lost_little(packed):
    """The packers above are honest: what they give unpacks to about what it was made from."""
    plain, _, expected = packed
    original = load_file(plain / "model.safetensors")
    for name, tensor in expected.items():
        error = (tensor - original[name].float()).norm() / original[name].float().norm()
        assert 0.001 < error < 0.2, name


def test_the_view_loads_as_the_stock_class_loads_the_plain_checkpoint(packed, tmp_path):
    plain, path, expected = packed
    reference = tmp_path / "reference"
    shutil.copytree(plain, reference)
    tensors = load_file(plain / "model.safetensors")
    save_file(tensors | {name: tensor.bfloat16() for name, tensor in expected.items()}, reference / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with quiet():
        stock = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).state_dict()

    view = dequantized(Checkpoint.open(path))
    architecture = Architecture.of(view)
    assert len(architecture.layers) == 2
    conversion = WeightConversion(view, architecture.model)
    with view.reader() as reader:
        memory, conversions = conversion.read(reader, view.tensors)
    assert memory.keys() <= stock.keys()
    for name in stock.keys() - memory.keys():
        assert name == "lm_head.weight", "tied to the embedding, and nothing else is missing"
    for name, tensor in memory.items():
        assert torch.equal(tensor, stock[name]), name
    back = conversion.write(architecture.model, memory, conversions)
    assert back.keys() == view.tensors.keys()
    for name, tensor in read_all(view).items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name


def test_the_stock_class_unpacks_groups_to_the_same_values(in_groups):
    _, path, expected = in_groups
    with quiet():
        stock = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
        ).state_dict()
    found = read_all(dequantized(Checkpoint.open(path)))
    for name in expected:
        assert torch.equal(found[name], stock[name]), name


def test_every_code_and_every_exponent(tmp_path):
    blocks = torch.arange(256, dtype=torch.uint8).repeat(255).view(1, 255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).repeat(1, 1, 16)
    checkpoint = hand_made(tmp_path / "m", {"x_blocks": blocks, "x_scales": scales}, {"quant_method": "mxfp4"})
    found = read_all(dequantized(checkpoint, "F32"))["x"]
    # The largest exponents overflow: in Python that is an error, in float32 infinity.
    assert found.isinf().any()
    assert not found[:, :, :250].isinf().any()
    blocks, scales, found = blocks[:, :250], scales[:, :250], found[:, :, :250]
    expected = unpack_groups(blocks, scales)
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit()), "minus zero is kept"
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    assert {four_bit(code) for code in range(8)} == set(FP4_MAGNITUDES)


def test_an_exponent_that_is_no_number_gives_no_number(tmp_path):
    tensors = {"x_blocks": torch.full((1, 1, 1, 16), 0x22, dtype=torch.uint8), "x_scales": torch.full((1, 1, 1), 255, dtype=torch.uint8)}  # fmt: skip # noqa: E501
    found = read_all(dequantized(hand_made(tmp_path / "m", tensors, {"quant_method": "mxfp4"})))["x"]
    assert found.isnan().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8", "float8_e8m0fnu"])
@pytest.mark.parametrize("shape", [(256, 384), (3, 256, 128), (2, 64, 128)])
def test_scales_of_every_kind_as_transformers_reads_them(tmp_path, shape, dtype):
    weight = torch.randn(shape).mul_(100).to(torch.float8_e4m3fn)
    grid = (*shape[:-2], max(1, shape[-2] // 128), shape[-1] // 128)
    exponents = torch.randint(110, 130, grid, dtype=torch.uint8)
    if dtype == "uint8":
        scale = exponents
    elif dtype == "float8_e8m0fnu":
        scale = exponents.view(torch.float8_e8m0fnu)
    else:
        scale = torch.rand(grid).to(getattr(torch, dtype))
    name = "x.weight" if len(shape) == 2 else "x.gate_up_proj"
    checkpoint = hand_made(tmp_path / "m", {name: weight, name + "_scale_inv": scale}, FP8 | {"scale_fmt": "ue8m0"})
    found = read_all(dequantized(checkpoint))
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.bfloat16)
    assert found.keys() == {name}
    assert torch.equal(found[name], theirs)


@pytest.mark.parametrize("dtype", ["uint8", "float8_e8m0fnu", "float32"])
def test_four_bit_experts_beside_eight_bit_weights(tmp_path, dtype):
    weight = torch.randint(-128, 128, (48, 40), dtype=torch.int8)  # 80 columns: two groups of 32 would not fit
    weight = torch.cat((weight, weight[:, :8]), dim=1)  # 96 columns
    exponents = torch.randint(120, 130, (48, 3), dtype=torch.uint8)
    scale = {"uint8": exponents, "float8_e8m0fnu": exponents.view(torch.float8_e8m0fnu), "float32": torch.rand(48, 3)}
    eight, eight_scale = pack_blocks(torch.randn(130, 96), (128, 128))
    tensors = {"a.weight": weight, "a.scale": scale[dtype], "b.weight": eight, "b.scale": eight_scale}
    tensors["ids"] = torch.arange(5, dtype=torch.int8)
    found = read_all(dequantized(hand_made(tmp_path / "m", tensors, FP8 | {"expert_dtype": "fp4"}), "F32"))
    assert found.keys() == {"a.weight", "b.weight", "ids"}
    factor = torch.exp2(exponents.float() - 127) if dtype != "float32" else scale["float32"]
    for row in range(48):
        for column in range(96):
            byte = int(weight[row, column // 2]) & 255
            value = four_bit(byte >> 4 if column % 2 else byte & 15)
            assert float(found["a.weight"][row, column]) == float(torch.tensor(value) * factor[row, column // 32])
    assert torch.equal(found["b.weight"], unpack_blocks(eight, eight_scale, (128, 128)))
    assert torch.equal(found["ids"], tensors["ids"])
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale[dtype], output_dtype=torch.float32)
    assert torch.equal(found["a.weight"], theirs)


SCALE_SHAPES = {
    "one for all": ((6, 10), (), 0),
    "one for all, as a list": ((6, 10), (1,), 0),
    "one for all, as a matrix": ((6, 10), (1, 1), 0),
    "one a row": ((6, 10), (6, 1), 0),
    "one a matrix": ((3, 6, 10), (3, 1, 1), 0),
    "one a matrix, as a list": ((3, 6, 10), (3,), 0),
    "one for all matrices": ((3, 6, 10), (), 0),
    "one a row of each matrix": ((3, 6, 10), (3, 6, 1), 0),
    "blocks that all matrices share": ((3, 6, 10), (2, 3), 4),
    "blocks with remainders": ((7, 10), (2, 3), 4),
    "blocks of each matrix": ((3, 7, 10), (3, 2, 3), 4),
    "a block size for large ones only": ((6, 10), (1, 1), 128),
    "blocks of its own, powers of two": ((8, 32), (8, 4), 128),
}


@pytest.mark.parametrize("case", SCALE_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scales_of_every_shape(tmp_path, case, dtype):
    shape, given, size = SCALE_SHAPES[case]
    weight, scale = torch.randn(shape).to(dtype), torch.rand(given) + 0.5
    settings = FP8 | {"weight_block_size": [size, size] if size else None}
    checkpoint = hand_made(tmp_path / "m", {"x.proj": weight, "x.proj_scale_inv": scale}, settings)
    found = read_all(dequantized(checkpoint, "F32"))["x.proj"].view(-1, *shape[-2:])

    full = scale.view(-1, *given[-2:]) if len(given) >= 2 else scale.view(-1, 1, 1)
    for number, matrix in enumerate(weight.view(-1, *shape[-2:])):
        grid = full[number % full.shape[0]]
        for row in range(shape[-2]):
            for column in range(shape[-1]):
                size = 8 if case.startswith("blocks of its own") else 4
                steps = [
                    {1: extent, extent: 1}.get(count, size)
                    for extent, count in zip(shape[-2:], grid.shape, strict=True)
                ]
                factor = grid[row // steps[0], column // steps[1]]
                assert found[number, row, column] == matrix[row, column].float() * factor


@pytest.mark.parametrize("scale_name", ["x.weight_scale_inv", "x.weight_scale", "x.scale", "x.qscale_weight"])
@pytest.mark.parametrize(
    "activation_name",
    [None, "x.activation_scale", "x.input_scale", "x.qscale_act", "x.weight_activation_scale"],
)
def test_names_of_scales(tmp_path, scale_name, activation_name):
    weight = torch.randn(4, 4).to(torch.float8_e4m3fn)
    tensors = {"x.weight": weight, scale_name: torch.tensor(0.5), "x.bias": torch.ones(4), "y.scale": torch.ones(3)}
    tensors["y.input_scale"] = torch.ones(1)  # belongs to no packed weight: stays
    if activation_name:
        tensors[activation_name] = torch.tensor(2.0)
    found = read_all(dequantized(hand_made(tmp_path / "m", tensors)))
    assert found.keys() == {"x.weight", "x.bias", "y.scale", "y.input_scale"}
    assert torch.equal(found["x.weight"], (weight.float() * 0.5).bfloat16())


def test_fused_experts_in_eight_bits_cross(tiny, tmp_path):
    plain = tiny("gpt_oss", dtype=torch.bfloat16, hidden_size=160, intermediate_size=136)
    expected = {}

    def pack(name, tensor):
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        parts = [pack_blocks(matrix, (128, 128)) for matrix in tensor]
        expected[name] = torch.stack([unpack_blocks(*part, (128, 128)) for part in parts])
        return {name: torch.stack([part[0] for part in parts]), name + "_scale_inv": torch.stack([part[1] for part in parts])}  # noqa: E501  # fmt: skip

    view = dequantized(Checkpoint.open(repack(plain, tmp_path / "m", pack, FP8)), "F32")
    assert len(expected) == 4
    conversion = WeightConversion(view, Architecture.of(view).model)
    with view.reader() as reader:
        memory, _ = conversion.read(reader, expected)
    assert memory.keys() == {conversion.memory_names[name] for name in expected}
    for name, tensor in expected.items():
        assert torch.equal(memory[conversion.memory_names[name]], tensor)


@pytest.mark.parametrize("band", [1, 1000, 4096])
def test_the_size_of_a_band_changes_nothing(packed, monkeypatch, band):
    _, path, expected = packed
    monkeypatch.setattr(scaled, "BAND", band)
    view = dequantized(Checkpoint.open(path), "F32")
    with view.reader() as reader:
        for name in list(expected)[:4]:
            assert torch.equal(reader.read(name), expected[name]), name


def test_reading_counts_the_stored_bytes(in_groups):
    _, path, expected = in_groups
    view = dequantized(Checkpoint.open(path))
    name = next(iter(expected))
    with view.reader() as reader:
        reader.read(name)
        assert reader.num_bytes_read == expected[name].numel() // 2 + expected[name].numel() // 32


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("case", SCALE_SHAPES)
def test_rows_of_a_stack_are_unpacked_alone(tmp_path, case, dtype):
    shape, given, size = SCALE_SHAPES[case]
    if dtype is torch.int8:  # two numbers in a byte
        weight = torch.randint(-128, 128, (*shape[:-1], shape[-1] // 2), dtype=dtype)
    else:
        weight = torch.randn(shape).to(dtype)
    scale = torch.rand(given) + 0.5
    settings = FP8 | {"weight_block_size": [size, size] if size else None}
    view = dequantized(hand_made(tmp_path / "m", {"x.proj": weight, "x.proj_scale_inv": scale}, settings), "F32")
    stack = len(shape) > 2
    with view.reader() as reader:
        whole, num_rows = reader.read("x.proj"), shape[0]
        for start in range(num_rows):
            for stop in range(start, num_rows + 1):
                before = reader.num_bytes_read
                assert torch.equal(reader.read_rows("x.proj", start, stop), whole[start:stop])
                count = reader.num_bytes_read - before
                if start == stop:
                    assert count == 0
                elif not stack:
                    assert count == weight.nbytes + scale.nbytes, "a single matrix is read as a whole"
                else:
                    shared = scale.numel() == 1 or scale.ndim == 2
                    share = (stop - start) / num_rows
                    assert count == weight.nbytes * share + scale.nbytes * (1 if shared else share)


def test_rows_of_a_stack_in_groups_are_unpacked_alone(in_groups):
    _, path, expected = in_groups
    view = dequantized(Checkpoint.open(path), "F32")
    with view.reader() as reader:
        for name, tensor in expected.items():
            before = reader.num_bytes_read
            assert torch.equal(reader.read_rows(name, 2, 5), tensor[2:5])
            assert reader.num_bytes_read - before == 3 * tensor[0].numel() * 17 // 32


@pytest.mark.long
def test_unpacking_holds_the_packed_tensor_the_result_and_a_band(tmp_path):
    weight = torch.zeros(8192, 8192, dtype=torch.uint8).view(torch.float8_e4m3fn)  # 64 MiB, 128 MiB unpacked
    checkpoint = hand_made(tmp_path / "m", {"x.weight": weight, "x.weight_scale_inv": torch.ones(64, 64)})
    code = f"""
import torch
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.quantized import dequantized
torch.set_num_threads(1)
def status(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
view = dequantized(Checkpoint.open({str(checkpoint.path)!r}))
with view.reader() as reader:
    before = status("VmRSS")
    tensor = reader.read("x.weight")
    mapped = {str(checkpoint.path)!r} in open("/proc/self/maps").read()
    print(status("VmHWM") - before, status("VmRSS") - before, mapped)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is read from /proc")
    result = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    peak, after, mapped = result.stdout.split()
    assert 128 < float(after) < 128 + 48, "the result, and at most a few bands that the allocator keeps"
    assert 192 < float(peak) < 192 + 80
    assert mapped == "False"


# --- what is not packed, or not understood ------------------------------------------------------------------------


def test_a_plain_checkpoint_is_its_own_view(tiny):
    checkpoint = Checkpoint.open(tiny())
    assert dequantized(checkpoint) is checkpoint
    assert dequantized(checkpoint, "F32") is checkpoint


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "FBGEMM_fp8", "", None, 3])
def test_other_methods_are_refused_by_name(tmp_path, method):
    settings = {"bits": 4} if method is None else {"quant_method": method}
    checkpoint = hand_made(tmp_path / "m", {"x.qweight": torch.zeros(4, 4, dtype=torch.int32)}, settings)
    named = str(method).lower() if method else "does not name"
    with pytest.raises(
        UnsupportedDtype, match=rf"m is quantised with .*{named}.*fp8, mxfp4, .* and coterie.*full-precision"
    ) as caught:
        dequantized(checkpoint)
    assert str(tmp_path) in str(caught.value)


def test_settings_within_a_nested_config_count(tmp_path):
    folder = tmp_path / "m"
    weight = torch.randn(4, 4).to(torch.float8_e4m3fn)
    hand_made(folder, {"x.weight": weight, "x.weight_scale_inv": torch.ones(1, 1)})
    inner = {"hidden_size": 4, "torch_dtype": "bfloat16", "quantization_config": FP8}
    config = {"model_type": "olmoe", "torch_dtype": "bfloat16", "text_config": inner}
    config["vision_config"] = {"torch_dtype": "float32", "deep": {"torch_dtype": "bfloat16", "dtype": None}}
    (folder / "config.json").write_text(json.dumps(config))
    view = dequantized(Checkpoint.open(folder), "F16")
    assert view.config == {
        "model_type": "olmoe",
        "torch_dtype": "float16",
        "text_config": {"hidden_size": 4, "torch_dtype": "float16"},
        "vision_config": {"torch_dtype": "float32", "deep": {"torch_dtype": "float16", "dtype": None}},
    }
    assert list(view.tensors) == ["x.weight"]


def test_a_config_that_names_no_number_format_gets_one(tmp_path):
    checkpoint = hand_made(tmp_path / "m", {"x": torch.ones(2)}, dtype=None)
    assert dequantized(checkpoint, "F32").config == {"model_type": "olmoe", "dtype": "float32"}


def test_a_number_format_that_is_no_choice(in_blocks):
    for path in in_blocks[:2]:  # a plain checkpoint as well: the target is wrong whatever it meets
        with pytest.raises(UnsupportedDtype, match=r"'int8'; choose from bfloat16, float16, float32"):
            dequantized(Checkpoint.open(path), "int8")


@pytest.mark.parametrize(("dtype", "torch_name"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
def test_number_formats_have_two_names(in_blocks, dtype, torch_name):
    checkpoint = Checkpoint.open(in_blocks[1])
    assert dequantized(checkpoint, dtype) == dequantized(checkpoint, torch_name)
    assert dequantized(checkpoint) == dequantized(checkpoint, "BF16")


def fp8(*shape):
    return torch.zeros(shape, dtype=torch.float8_e4m3fn)


WRONG = {
    "no scales": ({"x.weight": fp8(4, 4)}, {}, "one tensor of scales, found none .*'x.weight_scale_inv'"),
    "two scales": (
        {"x.weight": fp8(4, 4), "x.weight_scale_inv": torch.ones(1), "x.scale": torch.ones(1)},
        {},
        "found 'x.weight_scale_inv', 'x.scale'",
    ),
    "scales without weights": ({"x.weight_scale_inv": torch.ones(1)}, {}, "no 8-bit weights beside"),
    "scales of a plain weight": (
        {"x.weight": torch.ones(4, 4), "x.weight_scale_inv": torch.ones(1)},
        {},
        "no 8-bit weights beside",
    ),
    "a grid of another size": (
        {"x.weight": fp8(300, 4), "x.weight_scale_inv": torch.ones(2, 1)},
        {},
        r"2 scales along an axis of 300, weight_block_size is \[128, 128\]",
    ),
    "two halves with a remainder each": (
        {"x.proj": fp8(2, 384, 4), "x.proj_scale_inv": torch.ones(2, 4, 1)},
        {},
        "4 scales along an axis of 384",
    ),
    "more scales than rows": ({"x.weight": fp8(4, 4), "x.weight_scale_inv": torch.ones(5, 1)}, {}, "5 scales along"),
    "another number of matrices": (
        {"x.proj": fp8(3, 4, 4), "x.proj_scale_inv": torch.ones(2, 1, 1)},
        {},
        "expected one scale, one a matrix",
    ),
    "a list of scales": ({"x.weight": fp8(4, 4), "x.weight_scale_inv": torch.ones(4)}, {}, "expected one scale"),
    "scales in integers": (
        {"x.weight": fp8(4, 4), "x.weight_scale_inv": torch.ones(1, dtype=torch.int32)},
        {},
        "scales must be one of F32",
    ),
    "weights with one axis": ({"x.weight": fp8(4), "x.weight_scale_inv": torch.ones(1)}, {}, "two axes or more"),
    "weights without extent": ({"x.weight": fp8(4, 0), "x.weight_scale_inv": torch.ones(1)}, {}, "without extent"),
    "a block of nothing": (
        {"x.weight": fp8(4, 4), "x.weight_scale_inv": torch.ones(1)},
        {"weight_block_size": [0, 128]},
        "whole numbers above 0",
    ),
    "a block of three": (
        {"x.weight": fp8(4, 4), "x.weight_scale_inv": torch.ones(1)},
        {"weight_block_size": [1, 1, 1]},
        "two whole numbers",
    ),
    "groups without scales": (
        {"x_blocks": torch.zeros(1, 2, 3, 16, dtype=torch.uint8)},
        {"quant_method": "mxfp4"},
        "its scales 'x_scales' should be U8 .1, 2, 3.; that tensor is missing",
    ),
    "groups and scales that do not fit": (
        {"x_blocks": torch.zeros(1, 2, 3, 16, dtype=torch.uint8), "x_scales": torch.zeros(1, 2, 4, dtype=torch.uint8)},
        {"quant_method": "mxfp4"},
        r"that tensor is U8 \(1, 2, 4\)",
    ),
    "groups and float scales": (
        {"x_blocks": torch.zeros(1, 2, 3, 16, dtype=torch.uint8), "x_scales": torch.zeros(1, 2, 3)},
        {"quant_method": "mxfp4"},
        "that tensor is F32",
    ),
    "packed and plain": (
        {
            "x_blocks": torch.zeros(1, 2, 3, 16, dtype=torch.uint8),
            "x_scales": torch.zeros(1, 2, 3, dtype=torch.uint8),
            "x": torch.ones(2),
        },
        {"quant_method": "mxfp4"},
        r"tensor 'x' twice, packed \(as 'x_blocks'\) and plain",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(tmp_path, case):
    tensors, changes, message = WRONG[case]
    checkpoint = hand_made(tmp_path / "m", tensors, FP8 | changes)
    with pytest.raises(CorruptCheckpoint, match=message):
        dequantized(checkpoint)


def test_a_value_that_the_chosen_format_cannot_hold(tmp_path):
    weight = torch.tensor([[448.0, 1.0]]).to(torch.float8_e4m3fn)
    checkpoint = hand_made(tmp_path / "m", {"x.weight": weight, "x.weight_scale_inv": torch.tensor(1000.0)})
    with (
        dequantized(checkpoint, "F16").reader() as reader,
        pytest.raises(UnsupportedDtype, match=r"'x\.weight' reaches 4\.48e\+05, more than F16 can hold; choose BF16"),
    ):
        reader.read("x.weight")
    assert read_all(dequantized(checkpoint, "F32"))["x.weight"].tolist() == [[448000.0, 1000.0]]


@pytest.mark.long
def test_from_a_packed_checkpoint_to_a_plain_half(packed, tmp_path):
    """Compressing it gives the bits that compressing the unpacked model gives, and stock transformers loads them."""
    plain, path, expected = packed
    unpacked = shutil.copytree(plain, tmp_path / "unpacked")
    tensors = load_file(plain / "model.safetensors")
    for name, tensor in expected.items():
        tensors[name] = tensor.to(torch.bfloat16).contiguous()
    save_file(tensors, unpacked / "model.safetensors", metadata={"format": "pt"})
    text = tiny_text(tmp_path / "text", documents=3)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    results = [
        compress(model, tmp_path / out, experts=4, recipe="reap", text=text, tokens=256, seq_len=32)
        for model, out in ((path, "from-packed"), (unpacked, "from-plain"))
    ]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    found, wanted = ({file.name: load_file(file) for file in each.out.glob("*.safetensors")} for each in results)
    active = [(each.manifest.provenance.active_before, each.manifest.provenance.active_after) for each in results]
    assert active[0] == active[1]
    assert active[0][0] > active[0][1] > 0
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].keys() == wanted[name].keys()
        assert all(torch.equal(found[name][key], wanted[name][key]) for key in wanted[name])
    config = json.loads((results[0].out / "config.json").read_text())
    assert "quantization_config" not in config
    model, info = AutoModelForCausalLM.from_pretrained(results[0].out, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    halves = compress(
        path, tmp_path / "wide", experts=4, recipe="reap", text=text, tokens=256, seq_len=32, output_dtype="float32"
    )
    dtypes = {tensor.dtype for file in halves.out.glob("*.safetensors") for tensor in load_file(file).values()}
    assert torch.float32 in dtypes


# Weights in encodings of our own.

OWN = quantization_config(
    {
        "x.weight": GgmlBlocks(type="Q8_0", dtype="F32"),
        "experts.*.up.weight": GgmlBlocks(type="Q4_0", dtype="F32"),
        "fused": GgmlBlocks(type="Q4_K", axis=-2),
    }
)


def in_own_blocks():
    return {
        "x.weight": torch.zeros(4, 68, dtype=torch.uint8),
        "experts.0.up.weight": torch.zeros(3, 18, dtype=torch.uint8),
        "experts.1.up.weight": torch.zeros(3, 18, dtype=torch.uint8),
        "fused": torch.zeros(2, 144, 5, dtype=torch.uint8),
        "norm.weight": torch.ones(4),
    }


def test_a_view_of_own_blocks_has_the_shapes_of_what_they_hold(tmp_path):
    checkpoint = hand_made(tmp_path / "m", in_own_blocks(), OWN)
    for view in (dequantized(checkpoint), as_read(checkpoint)):
        assert {name: (info.dtype, info.shape) for name, info in view.tensors.items()} == {
            "x.weight": ("F32", (4, 64)),
            "experts.0.up.weight": ("F32", (3, 32)),
            "experts.1.up.weight": ("F32", (3, 32)),
            "fused": ("BF16", (2, 256, 5)),
            "norm.weight": ("F32", (4,)),
        }
        assert "quantization_config" not in view.config
    assert checkpoint.num_bytes == 4 * 68 + 2 * 3 * 18 + 2 * 144 * 5 + 16
    plain = hand_made(tmp_path / "plain", {"x.weight": torch.ones(4, 4)}, None)
    assert as_read(plain) is plain


def group(**changes):
    """Return settings with one group, changed; what is None goes."""
    content = {"encoding": "ggml", "type": "Q8_0", "axis": -1, "dtype": "F32", "tensors": ["x.weight"]} | changes
    return {
        "quant_method": "coterie",
        "groups": [{name: value for name, value in content.items() if value is not None}],
    }


WRONG_BLOCKS = {
    "no groups": ({"quant_method": "coterie"}, "names no groups of tensors"),
    "groups that are none": ({"quant_method": "coterie", "groups": ["x"]}, "names no groups of tensors"),
    "no tensors": (group(tensors=None), "has a group without a list of tensors"),
    "tensors that are none": (group(tensors=[1]), "has a group without a list of tensors"),
    "an unknown encoding": (group(encoding="zip"), "names an encoding that cannot be .*zip"),
    "no encoding": (group(encoding=None), "names an encoding that cannot be"),
    "another encoding": (group(encoding="plain", type=None, axis=None), "encoding"),
    "an unknown type": (group(type="Q9_K"), "names an encoding that cannot be .*Q9_K"),
    "a type that is none": (group(type=["Q8_0"]), "names an encoding that cannot be"),
    "another axis": (group(axis=0), "names an encoding that cannot be .*axis is 0"),
    "a number format that is none": (group(dtype="F9"), "names an encoding that cannot be"),
    "whole numbers": (group(dtype="I32"), "names an encoding that cannot be"),
    "more than it has": (group(level=3), "names an encoding that cannot be"),
    "a tensor that is not there": (group(tensors=["x.weight", "y.*.weight"]), "names 'y.*.weight', and no such tensor"),
    "wrong extents": (group(type="Q4_0"), r"x.weight is U8: \[4, 68\] holds no whole blocks of Q4_0"),
    "a tensor of numbers": (group(tensors=["norm.weight"]), "norm.weight is F32"),
    "the same tensor twice": (
        {"quant_method": "coterie", "groups": group()["groups"] + group(type="Q4_0", tensors=["x.weight"])["groups"]},
        "names 'x.weight' twice",
    ),
}


@pytest.mark.parametrize("case", WRONG_BLOCKS)
def test_settings_of_own_blocks_that_cannot_be_are_refused_in_a_line(tmp_path, case):
    described, message = WRONG_BLOCKS[case]
    checkpoint = hand_made(tmp_path / "m", in_own_blocks(), described)
    for view in (dequantized, as_read):
        with pytest.raises(CorruptCheckpoint, match=message) as error:
            view(checkpoint)
        assert len(str(error.value).splitlines()) == 1


@pytest.fixture(scope="module")
def own_blocks(tmp_path_factory):
    return hand_made(tmp_path_factory.mktemp("own") / "m", in_own_blocks(), OWN)


@given(data=st.data())
def test_any_change_of_the_settings_of_own_blocks_is_read_or_refused_in_a_line(own_blocks, data):
    path = data.draw(st.sampled_from(list(places(OWN))))
    how = data.draw(st.sampled_from(("replace", "remove", "beside")))
    config = own_blocks.config | {"quantization_config": changed(OWN, path, data.draw(values), how)}
    said = ""
    try:
        view = dequantized(replace(own_blocks, config=config))
        with view.reader() as reader:
            for name in view.tensors:
                reader.read(name)
    except (CorruptCheckpoint, UnsupportedDtype) as error:
        said = str(error)
    assert len(said.splitlines()) <= 1
    assert len(said) < 2000
