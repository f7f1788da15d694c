"""Headers of GGUF files: read as the package gguf reads them, and damaged in every way without a traceback."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.errors import CorruptCheckpoint, CoterieError, InputError, UnsupportedDtype
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.ggml import SIZES
from coterie.model.disk.gguf import header
from coterie.model.disk.gguf.fields import GgufFields, shortest
from coterie.model.disk.gguf.header import List, read_gguf
from coterie.model.disk.gguf.tokens import tokenizer_files
from coterie.model.disk.tokenizer import load_tokenizer

#: Bytes that no damaged file of some kilobytes may make anyone allocate.
MUCH = 64 * 2**20


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small file of the right kind, with fields and tensors of all kinds."""
    file = tmp_path_factory.mktemp("small") / "small.gguf"
    writer = gguf.GGUFWriter(file, "qwen3moe")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32,
             "attention.head_count": 2, "attention.head_count_kv": 1, "expert_used_count": 1}  # fmt: skip
    for name, size in sizes.items():
        writer.add_uint32(f"qwen3moe.{name}", size)
    writer.add_float32("qwen3moe.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(["a", "b", "ab", "<|end|>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_bool("some.truth", True)
    writer.add_int8("some.small", -3)
    writer.add_uint64("some.large", 2**40)
    numbers = np.random.default_rng(0)

    def tensor(name, *shape, kind=gguf.GGMLQuantizationType.F32):
        values = numbers.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    tensor("token_embd.weight", 4, 32, kind=gguf.GGMLQuantizationType.Q8_0)
    tensor("output_norm.weight", 32)
    tensor("output.weight", 4, 32, kind=gguf.GGMLQuantizationType.F16)
    for name in ("attn_norm", "ffn_norm"):
        tensor(f"blk.0.{name}.weight", 32)
    for name, rows, columns in (("attn_q", 32, 32), ("attn_k", 16, 32), ("attn_v", 16, 32), ("attn_output", 32, 32)):
        tensor(f"blk.0.{name}.weight", rows, columns, kind=gguf.GGMLQuantizationType.Q4_0)
    tensor("blk.0.attn_q_norm.weight", 16)
    tensor("blk.0.attn_k_norm.weight", 16)
    tensor("blk.0.ffn_gate_inp.weight", 2, 32)
    for name in ("gate", "up", "down"):
        tensor(f"blk.0.ffn_{name}_exps.weight", 2, 32, 32, kind=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_header_says_what_the_package_gguf_reads(small):
    ours, theirs = read_gguf(small), gguf.GGUFReader(small)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert {n: v.values() if isinstance(v, List) else v for n, v in ours.fields.items()} == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        said = ours.tensors[tensor.name]
        assert said.type == tensor.tensor_type.name
        assert said.shape == tuple(int(extent) for extent in reversed(tensor.shape))
        assert (said.begin, said.end) == (tensor.data_offset, tensor.data_offset + tensor.n_bytes)


def test_types_and_sizes_are_those_of_the_package_gguf():
    names = header.TYPES | header._OTHER_TYPES
    assert names == {kind.value: kind.name for kind in gguf.GGMLQuantizationType if kind.value in names}
    for name in header.TYPES.values():
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert (block, size) == (SIZES[name] if name in SIZES else (1, header.PLAIN[name]))


def test_numbers_are_the_shortest_that_are_the_same_in_32_bits():
    for value in (1e-6, 1e-5, 10000.0, 0.7, 2.5, 1 / 3, 1e38, 0.0, 5e6):
        stored = float(np.float32(value))
        assert shortest(stored) == float(str(np.float32(value)))
        assert np.float32(shortest(stored)) == np.float32(stored)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: b"GGML" + content[4:], "does not begin with GGUF"),
        (lambda content: content[:10], "only 10 bytes, too short"),
        (lambda content: b"", "only 0 bytes, too short"),
        (lambda content: content[:4] + struct.pack("<I", 1) + content[8:], "of version 1; versions 2 and 3"),
        (lambda content: content[:4] + struct.pack(">I", 3) + content[8:], "in the other byte order"),
        (lambda content: content[:8] + struct.pack("<Q", 2**60) + content[16:], f"it has {2**60} tensors"),
        (lambda content: content[:16] + struct.pack("<Q", 2**60) + content[24:], f"it has {2**60} fields"),
        (lambda content: content[:-100], "it is cut off or damaged"),
        (lambda content: content[:400], "it is cut off or damaged"),
        (lambda content: content[:24] + struct.pack("<Q", 2**62) + content[32:], "the text at byte 24 of the header"),
    ],
)
def test_damage_is_told_with_the_file_and_the_place(change, words, small, tmp_path):
    file = tmp_path / "damaged.gguf"
    file.write_bytes(change(small.read_bytes()))
    with pytest.raises((CorruptCheckpoint, UnsupportedDtype), match=words) as caught:
        Checkpoint.open(file)
    assert str(file) in str(caught.value)


def test_a_pointer_of_git_is_told(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", encoding="utf-8")
    with pytest.raises(CorruptCheckpoint, match="a pointer that git left in place of a file of 12 bytes"):
        Checkpoint.open(file)


#: Numbers that break counts, lengths, offsets and kinds.
HOSTILE = [0, 1, 2, 9, 31, 2**8, 2**16, 2**24 + 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_file_is_never_a_traceback_nor_gigabytes(data, small, tmp_path_factory):
    content = bytearray(small.read_bytes())
    head = next(iter(read_gguf(small).tensors.values())).begin
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, head - 9))
        kind = data.draw(st.sampled_from(["byte", "number", "long", "cut"]))
        if kind == "byte":
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "number":
            content[place : place + 4] = struct.pack("<I", data.draw(st.sampled_from(HOSTILE)) % 2**32)
        elif kind == "long":
            content[place : place + 8] = struct.pack("<Q", data.draw(st.sampled_from(HOSTILE)))
        else:
            del content[data.draw(st.integers(0, len(content))) :]
            break
    file = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    file.write_bytes(content)
    said = str(file)
    tracemalloc.start()
    try:
        checkpoint = Checkpoint.open(file)
        assert all(info.num_bytes < MUCH for info in checkpoint.tensors.values())
    except CoterieError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert str(file) in said or "config.json" in said
    assert peak < MUCH


def fields_of(small, **changes):
    there = dict(read_gguf(small).fields) | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return GgufFields.of("x.gguf", {name: value for name, value in there.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "bert"}, "its tokenizer is of the kind 'bert'"),
        ({"model": None}, "its tokenizer is of the kind 'none'"),
        ({"pre": "tekken"}, "cuts text up in the way 'tekken', and chatglm-bpe, command-r, "),
        ({"tokens": None}, "tokenizer.ggml.tokens is no list of str|tokens is missing"),
        ({"tokens": 3}, "tokenizer.ggml.tokens is no list of str"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_said(changes, words, small):
    with pytest.raises(InputError, match=words):
        tokenizer_files(fields_of(small, **changes))


def test_a_file_without_a_tokenizer_that_is_known_opens_and_says_so_when_text_is_read(small, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(small.read_bytes().replace(b"qwen2", b"qwen9"))  # the name of its way to cut text up
    assert Checkpoint.open(file).tensors
    with pytest.raises(InputError, match=rf"{file}: its tokenizer cuts text up in the way 'qwen9'.*tokenizer\.json"):
        load_tokenizer(file)
