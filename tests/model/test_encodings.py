"""Encodings: rounding against slow float64 loops, there and back on the grid, and sizes that are said before."""

import itertools
import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.errors import ArchitectureMismatch, UnknownName, UnsupportedDtype
from coterie.model.disk.encodings import ENCODINGS, encoding_from, scaled
from coterie.model.disk.encodings.awq import Awq
from coterie.model.disk.encodings.bit_planes import BitPlanes
from coterie.model.disk.encodings.block_scaled import BlockScaled
from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.model.disk.encodings.gptq import Gptq
from coterie.model.disk.encodings.kernel_matrix import KernelMatrix, this_isa
from coterie.model.disk.encodings.mxfp4 import Mxfp4
from coterie.model.disk.encodings.packed_integers import PackedIntegers
from coterie.model.disk.encodings.plain import Plain
from coterie.model.disk.encodings.ragged import Ragged
from coterie.model.disk.encodings.rearranged import Rearranged
from coterie.model.disk.encodings.shared_base import SharedBase
from coterie.model.disk.encodings.stacked import Stacked
from coterie.model.disk.gguf.take import Take
from coterie.model.disk.tensors import DTYPE_BITS, TORCH_NAMES
from some import first

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

EVEN, ODD = Take(rows=(0, 2, 4)), Take(rows=(1, 3, 5))
TURNED = Take(groups=2, rows=(0,), turned=True, stacked=True)
STACKED = Take(groups=2, rows=(1, 2), stacked=True)

#: One encoding of each kind, with a shape that it can hold.
EXAMPLES = [
    (Plain(dtype="BF16"), (3, 5)),
    (Plain(dtype="F16"), (7,)),
    (Plain(dtype="F32"), ()),
    (BlockScaled(block=(4, 3)), (9, 7)),
    (BlockScaled(block=(128, 128), scales="BF16", dtype="F32"), (2, 5, 130)),
    (BlockScaled(numbers="F8_E5M2", block=(1, 8), scales="F16"), (3, 8)),
    (BlockScaled(block=(9, 7), scale_shape=()), (9, 7)),
    (BlockScaled(block=(9, 7), scale_shape=(3,)), (3, 9, 7)),
    (BlockScaled(block=(4, 4), scale_shape=(3, 2)), (3, 9, 7)),
    (BlockScaled(numbers="I8", block=(1, 32), scales="F8_E8M0"), (3, 64)),
    (BlockScaled(numbers="F4", block=(1, 4), scales="U8"), (2, 3, 8)),
    (Mxfp4(group=4), (2, 8, 3)),
    (Mxfp4(scales="F8_E8M0", dtype="F32"), (1, 64, 2)),
    (PackedIntegers(group=4), (5, 20)),
    (PackedIntegers(group=8, zeros="words", index=True, scales="F16", dtype="F32"), (9, 16)),
    (PackedIntegers(bits=8, group=None, zeros="words", shapes="I32"), (3, 8)),
    (PackedIntegers(bits=8, words=False, group=None, zeros="plain"), (3, 6)),
    (PackedIntegers(bits=8, words=False, group=None, scale_shape=(1,)), (3, 6)),
    (Gptq(group=16), (8, 40)),
    (Gptq(bits=8, group=None, offset=0, index=False, scales="BF16", dtype="F32"), (4, 12)),
    (Gptq(bits=2, group=32), (16, 32)),
    (Awq(group=16), (16, 40)),
    (Awq(group=None, scales="F32"), (8, 5)),
    (BitPlanes(), (3, 5, 64)),
    (BitPlanes(bits=2, group=64, dtype="F32"), (5, 128)),
    (BitPlanes(bits=3, axis=-2), (2, 64, 3)),
    (GgmlBlocks(type="Q4_K"), (3, 5, 512)),
    (GgmlBlocks(type="Q8_0", axis=-2, dtype="F32"), (2, 64, 3)),
    (Ragged(axis=0, width=2, full=5, inner=Plain(dtype="BF16")), (5, 3)),
    (Ragged(axis=1, width=0, full=5, inner=Plain(dtype="F32")), (4, 5)),
    (Ragged(axis=0, width=2, full=5, inner=BlockScaled(block=(4, 3))), (5, 3)),
    (KernelMatrix(), (3, 64)),
    (KernelMatrix(bits=4, group=32, isa=this_isa(), dtype="F32"), (48, 96)),
    (Stacked(count=3, dtype="F32"), (3, 2, 5)),
    (SharedBase(base=GgmlBlocks(type="Q4_K"), factors=GgmlBlocks(type="Q8_0"), rank=5), (4, 64, 256)),
    (SharedBase(base=Plain(dtype="BF16"), factors=Plain(dtype="F16"), rank=3, axis=-2, dtype="F32"), (7, 5)),
    (Rearranged(takes=(EVEN, ODD), shape=(6, 5)), (6, 5)),
    (Rearranged(takes=(EVEN, ODD), shape=(6,), stack=2, dtype="F32"), (2, 6)),
    (Rearranged(takes=(Take(input_first=True),), shape=(3, 4), stack=2), (2, 3, 4)),
    (Rearranged(takes=(TURNED, STACKED), shape=(6, 5), dtype="F32"), (6, 5)),
    (Rearranged(takes=(Take(groups=2, rows=(2, 0, 1)),), shape=(6, 5), dtype="F16"), (6, 5)),
]
SCALED = [(encoding, shape) for encoding, shape in EXAMPLES if isinstance(encoding, BlockScaled | Mxfp4)]


def values_of(encoding, shape, seed=0):
    """Return random values of very different sizes, cut as a ragged encoding wants them."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-9, 9, shape, generator=generator))
    if isinstance(encoding, Ragged):
        tensor.narrow(encoding.axis, encoding.width, encoding.full - encoding.width).zero_()
    return tensor


@pytest.mark.parametrize(("encoding", "shape"), EXAMPLES, ids=str)
def test_what_is_stored_is_what_was_said(encoding, shape):
    stored = encoding.pack(values_of(encoding, shape))
    expected = encoding.stored(shape)
    assert stored.keys() == expected.keys()
    for suffix, (dtype, extents) in expected.items():
        assert stored[suffix].dtype == getattr(torch, TORCH_NAMES[dtype])
        in_torch = (*extents[:-1], extents[-1] // 2) if dtype == "F4" else extents  # torch counts pairs
        assert tuple(stored[suffix].shape) == in_torch
    assert sum(part.numel() * part.element_size() for part in stored.values()) == encoding.num_bytes(shape)
    unpacked = encoding.unpack(stored)
    assert tuple(unpacked.shape) == shape


@pytest.mark.parametrize(("encoding", "shape"), EXAMPLES, ids=str)
def test_an_encoding_makes_itself_again(encoding, shape):
    config = json.loads(json.dumps(encoding.config()))
    assert config["encoding"] in ENCODINGS
    assert encoding_from(config) == encoding


def test_every_encoding_has_an_example():
    assert {encoding.config()["encoding"] for encoding, _ in EXAMPLES} == ENCODINGS.keys()


def test_an_unknown_encoding_is_refused():
    with pytest.raises(UnknownName, match="encoding 'plane'; did you mean plain"):
        encoding_from({"encoding": "plane"})


# --- the grid: the numbers of a format, from their bits -----------------------------------------------------------


def small_float(code, exponent_bits, mantissa_bits, bias):
    """Return the value of an 8-bit float from its bits, or None for what is no finite number."""
    sign = -1.0 if code >> 7 else 1.0
    exponent, mantissa = code >> mantissa_bits & (1 << exponent_bits) - 1, code & (1 << mantissa_bits) - 1
    top = (1 << exponent_bits) - 1
    if exponent == top and (mantissa == (1 << mantissa_bits) - 1 if mantissa_bits == 3 else True):
        return None  # E4M3 has one NaN a sign, E5M2 is as IEEE has it
    fraction = mantissa / (1 << mantissa_bits)
    magnitude = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
    return sign * magnitude


GRIDS = {
    "F8_E4M3": sorted({value for code in range(256) if (value := small_float(code, 4, 3, 7)) is not None}),
    "F8_E5M2": sorted({value for code in range(256) if (value := small_float(code, 5, 2, 15)) is not None}),
    "F4": sorted({sign * value for value in FP4 for sign in (1, -1)}),
}


def grid_of(encoding):
    return GRIDS[encoding.numbers if isinstance(encoding, BlockScaled) and encoding.numbers in GRIDS else "F4"]


def blocks_of(encoding, shape):
    """Yield the positions of each block of elements that share a scale, by plain loops."""
    if isinstance(encoding, Mxfp4):
        count, columns, rows = shape
        for n, row, start in itertools.product(range(count), range(rows), range(0, columns, encoding.group)):
            yield [(n, column, row) for column in range(start, start + encoding.group)]
        return
    *lead, rows, columns = shape
    leads = list(itertools.product(*map(range, lead)))
    size = encoding.scale_shape
    together = [leads] if size is not None and math.prod(size) < len(leads) * math.prod(
        -(-extent // part) for extent, part in zip((rows, columns), encoding.block, strict=True)
    ) else [[each] for each in leads]  # fmt: skip
    for group in together:
        for top, left in itertools.product(range(0, rows, encoding.block[0]), range(0, columns, encoding.block[1])):
            yield [
                (*at, row, column)
                for at in group
                for row in range(top, min(top + encoding.block[0], rows))
                for column in range(left, min(left + encoding.block[1], columns))
            ]


def slow_scale(encoding, largest):
    """Return the scale of a block whose largest number this is: in float64, by trying where it is a power of two."""
    limit = max(grid_of(encoding))
    if largest == 0:
        return 1.0
    if encoding.scales not in scaled.EXPONENTS:
        dtype = getattr(torch, TORCH_NAMES[encoding.scales])
        return float(torch.tensor(largest / limit, dtype=torch.float64).to(torch.float32).to(dtype))
    return next(2.0**power for power in range(-127, 128) if Fraction(largest) <= Fraction(limit) * Fraction(2) ** power)


@pytest.mark.parametrize(("encoding", "shape"), SCALED, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_rounded_to_the_nearest_of_the_grid(encoding, shape, seed):
    tensor = values_of(encoding, shape, seed)
    wide = encoding_from(encoding.config() | {"dtype": "F32"})
    found = wide.unpack(wide.pack(tensor))
    seen = 0
    for places in blocks_of(encoding, shape):
        numbers = [float(tensor[place].double()) for place in places]
        scale = slow_scale(encoding, max(map(abs, numbers)))
        for place, number in zip(places, numbers, strict=True):
            nearest = min(abs(number - scale * code) for code in grid_of(encoding))
            error = abs(number - float(found[place].double()))
            assert error <= nearest + 1e-6 * abs(number), (place, number, scale, float(found[place]))
            seen += 1
    assert seen == math.prod(shape)


@pytest.mark.parametrize(("encoding", "shape"), first(5, SCALED), ids=str)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_what_is_on_the_grid_comes_back_exactly(encoding, shape, data):
    """Scales that are powers of two fit any block; others are found again where the largest code is used."""
    power = encoding.scales in scaled.EXPONENTS
    codes = grid_of(encoding)
    tensor = torch.zeros(shape, dtype=torch.float64)
    for places in blocks_of(encoding, shape):
        exponent = data.draw(st.integers(-20, 20) if encoding.scales != "F16" else st.integers(-5, 5))
        scale = 2.0**exponent * (1 if power else data.draw(st.sampled_from((1.0, 1.25, 1.6875))))
        drawn = data.draw(st.lists(st.sampled_from(codes), min_size=len(places), max_size=len(places)))
        if not power:
            drawn[0] = max(codes)
        for place, code in zip(places, drawn, strict=True):
            tensor[place] = scale * code
    wide = encoding_from(encoding.config() | {"dtype": "F32"})
    found = wide.unpack(wide.pack(tensor.float()))
    assert torch.equal(found.double(), tensor)
    again = wide.unpack(wide.pack(found))
    assert torch.equal(again, found)


def test_half_way_goes_to_the_even_number():
    row = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    encoding = BlockScaled(numbers="I8", block=(1, 8), scales="U8", dtype="F32")
    expected = torch.tensor([6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(encoding.unpack(encoding.pack(torch.stack((row, -row)))), torch.stack((expected, -expected)))
    eight = BlockScaled(block=(1, 3), scales="F32", dtype="F32")
    found = eight.unpack(eight.pack(torch.tensor([[448.0, 17.0, 19.0]])))
    assert torch.equal(found, torch.tensor([[448.0, 16.0, 20.0]]))


def test_blocks_of_zeros_stay_zeros_and_signs_stay():
    for encoding in (BlockScaled(block=(2, 2)), BlockScaled(block=(2, 2), scales="U8")):
        zeros = encoding.unpack(encoding.pack(torch.tensor([[0.0, -0.0], [0.0, 0.0]])))
        assert torch.equal(zeros, torch.zeros(2, 2, dtype=torch.bfloat16))
        assert torch.signbit(zeros).tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_is_refused(wrong):
    tensor = torch.ones(2, 4, 8)
    tensor[1, 2, 3] = wrong
    matrix = torch.full((8, 8), wrong)
    for encoding in (PackedIntegers(), Gptq(), Awq()):
        with pytest.raises(UnsupportedDtype, match="numbers that are not finite"):
            encoding.pack(matrix)
    for encoding in (BlockScaled(), Mxfp4(group=4)):
        with pytest.raises(UnsupportedDtype, match="numbers that are not finite"):
            encoding.pack(tensor)


def test_a_scale_that_is_too_narrow_is_refused():
    with pytest.raises(UnsupportedDtype, match="reaches 1e\\+30, for which a scale in F16 is too narrow"):
        BlockScaled(scales="F16").pack(torch.full((2, 2), 1e30))


@pytest.mark.parametrize(
    ("encoding", "shape", "message"),
    [
        (BlockScaled(), (5,), "two axes or more"),
        (BlockScaled(), (0, 5), "none of them empty"),
        (BlockScaled(numbers="I8"), (4, 5), "an even number of columns"),
        (Gptq(), (8, 9), "both axes a multiple of 8"),
        (Awq(), (9, 8), "its rows a multiple of 8"),
        (PackedIntegers(), (4,), "that takes a matrix"),
        (PackedIntegers(), (0, 8), "that takes a matrix"),
        (PackedIntegers(), (4, 9), "leave room in their last word"),
        (Mxfp4(), (4, 32), "a stack of matrices"),
        (Mxfp4(), (4, 33, 2), "groups of 32"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(encoding, shape, message):
    for ask in (encoding.stored, encoding.num_bytes, lambda shape: encoding.pack(torch.ones(shape))):
        with pytest.raises(UnsupportedDtype, match=message):
            ask(shape)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plain(dtype="BF17"),
        lambda: BlockScaled(numbers="BF16"),
        lambda: BlockScaled(scales="I8"),
        lambda: BlockScaled(block=(0, 4)),
        lambda: Mxfp4(group=3),
        lambda: Mxfp4(scales="F32"),
        lambda: Gptq(bits=3),
        lambda: Gptq(offset=2),
        lambda: Gptq(scales="I8"),
        lambda: Awq(group=0),
        lambda: PackedIntegers(bits=3),
        lambda: PackedIntegers(words=False),
        lambda: PackedIntegers(group=0),
        lambda: PackedIntegers(zeros="some"),
        lambda: PackedIntegers(scales="I8"),
        lambda: Ragged(axis=0, width=4, full=3, inner=Plain(dtype="F32")),
        lambda: Ragged(axis=-1, width=4, full=5, inner=Plain(dtype="F32")),
    ],
)
def test_settings_that_cannot_be_are_refused(make):
    with pytest.raises(ValueError, match=r"is|are"):
        make()


@pytest.mark.parametrize("zeros", ["none", "words"])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_rounded_to_the_nearest(bits, zeros):
    encoding = PackedIntegers(bits=bits, group=8, zeros=zeros, scales="F32", dtype="F32")
    tensor = values_of(encoding, (5, 24))
    stored = encoding.pack(tensor)
    step = stored["_scale"].double().repeat_interleave(8, dim=1)
    # With zeros, the zero itself is rounded: the ends of a group may then be cut off by half a step.
    assert bool(((encoding.unpack(stored) - tensor).abs() <= step * (0.5001 if zeros == "none" else 1.0001)).all())
    largest = tensor.view(5, 3, 8).abs().amax(dim=2)
    assert bool((stored["_scale"] <= largest / (2 ** (bits - 1) - 1) * 1.001).all())


@given(width=st.integers(0, 5), axis=st.integers(0, 1), seed=st.integers(0, 99))
def test_cutting_and_filling_up_are_inverse(width, axis, seed):
    encoding = Ragged(axis=axis, width=width, full=5, inner=Plain(dtype="F32"))
    tensor = values_of(encoding, (5, 5), seed)
    stored = encoding.pack(tensor)
    assert stored[""].shape[axis] == width
    assert torch.equal(encoding.unpack(stored), tensor)


def test_only_zeros_of_the_right_axis_are_cut_off():
    encoding = Ragged(axis=1, width=2, full=3, inner=Plain(dtype="F32"))
    with pytest.raises(ArchitectureMismatch, match="axis 1 is not the width of an expert; please report it"):
        encoding.pack(torch.ones(2, 3))
    with pytest.raises(ArchitectureMismatch, match=r"\[2, 4\]: axis 1 is not 3"):
        encoding.num_bytes((2, 4))


@given(dtype=st.sampled_from(("BF16", "F16", "F32")), shape=st.lists(st.integers(0, 4), max_size=3).map(tuple))
def test_plain_numbers_stay(dtype, shape):
    encoding = Plain(dtype=dtype)
    tensor = values_of(encoding, shape).to(getattr(torch, TORCH_NAMES[dtype]))
    stored = encoding.pack(tensor)
    assert stored[""] is tensor
    assert torch.equal(encoding.unpack(stored), tensor)
    assert encoding.num_bytes(shape) == math.prod(shape) * DTYPE_BITS[dtype] // 8


@pytest.mark.parametrize("band", [1, 7, 64])
def test_the_size_of_a_band_changes_nothing(monkeypatch, band):
    encoding = BlockScaled(block=(4, 3))
    tensor = values_of(encoding, (2, 9, 7))
    whole = encoding.pack(tensor)
    monkeypatch.setattr(scaled, "BAND", band)
    for suffix, part in encoding.pack(tensor).items():
        assert torch.equal(part.view(torch.uint8), whole[suffix].view(torch.uint8))
    assert torch.equal(encoding.unpack(whole), encoding.unpack(encoding.pack(tensor)))


@pytest.mark.parametrize(("encoding", "shape"), EXAMPLES, ids=str)
def test_rows_that_lie_by_themselves_are_the_same_rows(encoding, shape):
    rows = encoding.rows(shape, 1) if shape else None
    alone = (
        bool(shape)
        and {
            Plain: True,
            BlockScaled: len(shape) > 2,
            Mxfp4: True,
            BitPlanes: False,
            GgmlBlocks: True,
            PackedIntegers: False,
            Gptq: False,
            Awq: False,
            KernelMatrix: False,
            Stacked: False,
            Ragged: getattr(encoding, "axis", 0) > 0,
            SharedBase: len(shape) > 2,
            Rearranged: getattr(encoding, "stack", None) is not None,
        }[type(encoding)]
    )
    assert (rows is not None) == alone
    if rows is None:
        return
    inner, shared = rows
    whole = encoding.pack(values_of(encoding, shape))
    for row in range(shape[0]):
        part = {
            suffix: stored if suffix in shared else stored.view(stored.dtype)[row : row + 1]
            for suffix, stored in whole.items()
        }
        assert torch.equal(inner.unpack(part), encoding.unpack(whole)[row : row + 1])
        assert {suffix: tuple(stored.shape) for suffix, stored in part.items()} == {
            suffix: (*extents[:-1], extents[-1] // 2) if dtype == "F4" else extents
            for suffix, (dtype, extents) in inner.stored((1, *shape[1:])).items()
        }
