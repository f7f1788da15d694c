"""Block formats of GGML: bytes against the package gguf, codes and scales against searches through all there are."""

import itertools

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.errors import UnknownName
from coterie.model.disk.encodings.ggml import (
    OWN_TYPES,
    SIZES,
    affine,
    get_type,
    rotated,
    scaled,
    shifted,
    ternary,
    vector,
)
from coterie.model.disk.encodings.ggml.bits import pack_bits, pack_words, unpack_bits, unpack_words
from coterie.model.disk.encodings.ggml.block_type import join_codes

#: Where the float16 numbers of a block lie: MXFP4 has an exponent, and that of IQ1_M is in four parts.
HALVES = {
    "Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82), "Q5_K": (0, 2), "Q4_K": (0, 2), "Q5_1": (0, 2), "Q4_1": (0, 2),
    "MXFP4": (), "TQ2_0": (64,), "TQ1_0": (52,), "IQ1_M": (),
}  # fmt: skip

#: Types that GGUF files can hold.
OF_GGML = [name for name in SIZES if name not in OWN_TYPES]

#: Types whose codes are entries of grids.
GRIDS = {*vector.TYPES, *shifted.TYPES}


def random_blocks(name, rows, seed=0):
    """Return blocks of random bits whose scales are numbers."""
    size = SIZES[name][1]
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (1, rows, size), generator=generator, dtype=torch.uint8)
    for place in HALVES.get(name, (0,)):
        number = torch.randn(1, rows, 1, generator=generator).to(torch.float16)
        blocks[..., place : place + 2] = number.view(torch.uint8)
    if name == "MXFP4":
        blocks[..., 0] = blocks[..., 0].clamp(100, 150)
    if name == "IQ1_M":  # the exponent's highest bit: then the scale is a number
        blocks[..., 55] &= 191
    return blocks


def random_weights(name, rows=6, blocks=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = SIZES[name][0] * blocks
    weight = torch.randn(1, rows, columns, generator=generator) * torch.rand(1, rows, 1, generator=generator)
    return weight, torch.rand(1, 1, columns, generator=generator).square() + 0.01


def rounded(kind, weight_NRB, importance_N1B):
    """Return scales, codes and values of one block, rounded to the nearest."""
    scales, codes, values = kind.fit(weight_NRB, importance_N1B), [], []
    for column in range(0, kind.block, kind.together):
        metric = torch.diag_embed(importance_N1B[:, 0, column : column + kind.together].sqrt())
        chosen, value = kind.choose(weight_NRB[..., column : column + kind.together], scales, column, metric)
        codes.append(chosen)
        values.append(value)
    return scales, join_codes(codes), torch.cat(values, dim=-1)


def test_sizes_are_those_of_gguf():
    ours = {name: SIZES[name] for name in OWN_TYPES}
    assert {name: tuple(GGML_QUANT_SIZES[GGMLQuantizationType[name]]) for name in OF_GGML} | ours == SIZES
    assert {*affine.TYPES, *scaled.TYPES, *ternary.TYPES, *vector.TYPES, *shifted.TYPES} == set(OF_GGML)
    assert tuple(rotated.TYPES) == OWN_TYPES


@pytest.mark.parametrize("name", OF_GGML)
def test_any_bits_are_the_numbers_that_gguf_reads(name):
    blocks = random_blocks(name, rows=40)
    values = get_type(name).unpack(blocks)
    expected = quants.dequantize(blocks[0].numpy(), GGMLQuantizationType[name])
    np.testing.assert_allclose(values[0].numpy(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SIZES)
def test_what_is_packed_is_what_was_chosen(name):
    kind = get_type(name)
    weight, importance = random_weights(name, blocks=1)
    scales, codes, values = rounded(kind, weight, importance)
    blocks = kind.pack(scales, codes)
    assert blocks.dtype == torch.uint8
    assert blocks.shape == (1, 6, SIZES[name][1])
    torch.testing.assert_close(kind.unpack(blocks), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("weight", ["zeros", "one", "outlier", "large", "tiny", "negative"])
def test_odd_blocks_stay_numbers(name, weight):
    kind = get_type(name)
    weights = {
        "zeros": torch.zeros(1, 2, kind.block), "one": torch.ones(1, 2, kind.block),
        "outlier": torch.full((1, 2, kind.block), 1e-3).index_fill(-1, torch.tensor([5]), 30.0),
        "large": torch.linspace(-3e4, 3e4, 2 * kind.block).view(1, 2, -1),
        "tiny": torch.linspace(-1e-7, 1e-7, 2 * kind.block).view(1, 2, -1),
        "negative": torch.linspace(-2.0, -1.0, 2 * kind.block).view(1, 2, -1),
    }  # fmt: skip
    tensor = weights[weight]
    _, _, values = rounded(kind, tensor, torch.ones(1, 1, kind.block))
    assert torch.isfinite(values).all()
    # Nothing is worse than twice the error of storing zeros, and what can be stored exactly nearly is.
    assert (values - tensor).square().sum() <= 2 * tensor.square().sum()
    if weight == "zeros":
        assert not values.any()
    if weight == "one" and name not in OWN_TYPES:  # which are alike for all blocks
        assert (values - 1).abs().max() < (0.35 if name in GRIDS else 0.15)  # they hold few even vectors


@pytest.mark.parametrize("name", [*affine.TYPES, *scaled.TYPES, *ternary.TYPES])
def test_codes_are_the_nearest_of_all(name):
    kind = get_type(name)
    weight, importance = random_weights(name, rows=2, blocks=1, seed=3)
    scales, codes, values = rounded(kind, weight, importance)
    every = range(2**kind.bits) if name in affine.TYPES else range(len(kind.levels))
    for row, column in itertools.product(range(2), range(kind.block)):
        sub = column // kind.sub_block
        scale = scales.scale_NR[0, row].item()
        if name in affine.TYPES:
            step, low = (part[0, row, sub].item() for part in kind.steps(scales))
            numbers = [code * step - low for code in every]
        else:
            numbers = [kind.levels[code] * scale * scales.factor_NRS[0, row, sub].item() for code in every]
        target = weight[0, row, column].item()
        least = min(abs(number - target) for number in numbers)
        assert abs(values[0, row, column].item() - target) <= least + 1e-6 * abs(target)
        assert values[0, row, column].item() == pytest.approx(numbers[codes.code_NRc[0, row, column]], rel=1e-5)


@pytest.mark.parametrize("name", vector.TYPES)
def test_entries_are_the_best_of_all(name):
    kind = get_type(name)
    weight, importance = random_weights(name, rows=2, blocks=1, seed=4)
    scales = kind.fit(weight, importance)
    together = kind.together
    generator = torch.Generator().manual_seed(5)
    metric = torch.randn(1, together, together, generator=generator).triu() * 0.2 + torch.eye(together)
    codes, values = kind.choose(weight[..., :together], scales, 0, metric)
    grid, step = kind.grid.double(), kind.steps(scales)[0, :, 0].double()
    groups = together // kind.group
    entries = torch.cartesian_prod(*[torch.arange(len(grid))] * groups).view(-1, groups)
    for row in range(2):
        # Signs as they were chosen: then the entry is the best of all, but for the few that the diagonal left.
        sign = torch.where(codes.negative_NRv[0, row], -1.0, 1.0).double()
        every = grid[entries].flatten(1) * sign * step[row]
        errors = ((weight[0, row, :together].double() - every) @ metric[0].double()).square().sum(dim=1)
        mine = ((weight[0, row, :together] - values[0, row]).double() @ metric[0].double()).square().sum()
        assert mine <= errors.kthvalue(3).values
        if kind.even:
            assert codes.negative_NRv[0, row].sum() % 2 == 0
        else:
            assert torch.equal(codes.negative_NRv[0, row], weight[0, row, :together] < 0)


@pytest.mark.parametrize("name", shifted.TYPES)
def test_shifted_entries_are_the_best_of_all(name):
    """In float64, one entry after the other; a sub-block of IQ1_S has the shift that its scales say."""
    kind = get_type(name)
    weight, importance = random_weights(name, rows=3, blocks=1, seed=9)
    scales = kind.fit(weight, importance)
    grid = quants.IQ1_S.grid.reshape(2048, 8)
    metric = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(5)).triu() * 0.2 + torch.eye(8)
    for column in (0, 40, 248):
        here = slice(column, column + 8)
        _, values = kind.choose(weight[..., here], scales, column, metric)
        for row in range(3):
            factor = int(scales.factor_NRS[0, row, column // kind.sub_block])
            step = scales.scale_NR[0, row].double() * (2 * (factor % 8) + 1)
            sides = [0.125, -0.125] if name == "IQ1_M" else [-0.125 if factor >= 8 else 0.125]
            every = torch.cat([torch.from_numpy(grid).double() + side for side in sides]) * step
            errors = ((weight[0, row, here].double() - every) @ metric[0].double()).square().sum(dim=1)
            mine = ((weight[0, row, here] - values[0, row]).double() @ metric[0].double()).square().sum()
            assert mine <= errors.min() * (1 + 1e-5)


@pytest.mark.parametrize("name", shifted.TYPES)
def test_scales_of_shifted_entries_are_near_the_best_of_all(name):
    """The first sub-block at every step of a fine scale, its entries searched for on either side, in float64."""
    kind = get_type(name)
    weight, importance = random_weights(name, rows=4, blocks=1, seed=10)
    _, _, values = rounded(kind, weight, importance)
    grid = torch.from_numpy(quants.IQ1_S.grid.reshape(2048, 8)).double()
    mine, least = 0.0, 0.0
    for row in range(4):
        numbers = weight[0, row, : kind.sub_block].double().view(-1, 8)
        weighing = importance[0, 0, : kind.sub_block].double().view(-1, 8)
        errors = []
        for step in torch.linspace(0.05, 1.2, 60, dtype=torch.float64) * numbers.abs().max():
            wrong_2gG = torch.stack(
                [
                    (weighing[:, None] * (numbers[:, None] - (grid + side) * step).square()).sum(-1)
                    for side in (-1 / 8, 1 / 8)
                ]
            )
            by_side = wrong_2gG.amin(dim=-1)
            errors.append(by_side.amin(dim=0).sum() if name == "IQ1_M" else by_side.sum(dim=1).min())
        least += float(min(errors))
        mine += float((weighing * (numbers - values[0, row, : kind.sub_block].double().view(-1, 8)).square()).sum())
    assert mine < 1.1 * least  # steps of sub-blocks are odd multiples of one scale


@pytest.mark.parametrize("name", OF_GGML)
def test_scales_beat_the_plain_choice(name):
    """The largest weight on the largest level, in every sub-block, is what anybody would write."""
    kind = get_type(name)
    weight, importance = random_weights(name, rows=8, blocks=1, seed=6)
    _, _, values = rounded(kind, weight, importance)
    error = (importance * (values - weight).square()).sum()
    sub = weight.unflatten(-1, (-1, kind.sub_block))
    if name in affine.TYPES:
        low, high = sub.amin(-1, keepdim=True).clamp(max=0), sub.amax(-1, keepdim=True)
        step = (high - low) / (2**kind.bits - 1)
        plain = ((sub - low) / step).round() * step + low
    elif name in {**scaled.TYPES, **ternary.TYPES}:
        step = sub.abs().amax(-1, keepdim=True) / max(kind.levels)
        if name == "MXFP4":  # a power of two, at which nothing is cut off
            step = torch.exp2(torch.log2(step).ceil())
        plain = kind.nearest(sub, step)[1] * step
    else:
        step = sub.abs().amax(-1, keepdim=True) / kind.grid.max()
        signs = sub.sign() if name in vector.TYPES else 1  # the others have their signs in the grid
        groups = (sub * signs / step).unflatten(-1, (-1, kind.grid.shape[-1]))
        nearest = kind.grid[torch.cdist(groups.flatten(0, -2), kind.grid).argmin(dim=-1)]
        plain = nearest.view(sub.shape) * step * signs
    assert error < (importance * (plain.flatten(-2) - weight).square()).sum()


@pytest.mark.parametrize("name", ternary.TYPES)
def test_scales_of_three_levels_are_the_best_of_all(name):
    """A search in float64 through scales close together, codes the nearest at each."""
    kind = get_type(name)
    weight, importance = random_weights(name, rows=4, blocks=1, seed=7)
    _, codes, values = rounded(kind, weight, importance)
    assert set(codes.code_NRc.unique().tolist()) == {0, 1, 2}
    for row in range(4):
        numbers, weighing = weight[0, row].double(), importance[0, 0].double()
        step_S1 = torch.linspace(0, numbers.abs().max(), 20_001, dtype=torch.float64)[1:, None]
        wrong_SB = numbers - (numbers / step_S1).round().clamp(-1, 1) * step_S1
        least = (weighing * wrong_SB.square()).sum(dim=-1).min()
        # What rounding the scale to float16 costs is far less than that.
        assert (weighing * (numbers - values[0, row]).square()).sum() < least * (1 + 1e-5)


@pytest.mark.parametrize("name", ternary.TYPES)
def test_numbers_on_the_grid_of_three_levels_give_the_bytes_of_gguf(name):
    generator = torch.Generator().manual_seed(8)
    weight = torch.randint(-1, 2, (1, 5, 256), generator=generator) * torch.rand(1, 5, 1, generator=generator).half()
    packed = get_type(name).pack(*rounded(get_type(name), weight.float(), torch.ones(1, 1, 256))[:2])
    expected = quants.quantize(weight[0].float().numpy(), GGMLQuantizationType[name])
    assert np.array_equal(packed[0].numpy(), expected)
    assert np.array_equal(quants.dequantize(expected, GGMLQuantizationType[name]), weight[0].float().numpy())


@settings(deadline=None, max_examples=20)
@given(
    name=st.sampled_from([*ternary.TYPES, *shifted.TYPES]),
    numbers=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20),
    seed=st.integers(0, 2**31),
)
def test_below_two_bits_nothing_is_worse_than_zeros(name, numbers, seed):
    """Whatever a block holds, and its columns weigh; what three levels hold is stored again as it is."""
    kind, generator = get_type(name), torch.Generator().manual_seed(seed)
    block = torch.randn(1, 1, 256, generator=generator) * 1e-2
    block[0, 0, : len(numbers)] = torch.tensor(numbers)
    importance = torch.rand(1, 1, 256, generator=generator).square() + 1e-3
    _, _, values = rounded(kind, block, importance)
    assert (importance * (values - block).square()).sum() <= (importance * block.square()).sum() * (1 + 1e-3)
    if name in ternary.TYPES:
        _, _, again = rounded(kind, values, importance)
        assert torch.equal(again, values)


def test_an_unknown_type_is_named():
    with pytest.raises(UnknownName, match="Q4_K"):
        get_type("Q4K")


@settings(deadline=None, max_examples=40)
@given(data=st.data(), bits=st.sampled_from([1, 2, 4]), run=st.sampled_from([1, 2, 16]))
def test_bits_come_back(data, bits, run):
    count = run * 8 // bits * data.draw(st.integers(1, 3))
    numbers = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)))
    packed = pack_bits(numbers, bits, run)
    assert packed.numel() == count * bits // 8
    assert torch.equal(unpack_bits(packed, bits, run).long(), numbers)
    # The first run of numbers lies in the lowest bits.
    assert [int(byte) & (2**bits - 1) for byte in packed[:run]] == numbers[:run].tolist()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5))
def test_words_come_back(words):
    packed = pack_words(torch.tensor(words), 4)
    assert packed.numpy().view("<u4").tolist() == words
    assert unpack_words(packed, 4).tolist() == words


@pytest.mark.parametrize("name", vector.TYPES)
def test_sums_over_nearest_entries_are_those_of_a_search_through_all(name):
    kind, generator = get_type(name), torch.Generator().manual_seed(0)
    magnitude, importance = torch.rand(2, 64, generator=generator), torch.rand(2, 64, generator=generator)
    step = torch.rand(2, 64 // kind.sub_block, generator=generator) / float(kind.grid.max()) * 2
    step[0, 0] = 0  # a sub-block of zeros has no step
    product, square = vector._Search(magnitude, importance, kind.grid, kind.sub_block).sums(step)
    for row, place in itertools.product(range(2), range(step.shape[1])):
        expected = [0.0, 0.0]
        for start in range(place * kind.sub_block, (place + 1) * kind.sub_block, kind.group):
            x, w = (each[row, start : start + kind.group].double() for each in (magnitude, importance))
            entries, s = kind.grid.double(), step[row, place].double()
            inverse = 1 / s if s else 0.0
            entry = entries[((w * entries.square()).sum(-1) - 2 * inverse * (w * x * entries).sum(-1)).argmin()]
            expected[0] += float((w * x * entry).sum())
            expected[1] += float((w * entry.square()).sum())
        assert float(product[row, place]) == pytest.approx(expected[0], rel=0.02)
        assert float(square[row, place]) == pytest.approx(expected[1], rel=0.02)
