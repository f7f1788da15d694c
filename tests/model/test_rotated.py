"""Rotated block types: the rotation and its levels against their definitions, errors against the paper's."""

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.model.disk.encodings.ggml import OWN_TYPES, SIZES, get_type
from coterie.model.disk.encodings.ggml.rotated import rotate, rotate_back
from coterie.model.disk.encodings.ggml.rounding import round_columns, round_to_nearest

#: The mean square error of a unit vector's numbers that 2504.19874 reports, by bits; normal numbers have it at least.
ERRORS = {2: 0.117, 3: 0.0345, 4: 0.0095}


def digits_of_pi():
    """Return the first 256 binary digits of pi after the point, by Machin's formula in whole numbers."""

    def arctan_of_inverse(number, one):
        total, power, odd = 0, one // number, 1
        while power:
            total += power // odd if odd % 4 == 1 else -(power // odd)
            power, odd = power // number**2, odd + 2
        return total

    one = 2**320
    pi = 4 * (4 * arctan_of_inverse(5, one) - arctan_of_inverse(239, one))
    return (pi - 3 * one) >> 64


@cache
def slow_rotation():
    """Return the matrix that blocks are multiplied with, in float64, from the words of the module's docstring."""
    digits = digits_of_pi()
    matrix = torch.empty(256, 256, dtype=torch.float64)
    for row in range(256):
        sign = -1 if digits >> (255 - row) & 1 else 1
        for column in range(256):
            matrix[row, column] = sign * (-1) ** (row & column).bit_count() / 16
    return matrix


@cache
def lloyd_max(bits):
    """Return the best levels for a standard normal distribution: each the mean of what is nearest to it."""

    def density(x):
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def below(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    count = 2**bits
    levels = [6 * (place + 0.5) / count - 3 for place in range(count)]
    for _ in range(5000):
        borders = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        pairs = list(pairwise(borders))
        moved = [(density(low) - density(high)) / (below(high) - below(low)) for low, high in pairs]
        done = max(abs(a - b) for a, b in zip(levels, moved, strict=True)) < 1e-12
        levels = moved
        if done:
            break
    return levels


def error_of(value, weight):
    return ((value - weight).double().square().sum(-1) / weight.double().square().sum(-1)).mean().item()


def test_a_block_is_multiplied_with_signs_and_the_hadamard_matrix():
    block = torch.randn(3, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(block), block @ slow_rotation(), rtol=0, atol=1e-12)
    torch.testing.assert_close(rotate_back(block), block @ slow_rotation().T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OWN_TYPES)
def test_any_bits_are_levels_times_the_scale_rotated_back(name):
    bits, size = int(name[-1]), SIZES[name][1]
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(256, (1, 4, size), generator=generator, dtype=torch.uint8)
    scale = torch.rand(4, 1, generator=generator).to(torch.float16)
    blocks[0, :, :2] = scale.view(torch.uint8)
    levels, rotated = lloyd_max(bits), torch.empty(4, 256, dtype=torch.float64)
    for row in range(4):
        for place in range(256):
            # Runs of 32 numbers, from the lowest bits of 32 bytes up; the third bits of all lie behind.
            low = min(bits, 4) if bits != 3 else 2
            run, inside = divmod(place, 32)
            byte, shift = divmod(run, 8 // low)
            code = int(blocks[0, row, 2 + byte * 32 + inside]) >> shift * low & (2**low - 1)
            if bits == 3:
                code |= (int(blocks[0, row, 66 + inside]) >> run & 1) << 2
            rotated[row, place] = levels[code] * scale[row].double()
    expected = rotated @ slow_rotation().T
    torch.testing.assert_close(get_type(name).unpack(blocks)[0].double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", OWN_TYPES)
@pytest.mark.parametrize("drawn", ["normal", "heavy tails", "one number", "alike"])
def test_unit_vectors_are_as_near_as_the_paper_says(name, drawn):
    generator = torch.Generator().manual_seed(2)
    normal = torch.randn(200, 256, generator=generator)
    vectors = {
        "normal": normal, "heavy tails": normal.sign() * normal.abs() ** 4, "alike": torch.ones(1, 256),
        "one number": torch.eye(256),
    }[drawn]  # fmt: skip
    vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    _, value = round_to_nearest(vectors[None], torch.ones(1, 256), get_type(name))
    # Where a single vector is meant its numbers are one draw from the distribution.
    assert error_of(value[0], vectors) < ERRORS[int(name[-1])] * (1.1 if drawn == "alike" else 1.02)


@pytest.mark.parametrize("name", OWN_TYPES)
def test_what_was_read_gives_the_very_bytes_again(name):
    weight = torch.randn(1, 5, 512, generator=torch.Generator().manual_seed(3))
    packed, value = round_to_nearest(weight, torch.ones(1, 512), get_type(name))
    again, value_again = round_to_nearest(value, torch.ones(1, 512), get_type(name))
    assert torch.equal(packed, again)
    assert torch.equal(value, value_again)


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(OWN_TYPES),
    rows=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20),
    seed=st.integers(0, 2**31),
)
def test_errors_are_bounded_whatever_a_block_holds(name, rows, seed):
    block = torch.randn(1, 1, 256, generator=torch.Generator().manual_seed(seed)) * 1e-2
    block[0, 0, : len(rows)] = torch.tensor(rows)
    _, value = round_to_nearest(block, torch.ones(1, 256), get_type(name))
    assert error_of(value[0], block[0]) < 2 * ERRORS[int(name[-1])]


@pytest.mark.parametrize("name", OWN_TYPES)
def test_codes_are_chosen_by_what_errors_cost(name):
    """Against rounding every rotated number by itself, and, in a small case, against all codes that there are."""
    kind, generator = get_type(name), torch.Generator().manual_seed(4)
    weight = torch.randn(1, 40, 256, generator=generator)
    metric = torch.randn(1, 256, 256, generator=generator).triu() / 16 + torch.eye(256)
    scales = kind.fit(weight, torch.ones(1, 1, 256))
    _, value = kind.choose(weight, scales, 0, metric)
    _, alone = kind.choose(weight, scales, 0, torch.eye(256)[None])
    cost, alone_cost = (((each - weight) @ metric).square().sum() for each in (value, alone))
    assert cost < 0.9 * alone_cost
    # One after the other, in float64: each rotated number the best one for the columns of the triangle up to its own.
    rotation = slow_rotation()
    gram = rotation.T @ metric[0].double() @ metric[0].double().T @ rotation
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(256)
    upper = torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1)
    levels = torch.tensor(lloyd_max(int(name[-1])), dtype=torch.float64)
    differs = 0
    for row in range(5):
        target, error = weight[0, row].double() @ rotation, torch.zeros(256, dtype=torch.float64)
        for place in range(256):
            wrong = target[place] - levels * scales.scale_NR[0, row].double()
            best = (wrong * upper[place, place] + error[:place] @ upper[:place, place]).abs().argmin()
            error[place] = wrong[best]
        expected = (target - error) @ rotation.T
        differs += int((expected - value[0, row]).abs().max() > 1e-4)
    assert differs <= 1  # a number in the middle between two levels may go either way


def test_errors_of_a_block_are_made_good_by_the_next_one():
    """With what both blocks have in common taken into account the loss is less than block by block."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(1024, 512, generator=generator) @ (
        torch.randn(512, 512, generator=generator) / 16 + torch.eye(512)
    )
    hessian = inputs.T @ inputs
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True).float()[None]
    weight, importance = torch.randn(1, 16, 512, generator=generator), torch.ones(1, 512)
    _, value = round_columns(weight, importance, upper, get_type("TURBO3"))
    apart = upper.clone()
    apart[:, :256, 256:] = 0
    _, alone = round_columns(weight, importance, apart, get_type("TURBO3"))
    loss, alone_loss = (((each - weight)[0] @ inputs.T).square().sum() for each in (value, alone))
    assert loss < 0.8 * alone_loss
