"""Kernels of few bits against loops in float64, and the numbers that are chosen for them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.errors import UnsupportedDtype
from coterie.model.disk.encodings import kernel_matrix, kernel_rounding
from coterie.model.disk.encodings.kernel_matrix import GROUPS, SCALE, KernelMatrix, this_isa
from coterie.run import kernels
from coterie.run.kernels import KernelLinear, projection_of


def four(group=32, dtype="F32"):
    return KernelMatrix(bits=4, group=group, isa=this_isa(), dtype=dtype)


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def looped(values, x, bias):
    """Return x values^T + bias, in plain loops in float64, and the size of the sums."""
    out = [[0.0] * len(values) for _ in x]
    size = [[0.0] * len(values) for _ in x]
    for t, row in enumerate(x.double().tolist()):
        for r, weights in enumerate(values.double().tolist()):
            out[t][r] = sum(a * b for a, b in zip(row, weights, strict=True)) + float(bias[r])
            size[t][r] = sum(abs(a * b) for a, b in zip(row, weights, strict=True)) + abs(float(bias[r]))
    return torch.tensor(out, dtype=torch.float64), torch.tensor(size, dtype=torch.float64)


@pytest.mark.parametrize("tokens", [1, 3, 9, 17])
@pytest.mark.parametrize(
    ("encoding", "shape"),
    [
        (KernelMatrix(dtype="F32"), (7, 64)),
        (KernelMatrix(dtype="F32"), (33, 96)),
        (four(32), (16, 96)),
        (four(64), (80, 64)),
        (four(128), (48, 256)),
    ],
    ids=str,
)
def test_products_are_those_of_the_numbers_that_are_stored(encoding, shape, tokens):
    stored = encoding.pack(matrix(*shape))
    projection = projection_of(encoding, stored)
    x = matrix(tokens, shape[1], seed=1).to(torch.bfloat16)
    bias = matrix(1, shape[0], seed=2)[0].to(torch.bfloat16)
    expected, size = looped(encoding.unpack(stored), x, bias)
    got = projection(x, bias)
    assert got.dtype == torch.bfloat16
    # Weights, sums and bias are each rounded to bfloat16 once, by a part of 2^-9 at most.
    assert bool(((got.double() - expected).abs() <= 2**-7 * size).all())
    assert float((got.double() - expected).norm()) < 4e-3 * float(expected.norm())
    wide = projection(x.float(), bias.float())
    assert wide.dtype == torch.float32
    assert float((wide.double() - expected).norm()) < 4e-3 * float(expected.norm())


def test_many_tokens_are_computed_in_parts_of_rows(monkeypatch):
    encoding = KernelMatrix()
    projection = projection_of(encoding, encoding.pack(matrix(50, 64)))
    x = matrix(40, 64, seed=1).to(torch.bfloat16)
    expected = projection(x)
    monkeypatch.setattr(kernels, "_BAND", 64 * 7)
    assert torch.equal(projection(x), expected)


def test_a_linear_layer_takes_any_number_of_axes():
    encoding = four(64)
    stored = encoding.pack(matrix(32, 64))
    bias = torch.nn.Parameter(matrix(1, 32, seed=3)[0], requires_grad=False)
    linear = KernelLinear(projection_of(encoding, stored), inputs=64, outputs=32, bias=bias)
    x = matrix(6, 64, seed=4).view(2, 3, 64)
    expected = torch.nn.functional.linear(x, encoding.unpack(stored), bias)
    torch.testing.assert_close(linear(x), expected, rtol=0.02, atol=0.1)
    assert linear(x).shape == (2, 3, 32)
    assert [name for name, _ in linear.named_parameters()] == ["bias"]


# --- the order of the processor ---------------------------------------------------------------------------------------


@given(rows=st.integers(1, 20), columns=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_numbers_come_back_from_the_order_of_the_processor(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (16 * rows, 32 * columns), generator=generator, dtype=torch.uint8)
    assert torch.equal(kernel_matrix._in_order(kernel_matrix._interleaved(codes)), codes)


def test_bands_of_rows_lie_by_themselves():
    codes = torch.randint(0, 16, (2 * kernel_matrix._BAND + 48, 64), dtype=torch.uint8)
    parts = [kernel_matrix._interleaved(part) for part in codes.split(kernel_matrix._BAND)]
    assert torch.equal(kernel_matrix._interleaved(codes), torch.cat(parts))


@pytest.mark.parametrize("encoding", [KernelMatrix(), *(four(group, "BF16") for group in GROUPS)], ids=str)
def test_the_kernel_reads_what_is_unpacked(encoding):
    """A product with the unit matrix is the matrix, as the kernel reads it."""
    stored = encoding.pack(matrix(304, 512))
    unit = torch.eye(512, dtype=torch.bfloat16)
    read = torch.cat([projection_of(encoding, stored)(rows) for rows in unit.split(4)]).T
    torch.testing.assert_close(read, encoding.unpack(stored), rtol=2**-7, atol=1e-6)


def test_numbers_for_another_processor_are_refused():
    other = KernelMatrix(bits=4, group=32, isa="some other")
    for ask in (lambda: other.pack(matrix(16, 32)), lambda: other.unpack(four().pack(matrix(16, 32)))):
        with pytest.raises(UnsupportedDtype, match="lies as processors with some other want it"):
            ask()


# --- numbers and scales -----------------------------------------------------------------------------------------------


def slow_nearest(values, scale, offset, low, high):
    """Return the nearest numbers to values, one by one."""
    levels = [scale * number + offset for number in range(low, high + 1)]
    return [low + min(range(len(levels)), key=lambda n: abs(levels[n] - value)) for value in values]


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_the_nearest_for_their_scale_and_the_error_is_what_it_is(seed):
    values = matrix(3, 64, seed) * torch.tensor([[1.0], [1e-4], [3e3]])
    codes, scales, error = kernel_rounding.by_group(values, 32)
    numbers, steps, wrong = kernel_rounding.by_row(values)
    total = by_row = 0.0
    for row in range(3):
        for group in range(2):
            part = slice(32 * group, 32 * group + 32)
            scale, offset = scales[row, group].double().tolist()
            exact = values[row, part].double().tolist()
            got = [scale * (code - 8) + offset for code in codes[row, part].tolist()]
            nearest = [scale * n + offset for n in slow_nearest(exact, scale, offset, -8, 7)]
            for value, level, best in zip(exact, got, nearest, strict=True):
                assert abs(value - level) <= abs(value - best) * (1 + 1e-5) + 1e-12
            total += sum((a - b) ** 2 for a, b in zip(exact, got, strict=True))
        step = float(steps[row])
        for value, number in zip(values[row].double().tolist(), numbers[row].tolist(), strict=True):
            assert abs(value - step * number) <= abs(step) / 2 * (1 + 1e-5) or abs(number) in (127, 128)
            by_row += (value - step * number) ** 2
    assert math.isclose(error, total, rel_tol=1e-4)
    assert math.isclose(wrong, by_row, rel_tol=1e-4)


@pytest.mark.parametrize("group", GROUPS)
def test_searched_scales_are_better_than_those_of_the_range(group):
    values = matrix(64, 512)
    _, _, error = kernel_rounding.by_group(values, group)
    parts = values.double().view(64, -1, group)
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = float((parts - (low + step * ((parts - low) / step).round())).square().sum())
    assert error < 0.93 * plain


@given(data=st.data(), group=st.sampled_from((32, 64)), scale=st.integers(1, 255), power=st.integers(-30, 20))
@settings(max_examples=40, deadline=None)
def test_numbers_that_had_few_bits_before_stay_as_they_are(data, group, scale, power):
    """Any symmetric group of 16 numbers whose scale is a bfloat16, whichever of its numbers are used."""
    numbers = data.draw(st.lists(st.integers(-8, 7), min_size=group, max_size=group))
    values = torch.tensor([numbers], dtype=torch.float32).expand(16, -1) * (scale * 2.0**power)
    stored, wrong = four(group).fit(values, on_grid=True)
    assert wrong == 0
    assert torch.equal(four(group).unpack(stored), values)
    numbers = data.draw(st.lists(st.integers(-128, 127), min_size=31, max_size=31))
    values = torch.tensor([[*numbers, data.draw(st.integers(100, 127))]], dtype=torch.float32) * (scale * 2.0**power)
    stored, wrong = KernelMatrix(dtype="F32").fit(values, on_grid=True)
    assert wrong == 0
    assert torch.equal(KernelMatrix(dtype="F32").unpack(stored), values)


def test_zeros_constants_and_very_large_and_small_numbers_are_stored():
    for value in (0.0, 1.0, -0.75, 2.0**127, -(2.0**127)):
        values = torch.full((16, 32), value)
        assert torch.equal(four().unpack(four().pack(values)), values)
    assert torch.equal(KernelMatrix(dtype="F32").unpack(KernelMatrix().pack(torch.zeros(2, 32))), torch.zeros(2, 32))
    for power in (-100, 122):
        values = matrix(16, 32) * 2.0**power
        for encoding in (four(), KernelMatrix(dtype="F32")):
            stored, wrong = encoding.fit(values)
            error = float((encoding.unpack(stored).double() - values.double()).square().sum())
            assert 0 < error < 0.01 * float(values.double().square().sum())
            assert math.isclose(wrong, error, rel_tol=1e-3)


@pytest.mark.parametrize("encoding", [KernelMatrix(), four()], ids=str)
def test_what_is_no_number_is_refused(encoding):
    values = matrix(16, 32)
    values[3, 5] = math.nan
    with pytest.raises(UnsupportedDtype, match="numbers that are not finite"):
        encoding.pack(values)


@pytest.mark.parametrize(
    ("encoding", "shape", "message"),
    [
        (KernelMatrix(), (4, 33), "columns a multiple of 32"),
        (KernelMatrix(), (0, 32), "that takes a matrix"),
        (four(), (24, 32), "columns a multiple of 32, rows of 16"),
        (four(64), (16, 96), "columns a multiple of 64"),
        (four(), (2, 16, 32), "that takes a matrix"),
    ],
    ids=str,
)
def test_shapes_that_kernels_do_not_take_are_refused(encoding, shape, message):
    for ask in (encoding.stored, encoding.num_bytes, lambda shape: encoding.pack(torch.ones(shape))):
        with pytest.raises(UnsupportedDtype, match=message):
            ask(shape)


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"bits": 4}, {"bits": 4, "group": 48, "isa": "x"}, {"bits": 8, "group": 32}, {"isa": "x"}]
)
def test_settings_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="no kernel is known for that"):
        KernelMatrix(**options)


def test_scales_lie_beside_numbers_in_the_bytes_that_are_said():
    for encoding, shape, bits in ((KernelMatrix(), (64, 512), 8 + 16 / 512), (four(64), (64, 512), 4.5)):
        stored = encoding.pack(matrix(*shape))
        assert stored.keys() == {"", SCALE}
        assert sum(each.numel() * each.element_size() for each in stored.values()) == encoding.num_bytes(shape)
        assert encoding.num_bytes(shape) == bits * shape[0] * shape[1] / 8
