"""Checkpoints in integers that other tools wrote: every value as in a slow reference, and what cannot be is refused."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.errors import CorruptCheckpoint, UnsupportedDtype
from coterie.model.disk.encodings import integers, scaled
from coterie.model.disk.quantized import dequantized
from hostile import changed, places, values
from integer_formats import (
    Matrix,
    awq,
    awq_config,
    compressed_bytes,
    compressed_config,
    compressed_words,
    gptq,
    gptq_config,
    hand_made,
    int32,
    read_all,
    under,
)

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def some_matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# --- words and codes ----------------------------------------------------------------------------------------------


@given(st.sampled_from((2, 4, 8)), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=20)
def test_codes_come_back_from_words(bits, count, seed):
    codes = torch.randint(0, 2**bits, (3, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = integers.words_of(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, integers.num_words(count, bits))
    for row in range(3):
        for place in range(count):
            at, shift = divmod(place * bits, 32)
            assert (int(packed[row, at]) >> shift) % 2**bits == codes[row, place]
    back = integers.codes_of(packed, bits)
    assert torch.equal(back[:, :count], codes)
    assert not back[:, count:].any()


# --- compressed-tensors -------------------------------------------------------------------------------------------

#: Bits, rows, columns, columns of a group, symmetric, in whatever order.
IN_WORDS = {
    "4 bits, groups": (4, 6, 64, 16, True, False),
    "4 bits, groups with zeros": (4, 11, 64, 32, False, False),
    "4 bits, groups in any order": (4, 5, 48, 16, True, True),
    "4 bits, groups in any order with zeros": (4, 9, 32, 8, False, True),
    "4 bits, channels": (4, 7, 40, None, True, False),
    "4 bits, channels with zeros": (4, 8, 40, None, False, False),
    "4 bits, one group wider than the matrix": (4, 3, 24, 128, True, False),
    "4 bits, a word that is not full": (4, 3, 36, 12, False, False),
    "8 bits, groups": (8, 6, 32, 16, True, False),
    "8 bits, groups with zeros": (8, 5, 32, 8, False, False),
    "8 bits, channels": (8, 6, 20, None, True, False),
}


def in_words(case, scale_dtype=torch.float16):
    """Return a slow matrix, what is stored of it and the settings."""
    bits, rows, columns, group, symmetric, shuffled = case
    group_of = [column // (group or columns) for column in range(columns)]
    if shuffled:
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(1)).tolist()
        group_of = [group_of[place] for place in order]
    matrix = Matrix(some_matrix(rows, columns), bits, group_of, symmetric=symmetric, scale_dtype=scale_dtype)
    described = compressed_config(
        num_bits=bits, symmetric=symmetric, group_size=group, strategy="group" if group else "channel",
        actorder="group" if shuffled else None,
    )  # fmt: skip
    return matrix, compressed_words(matrix, zeros=not symmetric, index=shuffled), described


@pytest.mark.parametrize("case", IN_WORDS)
def test_words_of_compressed_tensors_are_what_they_stand_for(tmp_path, case):
    for scale_dtype in (torch.float16, torch.bfloat16, torch.float32):
        matrix, stored, described = in_words(IN_WORDS[case], scale_dtype)
        plain = {"m.norm.weight": torch.ones(3), "m.gate.weight": torch.ones(2, 3, dtype=torch.bfloat16)}
        checkpoint = hand_made(tmp_path / str(scale_dtype), under("m.x", stored) | plain, described)
        for dtype, in_torch in DTYPES.items():
            view = dequantized(checkpoint, dtype)
            assert {name: info.shape for name, info in view.tensors.items()} == {
                "m.x.weight": (len(matrix.codes), len(matrix.codes[0])), "m.norm.weight": (3,), "m.gate.weight": (2, 3),
            }  # fmt: skip
            found = read_all(view)
            assert torch.equal(found["m.x.weight"], matrix.values().to(in_torch))
            assert torch.equal(found["m.gate.weight"], plain["m.gate.weight"])
            assert "quantization_config" not in view.config
            packed = view.tensors["m.x.weight"].packed
            assert packed.encoding.num_bytes(view.tensors["m.x.weight"].shape) == sum(t.nbytes for t in stored.values())


def test_a_matrix_that_compressed_tensors_itself_packed(tmp_path):
    """Made with compressed-tensors 0.17.0, and read with it."""
    stored = {
        "weight_packed": torch.tensor(
            [[100794384, -4113], [-2003093575, 1872441081], [-1917072727, 1715627075]], dtype=torch.int32
        ),
        "weight_zero_point": torch.tensor([[2944, 1151]], dtype=torch.int32),
        "weight_scale": torch.tensor([[0.25, 0.5], [0.375, 0.25], [0.125, 1.0]]),
        "weight_shape": torch.tensor([3, 16]),
    }
    steps = torch.tensor([
        [0, 1, 0, 0, 2, 0, 6, 0, 0, -1, 0, -1, 0, 0, 0, 0], [1, 3, -1, -5, 3, 1, 0, 0, 2, 8, 7, -5, 4, 2, 8, -1],
        [-2, -1, -1, 1, 0, 0, 2, -3, -1, 0, 0, 2, -2, 0, 2, 2],
    ])  # fmt: skip
    described = compressed_config(group_size=8, strategy="group", symmetric=False)
    found = read_all(dequantized(hand_made(tmp_path / "m", under("m.x", stored), described), "F32"))
    assert torch.equal(found["m.x.weight"], steps * stored["weight_scale"].repeat_interleave(8, dim=1))


@pytest.mark.parametrize("form", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_eight_bit_integers_of_compressed_tensors(tmp_path, form, symmetric):
    for number, (strategy, group) in enumerate({"channel": None, "group": 16, "tensor": None}.items()):
        rows, columns = (1, 48) if strategy == "tensor" else (5, 48)
        matrix = Matrix(
            some_matrix(rows, columns), 8, [c // (group or columns) for c in range(columns)], symmetric=symmetric
        )
        stored = compressed_bytes(matrix, zeros=not symmetric)
        if strategy == "tensor":  # of a matrix with rows that all have the same scale
            stored["weight"] = stored["weight"].view(6, 8)
            for leaf in stored.keys() - {"weight"}:
                stored[leaf] = stored[leaf].view(1)
        described = compressed_config(form, num_bits=8, symmetric=symmetric, group_size=group, strategy=strategy)
        described["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": False}
        tensors = under("m.x", stored | {"input_scale": torch.ones(1), "input_zero_point": torch.zeros(1)})
        tensors["ids"] = torch.arange(4, dtype=torch.int8)
        found = read_all(dequantized(hand_made(tmp_path / str(number), tensors, described), "F32"))
        assert found.keys() == {"m.x.weight", "ids"}
        assert torch.equal(found["m.x.weight"].view(rows, columns), matrix.values())


@pytest.mark.parametrize(
    ("strategy", "scale", "block"),
    [("tensor", (), None), ("tensor", (1,), None), ("channel", (6, 1), None), ("block", (2, 3), [4, 4])],
)
def test_eight_bit_floats_of_compressed_tensors(tmp_path, strategy, scale, block):
    weight, factor = some_matrix(6, 10).mul_(50).to(torch.float8_e4m3fn), torch.rand(scale) + 0.5
    described = compressed_config("float-quantized", num_bits=8, type="float", strategy=strategy, block_structure=block)
    described["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    tensors = {"m.x.weight": weight, "m.x.weight_scale": factor, "m.x.input_scale": torch.ones(1)}
    tensors["m.attn.k_scale"] = torch.ones(1)
    found = read_all(dequantized(hand_made(tmp_path / "m", tensors, described), "F32"))
    assert found.keys() == {"m.x.weight"}
    for row in range(6):
        for column in range(10):
            place = (row // 4, column // 4) if block else (row, 0) if scale == (6, 1) else (0,) * len(scale)
            assert found["m.x.weight"][row, column] == weight[row, column].float() * factor[place]


def test_groups_of_compressed_tensors_are_found_by_name_then_pattern_then_class(tmp_path):
    four = Matrix(some_matrix(4, 16), 4, [c // 8 for c in range(16)], symmetric=True)
    eight = Matrix(some_matrix(4, 16), 8, [0] * 16, symmetric=True)
    described = compressed_config("mixed-precision", group_size=8, strategy="group")
    groups = described["config_groups"]
    groups["group_0"]["format"] = "pack-quantized"
    groups["group_1"] = compressed_config(targets=["re:.*down"], num_bits=8)["config_groups"]["group_0"]
    groups["group_2"] = compressed_config(targets=["m.named.down"], group_size=8, strategy="group")["config_groups"][
        "group_0"
    ]
    groups["cache"] = {"targets": ["re:.*attn$"], "weights": None, "output_activations": {"num_bits": 8}}
    tensors = under("m.up", compressed_words(four)) | under("m.down", compressed_words(eight))
    tensors |= under("m.named.down", compressed_words(four))
    found = read_all(dequantized(hand_made(tmp_path / "m", tensors, described), "F32"))
    assert torch.equal(found["m.up.weight"], four.values())
    assert torch.equal(found["m.down.weight"], eight.values())
    assert torch.equal(found["m.named.down.weight"], four.values())


def test_the_shape_may_be_in_32_bits(tmp_path):
    matrix, stored, described = in_words(IN_WORDS["4 bits, groups"])
    stored["weight_shape"] = stored["weight_shape"].to(torch.int32)
    found = read_all(dequantized(hand_made(tmp_path / "m", under("m.x", stored), described), "F32"))
    assert torch.equal(found["m.x.weight"], matrix.values())


def test_columns_in_order_may_be_marked_so(tmp_path):
    matrix, stored, described = in_words(IN_WORDS["4 bits, groups"])
    stored["weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    found = read_all(dequantized(hand_made(tmp_path / "m", under("m.x", stored), described), "F32"))
    assert torch.equal(found["m.x.weight"], matrix.values())


@pytest.mark.parametrize("band", [1, 100, 10**6])
def test_the_size_of_a_band_changes_nothing(tmp_path, monkeypatch, band):
    monkeypatch.setattr(scaled, "BAND", band)
    matrix = Matrix(some_matrix(16, 64), 4, [column // 32 for column in range(64)])
    stored = {
        "compressed": (compressed_words(matrix, zeros=True), compressed_config(group_size=32, strategy="group")),
        "gptq": (gptq(matrix), gptq_config(group_size=32)),
        "awq": (awq(matrix), awq_config(group_size=32)),
    }
    for name, (parts, described) in stored.items():
        found = read_all(dequantized(hand_made(tmp_path / name, under("m.x", parts), described), "F32"))
        assert torch.equal(found["m.x.weight"], matrix.values())


# --- GPTQ and AWQ -------------------------------------------------------------------------------------------------

#: Bits, rows, columns, columns of a group, in whatever order, g_idx is there, what else the settings say.
IN_GPTQ = {
    "4 bits": (4, 16, 64, 32, False, True, {}),
    "4 bits, the older settings": (4, 8, 32, 16, False, True, {"checkpoint_format": None}),
    "4 bits, no g_idx": (4, 8, 64, 16, False, False, {"desc_act": None}),
    "4 bits, one group": (4, 8, 40, None, False, True, {"group_size": -1}),
    "4 bits, a last group that is not full": (4, 8, 40, 16, False, True, {}),
    "4 bits, columns in any order": (4, 8, 64, 16, True, True, {"desc_act": True}),
    "4 bits, v2": (4, 8, 64, 32, False, True, {"checkpoint_format": "gptq_v2"}),
    "4 bits, the newer settings": (4, 8, 64, 32, False, True, {"checkpoint_format": None, "format": "gptq_v2"}),
    "8 bits": (8, 12, 32, 16, False, True, {}),
    "8 bits in any order": (8, 12, 32, 16, True, True, {"desc_act": True}),
    "2 bits": (2, 16, 64, 32, False, True, {}),
    "other bits than most": (8, 12, 64, 16, False, True, {"bits": 4, "group_size": 64, "dynamic": {"x": {"bits": 8}}}),
}


def in_gptq(case, scale_dtype=torch.float16):
    bits, rows, columns, group, shuffled, index, changes = case
    group_of = [column // (group or columns) for column in range(columns)]
    if shuffled:
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(1)).tolist()
        group_of = [group_of[place] for place in order]
    matrix = Matrix(some_matrix(rows, columns), bits, group_of, scale_dtype=scale_dtype)
    described = gptq_config(bits=bits, group_size=group) | changes
    described = {key: value for key, value in described.items() if value is not None}
    v2 = "gptq_v2" in described.values()
    return matrix, gptq(matrix, index=index, offset=0 if v2 else 1), described


@pytest.mark.parametrize("case", IN_GPTQ)
def test_words_of_gptq_are_what_they_stand_for(tmp_path, case):
    for scale_dtype in (torch.float16, torch.bfloat16):
        matrix, stored, described = in_gptq(IN_GPTQ[case], scale_dtype)
        checkpoint = hand_made(tmp_path / str(scale_dtype), under("m.x", stored | {"bias": torch.ones(2)}), described)
        check_values(checkpoint, matrix, stored)


def check_values(checkpoint, matrix, stored):
    """Check every value of 'm.x.weight' and the bytes that are said of it."""
    for dtype, in_torch in DTYPES.items():
        view = dequantized(checkpoint, dtype)
        assert view.tensors.keys() == {"m.x.weight", "m.x.bias"}
        info = view.tensors["m.x.weight"]
        assert info.shape == (len(matrix.codes), len(matrix.codes[0]))
        with view.reader() as reader:
            assert torch.equal(reader.read("m.x.weight"), matrix.values().to(in_torch))
            assert reader.num_bytes_read == sum(tensor.nbytes for tensor in stored.values())
        assert info.packed.encoding.num_bytes(info.shape) == sum(tensor.nbytes for tensor in stored.values())
        assert "quantization_config" not in view.config


def test_a_zero_of_zero_borrows_from_its_neighbour_in_a_word(tmp_path):
    """As GPTQModel writes it: one is subtracted from eight zeros at once."""
    matrix = Matrix(some_matrix(16, 32), 4, [0] * 32)
    matrix.zeros = [[zero] for zero in (0, 3, 0, 0, 15, 1, 7, 0, 8, 8, 8, 8, 8, 8, 8, 0)]
    stored = gptq(matrix, offset=0)
    numbers = [(int(each) % 2**32 - 0x11111111) % 2**32 for each in stored["qzeros"][0]]
    stored["qzeros"] = int32([[each - 2**32 if each >= 2**31 else each for each in numbers]])
    checkpoint = hand_made(tmp_path / "m", under("m.x", stored | {"bias": torch.ones(2)}), gptq_config(group_size=-1))
    check_values(checkpoint, matrix, stored)


@pytest.mark.parametrize("changes", [{}, {"version": "GEMM"}, {"version": None, "checkpoint_format": "gemm"}])
@pytest.mark.parametrize("group", [16, None])
def test_words_of_awq_are_what_they_stand_for(tmp_path, group, changes):
    matrix = Matrix(some_matrix(24, 48), 4, [column // (group or 48) for column in range(48)])
    stored = awq(matrix)
    described = awq_config(group_size=group or -1) | changes
    described = {key: value for key, value in described.items() if value is not None}
    checkpoint = hand_made(tmp_path / "m", under("m.x", stored | {"bias": torch.ones(2)}), described)
    check_values(checkpoint, matrix, stored)


def test_nibbles_of_awq_stand_where_its_tools_put_them(tmp_path):
    """Eight rows of one column whose numbers are their rows: the word that AutoAWQ's order gives."""
    tensors = {
        "m.x.qweight": int32([[0x75316420]]), "m.x.qzeros": int32([[0]]),
        "m.x.scales": torch.ones(1, 8, dtype=torch.float16),
    }  # fmt: skip
    found = read_all(dequantized(hand_made(tmp_path / "m", tensors, awq_config(group_size=-1)), "F32"))
    assert found["m.x.weight"].flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def compressed_example(**changes):
    """Return tensors and settings of one matrix with zeros and groups in any order."""
    _, stored, described = in_words(IN_WORDS["4 bits, groups in any order with zeros"])  # (9, 32) in groups of 8
    described["config_groups"]["group_0"]["weights"] |= changes
    return under("m.x", stored), described


def told(**changes):
    """Return the example with other settings beside the groups."""
    tensors, described = compressed_example()
    return tensors, described | changes


def gptq_example(**changes):
    """Return tensors and settings of a matrix (8, 64) in groups of 16 columns in any order."""
    _, stored, described = in_gptq(IN_GPTQ["4 bits, columns in any order"])
    return under("m.x", stored), described | changes


def awq_example(**changes):
    """Return tensors and settings of a matrix (24, 48) in groups of 16 columns."""
    return under("m.x", awq(Matrix(some_matrix(24, 48), 4, [c // 16 for c in range(48)]))), awq_config(
        group_size=16
    ) | changes


def less(leaf, example=compressed_example):
    """Return an example without one of its tensors."""
    tensors, described = example()
    return {name: tensor for name, tensor in tensors.items() if name != f"m.x.{leaf}"}, described


def other(leaf, tensor, example=compressed_example):
    """Return an example with one tensor in place of another, or beside the others."""
    tensors, described = example()
    return tensors | {f"m.x.{leaf}": tensor}, described


#: Tensors and settings, and what is said.
WRONG = {
    "no scales": (lambda: less("weight_scale"), "'m.x' is packed, and 'm.x.weight_scale' is missing"),
    "no shape": (lambda: less("weight_shape"), "'m.x' is packed, and 'm.x.weight_shape' is missing"),
    "no zeros": (lambda: less("weight_zero_point"), "it is not symmetric, and 'm.x.weight_zero_point' is missing"),
    "no groups of columns": (lambda: less("weight_g_idx"), "it has an actorder, and 'm.x.weight_g_idx' is missing"),
    "scales alone": (lambda: less("weight_packed"), "belongs to a packed weight, and there is none beside it"),
    "other bits": (lambda: compressed_example(num_bits=8), r"4 scales a row are no groups of 8 columns"),
    "another group": (lambda: compressed_example(group_size=16), "4 scales a row are no groups of 16 columns"),
    "channels": (lambda: compressed_example(group_size=None, strategy="channel", actorder=None), "4 scales a row"),
    "groups without a size": (lambda: compressed_example(group_size=None, strategy="group"), "group_size = None"),
    "no group of the module": (
        lambda: (told()[0], compressed_config(targets=["re:other", "m.y"])),
        "has no group for 'm.x', which is packed",
    ),
    "ignored and packed": (lambda: told(ignore=["re:.*x$"]), "names 'm.x' in ignore, and it is stored as"),
    "ignored by name": (lambda: told(ignore=["m.x"]), "names 'm.x' in ignore"),
    "ignore is a number": (lambda: told(ignore=3), "ignore = 3, expected a list of names"),
    "no pattern": (lambda: told(ignore=["re:("]), "which is no pattern"),
    "no config_groups": (lambda: told(config_groups=None), "has no config_groups"),
    "the name of a preset": (lambda: told(config_groups={"W4A16": ["Linear"]}), "expected targets and weights"),
    "numbers in words of another kind": (
        lambda: other("weight_packed", torch.zeros(9, 4, dtype=torch.int64)), r"I32 \[9, 4\] was expected"
    ),
    "a stack": (lambda: other("weight_packed", torch.zeros(2, 9, 4, dtype=torch.int32)), "a matrix was expected"),
    "scales of other rows": (lambda: other("weight_scale", torch.ones(8, 4)), "scales of 9 rows were expected"),
    "scales in integers": (lambda: other("weight_scale", torch.ones(9, 4, dtype=torch.int32)), "one of F32, F16, BF16"),
    "zeros of other rows": (
        lambda: other("weight_zero_point", torch.zeros(1, 4, dtype=torch.int32)), r"I32 \[2, 4\] was expected"
    ),
    "groups of other columns": (
        lambda: other("weight_g_idx", torch.zeros(31, dtype=torch.int32)), r"I32 \[32\] was expected"
    ),
    "four bits in bytes": (
        lambda: ({"m.x.weight": torch.ones(9, 32, dtype=torch.int8), "m.x.weight_scale": torch.ones(9, 4)}, told()[1]),
        "numbers of 4 bits were expected in words",
    ),
    "floats where integers were expected": (
        lambda: (
            {"m.x.weight": torch.ones(9, 8, dtype=torch.int8), "m.x.weight_scale": torch.ones(9, 1)},
            compressed_config("float-quantized", num_bits=8, type="float"),
        ),
        "8-bit floats without zeros were expected",
    ),
    "gptq without zeros": (lambda: less("qzeros", gptq_example), "'m.x' is packed, and 'm.x.qzeros' is missing"),
    "gptq without scales": (lambda: less("scales", gptq_example), "'m.x' is packed, and 'm.x.scales' is missing"),
    "gptq without g_idx": (lambda: less("g_idx", gptq_example), "it has desc_act, and 'm.x.g_idx' is missing"),
    "gptq's zeros alone": (lambda: less("qweight", gptq_example), "'m.x.g_idx' belongs to a packed weight"),
    "gptq of other bits": (lambda: gptq_example(bits=8), r"'m.x.qzeros' .I32 \[4, 1\]. does not fit: I32 \[2, 2\] was"),
    "gptq of another group": (lambda: gptq_example(group_size=32), r"'m.x.qzeros'.* does not fit: I32 \[2, 1\] was"),
    "gptq of no group": (lambda: gptq_example(group_size=0), "says group_size = 0, expected a whole number above 0"),
    "gptq in an order that is none": (lambda: gptq_example(desc_act="yes"), "says desc_act = 'yes'"),
    "gptq's words of another kind": (
        lambda: other("qweight", torch.zeros(8, 8, dtype=torch.int16), gptq_example), r"I32 \[8, 8\] was expected"
    ),
    "gptq's rows that fill no word": (
        lambda: (
            {
                "m.x.qweight": torch.zeros(8, 7, dtype=torch.int32), "m.x.qzeros": torch.zeros(4, 1, dtype=torch.int32),
                "m.x.scales": torch.ones(4, 7),
            },
            gptq_config(group_size=16),
        ),
        "both axes a multiple of 8",
    ),
    "gptq's scales in integers": (
        lambda: other("scales", torch.ones(4, 8, dtype=torch.int32), gptq_example), "one of F32, F16, BF16"
    ),
    "gptq's scales in a list": (lambda: other("scales", torch.ones(8), gptq_example), "a matrix was expected"),
    "awq without zeros": (lambda: less("qzeros", awq_example), "'m.x' is packed, and 'm.x.qzeros' is missing"),
    "awq of another group": (lambda: awq_example(group_size=48), r"'m.x.qzeros'.* does not fit: I32 \[1, 3\] was"),
    "awq's scales of activations": (
        lambda: other("act.scales", torch.ones(4), awq_example), "'m.x.act.scales' belongs to a packed weight"
    ),
    "packed and plain": (lambda: other("weight", torch.ones(2, 2)), r"'m.x.weight' twice, packed"),
}  # fmt: skip

UNKNOWN = {
    "another format": (lambda: told(format="marlin-24"), "the format 'marlin-24'; understood are pack-quantized"),
    "another format of a group": (
        lambda: told(config_groups={"g": {"format": "nvfp4-pack-quantized"}}), "the format 'nvfp4-pack-quantized'"
    ),
    "dense": (lambda: told(format="dense"), "the format 'dense'"),
    "sparse": (lambda: told(sparsity_config={"format": "sparse-24-bitmask"}), "a sparsity_config"),
    "rotated": (lambda: told(transform_config={"config_groups": {"R1": {}}}), "its weights are rotated"),
    "three bits": (lambda: compressed_example(num_bits=3), "3 bits of type 'int' in config_groups.'group_0'"),
    "bits that are none": (lambda: compressed_example(num_bits="4"), "'4' bits of type 'int'"),
    "four-bit floats": (lambda: compressed_example(type="float"), "4 bits of type 'float'"),
    "blocks of integers": (lambda: compressed_example(strategy="block"), "scales by 'block' of int"),
    "scales of groups of tensors": (lambda: compressed_example(strategy="tensor_group"), "scales by 'tensor_group'"),
    "gptq of 3 bits": (lambda: gptq_example(bits=3), "by gptq with 3 bits; understood are 2, 4, 8"),
    "gptq of bits that are none": (lambda: gptq_example(bits=True), "True bits; understood are 2, 4, 8"),
    "gptq in another format": (lambda: gptq_example(checkpoint_format="marlin"), "the format 'marlin'; understood are"),
    "gptq for marlin": (lambda: gptq_example(is_marlin_format=True), "the format 'marlin'"),
    "awq in another version": (lambda: awq_example(version="gemv"), "by awq with the version 'gemv'; understood"),
    "awq of 8 bits": (lambda: awq_example(bits=8), "8 bits; understood are 4"),
    "awq without zeros": (lambda: awq_example(zero_point=False), "zero_point = False; understood is true"),
    "awq of another tool": (lambda: awq_example(backend="llm-awq"), "the backend 'llm-awq'"),
    "an order that is none": (lambda: compressed_example(actorder="up"), "actorder = 'up'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_tensors_and_settings_that_do_not_fit_are_refused_in_a_line(tmp_path, case):
    make, message = WRONG[case]
    checkpoint = hand_made(tmp_path / "m", *make())
    with pytest.raises(CorruptCheckpoint, match=message) as error:
        dequantized(checkpoint)
    assert str(error.value).startswith(str(checkpoint.path))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("case", UNKNOWN)
def test_ways_of_packing_that_are_not_understood_are_refused_in_a_line(tmp_path, case):
    make, message = UNKNOWN[case]
    checkpoint = hand_made(tmp_path / "m", *make())
    with pytest.raises(UnsupportedDtype, match=message) as error:
        dequantized(checkpoint)
    assert str(error.value).startswith(str(checkpoint.path))
    assert "Use the full-precision checkpoint" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("make", [compressed_example, gptq_example])
def test_packed_weights_that_no_config_speaks_of_are_refused_in_a_line(tmp_path, make):
    checkpoint = hand_made(tmp_path / "m", make()[0], None)
    with pytest.raises(UnsupportedDtype, match=r"m has packed weights, such as 'm\.x.*no quantization_config") as error:
        dequantized(checkpoint)
    assert len(str(error.value).splitlines()) == 1


def test_a_method_of_any_length_is_refused_in_a_line(tmp_path):
    with pytest.raises(UnsupportedDtype, match="m is quantised with 'xxx") as error:
        dequantized(hand_made(tmp_path / "m", gptq_example()[0], {"quant_method": "x" * 10**5}))
    assert len(str(error.value)) < 500


#: What only shows as a tensor is read.
INSIDE = {
    "a scale that is no number": (
        lambda: other("weight_scale", torch.full((9, 4), math.nan)), "has 36 of 36 scales that are no finite numbers"
    ),
    "an infinite scale": (
        lambda: other("weight_scale", torch.tensor([[1.0, 1.0, 1.0, math.inf]] * 9)), "has 9 of 36 scales"
    ),
    "another shape": (lambda: other("weight_shape", torch.tensor([9, 31])), r"is \[9, 31\] as is stored beside it"),
    "a group that is not there": (
        lambda: other("weight_g_idx", torch.full((32,), 4, dtype=torch.int32)), "to groups 4 to 4, and there are"
    ),
    "gptq's scale that is no number": (
        lambda: other("scales", torch.full((4, 8), math.nan), gptq_example), "has 32 of 32 scales that are no finite"
    ),
    "gptq's columns out of order": (
        lambda: gptq_example(desc_act=False), "has columns out of order in g_idx, and config.json says desc_act = false"
    ),
    "gptq's group that is not there": (
        lambda: other("g_idx", int32([-1] * 64), gptq_example), "to groups -1 to -1, and there are groups 0 to 3"
    ),
    "awq's scale that is no number": (
        lambda: other("scales", torch.full((3, 24), math.inf), awq_example), "has 72 of 72 scales that are no finite"
    ),
    "a scale of floats that is no number": (
        lambda: (
            {"m.x.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "m.x.weight_scale": torch.tensor([math.nan])},
            compressed_config("float-quantized", num_bits=8, type="float", strategy="tensor"),
        ),
        "has 1 of 1 scales that are no finite numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INSIDE)
def test_what_shows_as_a_tensor_is_read_is_refused_in_a_line(tmp_path, case):
    make, message = INSIDE[case]
    view = dequantized(hand_made(tmp_path / "m", *make()))
    with view.reader() as reader, pytest.raises(CorruptCheckpoint, match=message) as error:
        reader.read("m.x.weight")
    assert str(error.value).startswith(f"{tmp_path / 'm' / 'model.safetensors'}: 'm.x.weight' ")
    assert len(str(error.value).splitlines()) == 1


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path):
    tensors, described = other("weight_scale", torch.full((9, 4), 60000.0))
    with (
        dequantized(hand_made(tmp_path / "m", tensors, described), "F16").reader() as reader,
        pytest.raises(UnsupportedDtype, match=r"'m\.x\.weight' reaches .*, more than F16 can hold; choose BF16"),
    ):
        reader.read("m.x.weight")


#: What is stored of a matrix of 4096 x 4096 numbers, and the settings.
LARGE = {
    "compressed-tensors": (
        {
            "weight_packed": ((4096, 512), torch.int32), "weight_scale": ((4096, 32), torch.bfloat16),
            "weight_zero_point": ((512, 32), torch.int32), "weight_shape": ((2,), torch.int64),
        },
        compressed_config(group_size=128, strategy="group", symmetric=False),
    ),
    "gptq": (
        {
            "qweight": ((512, 4096), torch.int32), "qzeros": ((32, 512), torch.int32),
            "scales": ((32, 4096), torch.float16), "g_idx": ((4096,), torch.int32),
        },
        gptq_config(desc_act=True),
    ),
    "awq": (
        {
            "qweight": ((4096, 512), torch.int32), "qzeros": ((32, 512), torch.int32),
            "scales": ((32, 4096), torch.float16),
        },
        awq_config(),
    ),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize("case", LARGE)
def test_unpacking_holds_the_packed_tensor_the_result_and_a_band(tmp_path, case):
    parts, described = LARGE[case]
    tensors = {f"m.x.{leaf}": torch.zeros(shape, dtype=dtype) for leaf, (shape, dtype) in parts.items()}
    if "m.x.weight_shape" in tensors:
        tensors["m.x.weight_shape"] += 4096
    checkpoint = hand_made(tmp_path / "m", tensors, described)  # 8 MiB, 32 MiB unpacked
    code = f"""
import torch
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.quantized import dequantized
torch.set_num_threads(1)
def status(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
view = dequantized(Checkpoint.open({str(checkpoint.path)!r}))
torch.ones(100, 100).to(torch.int32).bfloat16()
with view.reader() as reader:
    before = status("VmRSS")
    tensor = reader.read("m.x.weight")
    print(status("VmHWM") - before, tuple(tensor.shape))
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    peak, shape = result.stdout.split(maxsplit=1)
    assert shape.strip() == "(4096, 4096)"
    assert 40 < float(peak) < 40 + 32, "packed, result, zeros and scales in float32, some bands"


# --- settings that somebody changed -------------------------------------------------------------------------------

EXAMPLES = {"compressed-tensors": compressed_example, "gptq": gptq_example, "awq": awq_example}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return {name: hand_made(tmp_path_factory.mktemp("example") / "m", *make()) for name, make in EXAMPLES.items()}


@pytest.mark.long
@pytest.mark.parametrize("name", EXAMPLES)
@given(data=st.data())
@settings(max_examples=150)
def test_any_change_of_the_settings_is_read_or_refused_in_a_line(examples, name, data):
    described = examples[name].config["quantization_config"]
    path = data.draw(st.sampled_from(list(places(described))))
    how = data.draw(st.sampled_from(("replace", "remove", "beside")))
    drawn = data.draw(
        values | st.sampled_from((2, 3, 4, 8, 16, 32, 128, "group", "channel", "gptq_v2", "re:.*", "re:("))
    )
    config = examples[name].config | {"quantization_config": changed(described, path, drawn, how)}
    said = ""
    try:
        view = dequantized(replace(examples[name], config=config))
        with view.reader() as reader:
            for tensor in view.tensors:
                reader.read(tensor)
    except (CorruptCheckpoint, UnsupportedDtype) as error:
        said = str(error)
    assert len(said.splitlines()) <= 1
    assert len(said) < 2000


@pytest.mark.long
@pytest.mark.parametrize("name", EXAMPLES)
@given(data=st.data())
@settings(max_examples=100)
def test_any_tensor_of_another_kind_or_shape_is_read_or_refused_in_a_line(tmp_path_factory, name, data):
    tensors, described = EXAMPLES[name]()
    leaf = data.draw(st.sampled_from(sorted(tensors)))
    dtype = data.draw(st.sampled_from((torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32,
                                       torch.float8_e4m3fn)))  # fmt: skip
    extents = st.sampled_from((0, 1, 2, 3, 4, 8, 9, 16, 24, 32, 48, 64))
    shape = data.draw(st.just(tuple(tensors[leaf].shape)) | st.lists(extents, max_size=3).map(tuple))
    tensors[leaf] = torch.full(shape, data.draw(st.sampled_from((0, 1, 3))), dtype=torch.float32).to(dtype)
    checkpoint = hand_made(tmp_path_factory.mktemp("any") / "m", tensors, described)
    said = ""
    try:
        view = dequantized(checkpoint)
        for tensor, value in read_all(view).items():
            assert tuple(value.shape) == view.tensors[tensor].shape
    except (CorruptCheckpoint, UnsupportedDtype) as error:
        said = str(error)
        assert said.startswith(str(checkpoint.path))
    assert len(said.splitlines()) <= 1
    assert len(said) < 2000
