"""Integers in groups, as compressed-tensors stores them: bytes against slow references and the package itself."""

import pytest
import torch
from tests.integer_formats import compressed_words

from coterie.errors import UnknownName
from coterie.model.disk.encodings.block_types import SIZES, bits_of, get_type
from coterie.model.disk.encodings.ggml.rounding import round_columns, round_to_nearest
from coterie.model.disk.encodings.integer_groups import as_stored
from coterie.model.disk.encodings.integer_types import INTEGERS, are_integers, integer_encoding, integers_of_bits


class Chosen:
    """Codes and scales that were chosen, in the form that `compressed_words` writes number by number."""

    def __init__(self, values_RC, byte_RK, bits, group):
        self.bits = bits
        size = 2 + group * bits // 8
        scale = byte_RK.view(len(byte_RK), -1, size)[..., :2].contiguous().view(torch.bfloat16).squeeze(-1)
        self.scales = scale
        scales = scale.double().tolist()
        self.codes = [
            [round(value / scales[row][column // group]) + 2 ** (bits - 1) for column, value in enumerate(values)]
            for row, values in enumerate(values_RC.double().tolist())
        ]


def weights(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, rows, columns, generator=generator) * torch.rand(1, rows, 1, generator=generator)
    return weight, torch.rand(1, columns, generator=generator).square() + 0.01


def test_types_have_names_sizes_and_bits():
    assert {name for name in SIZES if name.startswith("INT")} == set(INTEGERS)
    assert SIZES["INT4_G128"] == (128, 66)
    assert bits_of("INT8_G32") == 8.5
    assert integers_of_bits(4) == ["INT4_G128", "INT4_G64", "INT4_G32"]
    assert get_type("Q4_K").name == "Q4_K"
    assert are_integers(["INT4_G64"])
    assert not are_integers(["INT4_G64", "Q4_K"])
    assert not are_integers([])
    with pytest.raises(UnknownName):
        get_type("INT3_G128")


@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_stored_is_what_was_chosen(name):
    bits, group = INTEGERS[name]
    weight, importance = weights(rows=5, columns=3 * group)
    byte_NRK, values = round_to_nearest(weight, importance, get_type(name))
    assert byte_NRK.shape == (1, 5, 3 * SIZES[name][1])
    blocks = byte_NRK.view(1, -1, SIZES[name][1])
    torch.testing.assert_close(get_type(name).unpack(blocks).view(1, 5, -1), values, rtol=0, atol=0)
    stored = as_stored(byte_NRK[0], name)
    expected = compressed_words(Chosen(values[0], byte_NRK[0], bits, group))
    torch.testing.assert_close(stored[""], expected["weight_packed"], rtol=0, atol=0)
    torch.testing.assert_close(stored["_scale"], expected["weight_scale"], rtol=0, atol=0)
    torch.testing.assert_close(stored["_shape"], expected["weight_shape"], rtol=0, atol=0)
    encoding, shape = integer_encoding(name), tuple(weight.shape[1:])
    assert {suffix: tuple(tensor.shape) for suffix, tensor in stored.items()} == {
        suffix: extents for suffix, (_, extents) in encoding.stored(shape).items()
    }
    assert sum(tensor.nbytes for tensor in stored.values()) == encoding.num_bytes(shape)
    read = encoding.unpack(stored)
    torch.testing.assert_close(read, values[0].bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["INT4_G32", "INT8_G64"])
def test_what_was_read_is_packed_to_the_same_bytes(name):
    weight, importance = weights(rows=4, columns=2 * INTEGERS[name][1], seed=1)
    group = INTEGERS[name][1]
    weight[0, :, ::group] = 1.5 * weight[0].view(4, -1, group).abs().amax(-1)  # with a code at the end of the range
    weight[0, 1, :group] = 0
    byte_NRK, _ = round_to_nearest(weight.bfloat16().float(), importance, get_type(name))
    first = integer_encoding(name).unpack(as_stored(byte_NRK[0], name)).float()
    stored = integer_encoding(name).pack(first)
    again = integer_encoding(name).unpack(stored)
    torch.testing.assert_close(integer_encoding(name).pack(again.float()), stored, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "near"), [("INT4_G32", 1.03), ("INT4_G128", 1.03), ("INT8_G32", 1.45)])
def test_scales_are_about_as_good_as_the_best_of_a_fine_search(name, near):
    """With many levels the error is rough in the scale, and the best of four hundred is a matter of luck."""
    bits, group = INTEGERS[name]
    weight, importance = weights(rows=64, columns=group, seed=7)
    _, values = round_to_nearest(weight, importance, get_type(name))
    half = 2 ** (bits - 1)

    def error(value_RC):
        return (importance.double() * (weight[0].double() - value_RC).square()).sum(-1)

    best = torch.full((64,), torch.inf, dtype=torch.float64)
    for share in torch.linspace(0.5, 1.4, 400, dtype=torch.float64):
        step = (weight[0].double().abs().amax(-1, keepdim=True) * share / (half - 1)).bfloat16().double()
        value_RC = (weight[0].double() / step).round().clamp(-half, half - 1) * step
        best = torch.minimum(best, error(value_RC))
    ratio = error(values[0].double()) / best
    assert float(ratio.mean()) < near
    largest = weight[0].double().abs().amax(-1, keepdim=True) / (half - 1)
    plain = (weight[0].double() / largest).round() * largest
    assert float(error(values[0].double()).sum()) < 0.95 * float(error(plain).sum())


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-6, 1e30])
def test_weights_of_any_size_are_numbers(name, scale):
    group = INTEGERS[name][1]
    weight, importance = weights(rows=3, columns=group)
    weight = weight * scale
    byte_NRK, values = round_to_nearest(weight, importance, get_type(name))
    read = integer_encoding(name).unpack(as_stored(byte_NRK[0], name)).float()
    assert bool(torch.isfinite(read).all())
    if scale == 0:
        assert not read.any()
    elif scale > 1e-30:
        assert bool(((values - weight).abs() <= 0.45 * weight.abs().amax(-1, keepdim=True)).all())


def test_columns_of_which_none_matters_are_rounded_all_the_same():
    weight, importance = weights(rows=2, columns=64)
    _, values = round_to_nearest(weight, torch.zeros_like(importance), get_type("INT4_G64"))
    assert float((values - weight).abs().max()) < 0.45 * float(weight.abs().max())


def test_error_is_fed_back_as_with_any_type():
    weight, _ = weights(rows=8, columns=64, seed=3)
    inputs_TC = torch.randn(200, 64, generator=torch.Generator().manual_seed(4)) @ torch.randn(
        64, 64, generator=torch.Generator().manual_seed(5)
    )
    hessian_CC = inputs_TC.T @ inputs_TC / 200 + 0.01 * torch.eye(64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian_CC), upper=True)[None]

    def damage(values):
        return float(((values[0] - weight[0]) @ inputs_TC.T).square().sum())

    kind, diagonal = get_type("INT4_G32"), hessian_CC.diagonal()[None]
    assert damage(round_columns(weight, diagonal, upper, kind)[1]) < 0.6 * damage(
        round_to_nearest(weight, diagonal, kind)[1]
    )


@pytest.mark.parametrize("name", INTEGERS)
def test_compressed_tensors_reads_and_writes_the_same(name):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    bits, group = INTEGERS[name]
    weight, importance = weights(rows=4, columns=2 * group)
    byte_NRK, values = round_to_nearest(weight, importance, get_type(name))
    stored = as_stored(byte_NRK[0], name)
    theirs = {f"weight{suffix or '_packed'}": tensor for suffix, tensor in stored.items()}
    described = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    scheme = QuantizationScheme(targets=["Linear"], weights=described)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    read = compressor.decompress(theirs, scheme)
    torch.testing.assert_close(read["weight"], values[0].bfloat16(), rtol=0, atol=0)
    again = compressor.compress({"weight": values[0], "weight_scale": stored["_scale"]}, scheme)
    torch.testing.assert_close(again["weight_packed"], stored[""], rtol=0, atol=0)
