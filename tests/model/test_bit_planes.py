"""Planes of bits: against slow float64 loops, prefixes against what is stored in fewer bits, and in a checkpoint."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from coterie import load_model
from coterie.errors import CorruptCheckpoint, UnsupportedDtype
from coterie.model.disk.encodings import quantization_config
from coterie.model.disk.encodings.bit_planes import BitPlanes, read_in_fewer_bits
from coterie.model.disk.open import open_checkpoint
from coterie.testing import tiny_checkpoint


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def slow_values(data, groups, group, bits):
    """Return the numbers (groups, group) of a tensor's bytes, one after the other, float64."""
    values, at = np.zeros((groups, group)), 0
    for plane in range(bits - 1):
        width = 2 if plane == 0 else 1
        scales = np.frombuffer(data[at : at + 2 * groups], np.float16)
        at += 2 * groups
        run = group * width // 8
        for number in range(groups):
            for place in range(group):
                byte = data[at + number * run + place % run]
                code = byte >> place // run * width & (1 << width) - 1
                values[number, place] += float(scales[number]) * (code - 1.5 if width == 2 else 1 - 2 * code)
        at += groups * run
    assert at == len(data)
    return values


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_are_those_of_the_bytes_read_one_by_one(bits, group):
    encoding = BitPlanes(bits=bits, group=group, dtype="F32")
    blocks = encoding.pack(numbers(3, 128))[""]
    expected = slow_values(blocks.numpy().tobytes(), 3 * 128 // group, group, bits)
    assert np.allclose(encoding.unpack({"": blocks}).double().numpy().reshape(expected.shape), expected, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_prefix_of_the_bytes_is_the_tensor_in_fewer_bits(bits):
    whole, weight = BitPlanes(bits=4, dtype="F32"), numbers(2, 5, 64)
    byte_K, lower = whole.pack(weight)[""].flatten(), whole.fewer(bits)
    prefix_K = byte_K[: lower.num_bytes(weight.shape)]
    expected = lower.unpack({"": prefix_K.view(lower.stored(tuple(weight.shape))[""][1])})
    slow = slow_values(prefix_K.numpy().tobytes(), 2 * 5 * 2, 32, bits)
    assert np.allclose(expected.double().numpy().reshape(slow.shape), slow, rtol=1e-6)
    assert torch.equal(whole.unpack_prefix(prefix_K, weight.shape, bits), expected)
    assert torch.equal(whole.unpack_prefix(byte_K, weight.shape, bits), expected)


def test_each_plane_is_the_sign_and_the_mean_of_what_is_missing():
    """By loops over groups in float64, from the values in fewer bits."""
    weight, whole = numbers(4, 64), BitPlanes(bits=4, dtype="F32")
    byte_K = whole.pack(weight)[""].flatten()
    planes = [whole.unpack_prefix(byte_K, weight.shape, bits).double().reshape(-1, 32) for bits in (2, 3, 4)]
    for before, after in itertools.pairwise(planes):
        for wanted, low, high in zip(weight.double().reshape(-1, 32), before, after, strict=True):
            missing = wanted - low
            expected = low + torch.where(missing < 0, -1.0, 1.0) * float(np.float16(missing.abs().mean()))
            torch.testing.assert_close(high, expected, rtol=1e-5, atol=1e-6)


def test_steps_of_the_base_are_about_the_best_that_there_are():
    """Beside a fine search over steps in float64."""
    weight = numbers(50, 32)
    base = BitPlanes(bits=2, dtype="F32")
    found = (weight - base.unpack(base.pack(weight))).double().square().sum()
    least = 0.0
    for row in weight.double():
        steps = torch.linspace(0.2, 1.2, 2001, dtype=torch.float64)[:, None] * row.abs().max() / 1.5
        nearest = ((row / steps).floor() + 0.5).clamp(-1.5, 1.5) * steps
        least += float((row - nearest).square().sum(-1).min())
    assert least * (1 - 1e-3) <= found <= 1.02 * least


@pytest.mark.parametrize("bits", [3, 4])
def test_steps_of_all_planes_are_about_the_best_that_there_are(bits):
    """Beside a fine search over steps in float64, with signs that count what is missing on average."""
    weight = numbers(50, 64, seed=1)
    whole = BitPlanes(bits=bits, group=64, dtype="F32")
    found = (weight - whole.unpack(whole.pack(weight))).double().square().sum()
    least = 0.0
    for row in weight.double():
        steps = torch.linspace(0.2, 1.2, 501, dtype=torch.float64)[:, None] * row.abs().max() / 1.5
        missing = row - ((row / steps).floor() + 0.5).clamp(-1.5, 1.5) * steps
        for _ in range(bits - 2):
            missing = missing - torch.where(missing < 0, -1.0, 1.0) * missing.abs().mean(-1, keepdim=True)
        least += float(missing.square().sum(-1).min())
    assert least * (1 - 1e-3) <= found <= 1.05 * least


@pytest.mark.parametrize("bits", [2, 4])
def test_matrices_may_lie_transposed(bits):
    weight = numbers(3, 64, 7)
    along, across = BitPlanes(bits=bits, dtype="F32"), BitPlanes(bits=bits, axis=-2, dtype="F32")
    stored = across.pack(weight)[""]
    assert tuple(stored.shape) == across.stored((3, 64, 7))[""][1]
    assert across.shape_of(tuple(stored.shape)) == (3, 64, 7)
    turned = along.pack(weight.mT)[""]
    assert torch.equal(stored.flatten(), turned.flatten())
    assert torch.equal(across.unpack({"": stored}), along.unpack({"": turned}).mT)


def test_each_plane_takes_most_of_the_error_off():
    weight, whole = numbers(64, 256), BitPlanes(dtype="F32")
    byte_K = whole.pack(weight)[""].flatten()
    errors = [
        float((weight - whole.unpack_prefix(byte_K, weight.shape, bits)).square().mean() / weight.square().mean())
        for bits in (2, 3, 4)
    ]
    assert errors[0] < 0.14
    assert errors[1] < 0.25 * errors[0]
    assert errors[2] < 0.25 * errors[1]


def test_zeros_are_zeros_and_what_is_beyond_float16_is_a_number():
    whole = BitPlanes(dtype="F32")
    assert torch.equal(whole.unpack(whole.pack(torch.zeros(2, 32))), torch.zeros(2, 32))
    assert whole.unpack(whole.pack(torch.full((2, 32), 1e30))).isfinite().all()


@pytest.mark.parametrize(("bits", "size"), [(2, 2.5), (3, 4.0), (4, 5.5)])
def test_bits_of_a_number_with_its_scales(bits, size):
    assert BitPlanes(bits=bits).num_bytes((4, 64)) * 8 / (4 * 64) == size


@pytest.mark.parametrize(
    ("options", "says"),
    [({"bits": 5}, "bits is 5: it should be 2 to 4"), ({"group": 48}, "group is 48: it should be a multiple of 32"),
     ({"axis": 0}, "axis is 0: it should be -1 or -2"), ({"dtype": "I8"}, "dtype is 'I8'")],
)  # fmt: skip
def test_what_cannot_be_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        BitPlanes(**options)


def test_shapes_bytes_and_bits_that_do_not_fit_are_refused():
    with pytest.raises(UnsupportedDtype, match=r"\[4, 40\] cannot be stored in planes of bits"):
        BitPlanes().pack(torch.zeros(4, 40))
    with pytest.raises(UnsupportedDtype, match="holds no whole groups of 22 bytes"):
        BitPlanes().shape_of((4, 40))
    with pytest.raises(ValueError, match=r"10 bytes are no \[4, 32\] in 3 bits: that takes the first 64"):
        BitPlanes().unpack_prefix(torch.zeros(10, dtype=torch.uint8), (4, 32), 3)
    with pytest.raises(ValueError, match="3 bits are stored of each number, so 4 cannot be read"):
        BitPlanes(bits=3).fewer(4)


def test_a_checkpoint_in_planes_loads_and_its_file_is_read_in_part(tmp_path):
    """Beside a plain checkpoint with the same numbers; the first bytes of a tensor are read where the header says."""
    model = tiny_checkpoint(tmp_path / "model", "qwen3_moe", hidden_size=64, moe_intermediate_size=32)
    [file] = [path.name for path in model.glob("*.safetensors")]
    weights = load_file(model / file)
    chosen = [name for name in weights if ".experts." in name]
    encoding = BitPlanes(dtype="F32")
    packed = {name: encoding.pack(weights[name])[""] for name in chosen}
    plain = {name: encoding.unpack({"": packed[name]}) for name in chosen}
    for folder, changed in (("planes", packed), ("plain", plain)):
        shutil.copytree(model, tmp_path / folder)
        save_file({**weights, **changed}, tmp_path / folder / file, metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = quantization_config(dict.fromkeys(chosen, encoding))
    (tmp_path / "planes" / "config.json").write_text(json.dumps(config))
    ids_BS = torch.arange(5, 21)[None]
    with torch.no_grad():
        found, expected = (
            load_model(tmp_path / folder, dtype=torch.float32)(input_ids=ids_BS).logits
            for folder in ("planes", "plain")
        )
    assert torch.equal(found, expected)
    name = chosen[0]
    checkpoint, low = open_checkpoint(tmp_path / "planes"), encoding.fewer(2)
    info = checkpoint.tensors[name]
    values = read_in_fewer_bits(tmp_path / "planes", info, 2)
    assert torch.equal(values, encoding.unpack_prefix(packed[name].flatten(), info.shape, 2))
    assert torch.equal(read_in_fewer_bits(tmp_path / "planes", info, 4), plain[name])
    # What lies behind the prefix is not read: the file may end there.
    stored = info.packed.stored[""]
    with (tmp_path / "planes" / file).open("r+b") as whole:
        whole.truncate(stored.begin + low.num_bytes(info.shape))
    assert torch.equal(read_in_fewer_bits(tmp_path / "planes", info, 2), values)
    with pytest.raises(CorruptCheckpoint, match="ends within"):
        read_in_fewer_bits(tmp_path / "planes", info, 3)
    other = open_checkpoint(model).tensors[name]
    with pytest.raises(ValueError, match="is not stored in planes of bits"):
        read_in_fewer_bits(model, other, 2)
