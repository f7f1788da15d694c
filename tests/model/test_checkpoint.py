"""Reading headers: what safetensors writes is understood byte by byte, and every kind of damage has a clear error."""

import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from coterie.errors import CorruptCheckpoint, NotACheckpoint
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.header import read_header
from coterie.model.disk.tensors import DTYPE_BITS, TORCH_NAMES
from coterie.model.disk.weights import INDEX_NAME, PICKLE_INDEX_NAME, PICKLE_NAME

CONFIG = {"model_type": "olmoe", "hidden_size": 4}
DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


def write_header(file, header, data=b"", *, length=None):
    """Write a safetensors file by hand; `header` is JSON content or raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return file


def entry(begin, end, *, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def make(folder, shards, *, config=CONFIG, index=None):
    """Write a model folder; `shards` maps file names to tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    if index is not None:
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.fixture
def sharded(tmp_path):
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    shards = {one: {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, two: {"c": torch.zeros(5)}}
    return make(tmp_path / "sharded", shards, index={"a": one, "b": one, "c": two})


# --- headers that are right ---------------------------------------------------------------------------------------

tensors_strategy = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
    max_size=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("headers")


@given(wanted=tensors_strategy, metadata=st.none() | st.just({"format": "pt"}))
def test_header_says_where_every_tensor_lies(folder, wanted, metadata):
    file = folder / "model.safetensors"
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in wanted.items()}
    save_file(tensors, file, metadata=metadata)
    content = file.read_bytes()
    found = read_header(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = found[name]
        assert (info.dtype, info.shape, info.shard) == (DTYPES[tensor.dtype], tuple(tensor.shape), "model.safetensors")
        assert info.num_elements == tensor.numel()
        assert info.num_bytes == tensor.numel() * tensor.element_size()
        raw = b"" if tensor.numel() == 0 else bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
        assert content[info.begin : info.end] == raw


def test_every_number_format_has_the_right_size(tmp_path):
    for name, bits in DTYPE_BITS.items():
        size = 16 * bits // 8
        file = write_header(
            tmp_path / f"{name}.safetensors", {"x": entry(0, size, dtype=name, shape=[16])}, bytes(size)
        )
        assert read_header(file)["x"].num_bytes == size


def test_a_checkpoint_is_its_headers(sharded):
    checkpoint = Checkpoint.open(sharded)
    assert checkpoint.path == sharded
    assert checkpoint.config == CONFIG
    assert {name: (info.shape, info.shard[6:11]) for name, info in checkpoint.tensors.items()} == {
        "a": ((2, 3), "00001"),
        "b": ((4,), "00001"),
        "c": ((5,), "00002"),
    }
    assert checkpoint.num_bytes == 4 * (6 + 4 + 5)
    assert Checkpoint.open(str(sharded)).digest == checkpoint.digest


def test_reader_reads_from_all_shards(sharded):
    checkpoint = Checkpoint.open(sharded)
    with checkpoint.reader() as reader:
        assert torch.equal(reader.read("c"), torch.zeros(5))
        assert torch.equal(reader.read("a"), torch.arange(6.0).view(2, 3))
        with pytest.raises(KeyError):
            reader.read("d")


def test_tensors_of_every_number_format_are_read_as_safetensors_reads_them(tmp_path):
    assert TORCH_NAMES.keys() == DTYPE_BITS.keys()
    tensors = {}
    for name, attribute in TORCH_NAMES.items():
        raw = torch.randint(0, 2 if name == "BOOL" else 256, (48,), dtype=torch.uint8)
        tensors[name] = raw.view(getattr(torch, attribute)).view(2, -1)
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 7), "odd": torch.arange(7, dtype=torch.int8)}
    make(tmp_path, {"model.safetensors": tensors})
    checkpoint = Checkpoint.open(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    with checkpoint.reader() as reader:
        for name, tensor in expected.items():
            found = reader.read(name)
            assert (
                (found.dtype, found.shape) == (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)
            )
            assert torch.equal(bits(found), bits(tensor)), name
            assert checkpoint.tensors[name].num_bytes == tensor.numel() * tensor.element_size()
        assert reader.num_bytes_read == checkpoint.num_bytes == sum(len(bits(tensor)) for tensor in tensors.values())


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


@given(
    dtype=st.sampled_from(sorted(set(TORCH_NAMES) - {"F4"})),
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    data=st.data(),
)
def test_rows_are_read_alone(folder, dtype, shape, data):
    num_bytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    raw = torch.randint(0, 2 if dtype == "BOOL" else 256, (num_bytes,), dtype=torch.uint8)
    tensor = raw.view(getattr(torch, TORCH_NAMES[dtype])).view(shape)
    checkpoint = Checkpoint.open(make(folder, {"model.safetensors": {"before": torch.ones(3), "x": tensor}}))
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    with checkpoint.reader() as reader:
        found = reader.read_rows("x", start, stop)
        assert reader.num_bytes_read == math.prod(shape[1:]) * (stop - start) * DTYPE_BITS[dtype] // 8
    expected = tensor[start:stop]
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(bits(found), bits(expected))


def test_rows_of_four_bit_numbers_that_begin_within_a_byte_are_cut_from_the_whole(tmp_path):
    """Three numbers a row: the second row begins in the middle of the second byte."""
    data = bytes([0x12, 0x34, 0x56, 0x78, 0x9A, 0xBC])
    header = {"even": entry(0, 3, dtype="F4", shape=[3, 2]), "odd": entry(3, 6, dtype="F4", shape=[2, 3])}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_header(tmp_path / "model.safetensors", header, data)
    checkpoint = Checkpoint.open(tmp_path)
    with checkpoint.reader() as reader:
        assert bits(reader.read_rows("even", 1, 3)).tolist() == [0x34, 0x56]
        assert reader.num_bytes_read == 2
    assert checkpoint.tensors["odd"].slice_rows(0, 1) is None


@pytest.mark.parametrize(("name", "start", "stop"), [("a", -1, 1), ("a", 1, 3), ("a", 2, 1), ("scalar", 0, 1)])
def test_rows_that_are_not_there(tmp_path, name, start, stop):
    make(tmp_path, {"model.safetensors": {"a": torch.ones(2, 3), "scalar": torch.tensor(1.0)}})
    message = rf"^model\.safetensors: tensor '{name}' has shape \[.*\], so it has no rows {start} to {stop}$"
    with Checkpoint.open(tmp_path).reader() as reader, pytest.raises(ValueError, match=message):
        reader.read_rows(name, start, stop)


def test_rows_of_a_file_cut_off_after_it_was_opened(sharded):
    checkpoint = Checkpoint.open(sharded)
    info = checkpoint.tensors["a"]
    with (sharded / info.shard).open("r+b") as file:
        file.truncate(info.end - 1)
    with checkpoint.reader() as reader:
        assert torch.equal(reader.read_rows("a", 0, 1), torch.arange(3.0)[None])
        with pytest.raises(CorruptCheckpoint, match=rf"within tensor 'a', which ends at byte {info.end}"):
            reader.read_rows("a", 1, 2)


def test_several_threads_may_read_at_once(tmp_path, monkeypatch):
    class Slow(io.FileIO):
        """Takes its time to open, so that all threads meet there."""

        def __init__(self, path):
            super().__init__(path)
            time.sleep(0.02)

    monkeypatch.setattr("coterie.model.disk.checkpoint.FileIO", Slow)
    tensors = {f"t{number}": torch.randn(2000) for number in range(50)}
    checkpoint = Checkpoint.open(make(tmp_path, {"model.safetensors": tensors}))
    with checkpoint.reader() as reader, ThreadPoolExecutor(8) as pool:
        names = list(tensors) * 4
        for name, found in zip(names, pool.map(reader.read, names), strict=True):
            assert torch.equal(found, tensors[name])
        assert reader.num_bytes_read == 4 * checkpoint.num_bytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mappings and open files are listed in /proc")
def test_reading_maps_no_file_and_closes_all(sharded):
    def opened():
        links = list(Path("/proc/self/fd").iterdir())
        return [link for link in links if link.is_symlink() and str(sharded) in str(link.readlink())]

    checkpoint = Checkpoint.open(sharded)
    with checkpoint.reader() as reader:
        held = [reader.read(name) for name in checkpoint.tensors]
        assert str(sharded) not in Path("/proc/self/maps").read_text()
        assert len(opened()) == 2
    assert len(held) == 3
    assert opened() == []


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_a_tensor_is_held_once_while_it_is_read(tmp_path):
    make(tmp_path, {"model.safetensors": {"x": torch.zeros(2**24)}})  # 64 MiB
    code = f"""
import torch
from coterie.model.disk.checkpoint import Checkpoint
def status(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
with Checkpoint.open({str(tmp_path)!r}).reader() as reader:
    before = status("VmRSS")
    tensor = reader.read("x")
    print(status("VmHWM") - before)
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert 64 < float(result.stdout) < 64 + 24


def test_a_file_cut_off_after_it_was_opened(sharded):
    checkpoint = Checkpoint.open(sharded)
    shard = sharded / "model-00001-of-00002.safetensors"
    first = checkpoint.tensors["a"]
    os.truncate(shard, first.end - 3)
    with checkpoint.reader() as reader:
        with pytest.raises(
            CorruptCheckpoint, match=rf"ends after {first.end - 3} bytes, within tensor 'a'.*{first.end}"
        ):
            reader.read("a")
        assert torch.equal(reader.read("c"), torch.zeros(5))


def test_a_file_removed_after_it_was_opened(sharded):
    checkpoint = Checkpoint.open(sharded)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with checkpoint.reader() as reader, pytest.raises(CorruptCheckpoint, match=r"00002\.safetensors: is missing"):
        reader.read("c")
    with pytest.raises(CorruptCheckpoint, match=r"00002\.safetensors: is missing"):
        checkpoint.file_stamps()


def test_looking_needs_no_torch(sharded):
    look = f"Checkpoint.open({str(sharded)!r}).other_files()"
    code = f"import sys; from coterie.model.disk.checkpoint import Checkpoint; {look}"
    check = "; assert not {'torch', 'transformers', 'numpy', 'safetensors'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code + check], check=True, timeout=60)


def test_a_single_file_wins_over_an_index_as_in_stock_loaders(sharded):
    save_file({"x": torch.ones(2)}, sharded / "model.safetensors")
    assert set(Checkpoint.open(sharded).tensors) == {"x"}


def test_weights_for_other_tools_beside_a_single_file_are_no_part_of_it(tmp_path):
    make(tmp_path, {"model.safetensors": {"x": torch.ones(2)}, "consolidated.safetensors": {"y": torch.ones(2)}})
    assert set(Checkpoint.open(tmp_path).tensors) == {"x"}


# --- headers that are wrong ---------------------------------------------------------------------------------------

FAULTS = {
    "begins after a gap": ({"a": entry(0, 8), "b": entry(12, 16)}, 16, r"'b' starts at byte \d+, expected \d+"),
    "does not begin at 0": ({"a": entry(4, 8)}, 8, "'a' starts at byte"),
    "overlaps": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' starts at byte"),
    "same place twice": ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "'b' starts at byte"),
    "ends before it begins": ({"a": entry(0, -4, shape=[1])}, 8, "'a' starts at byte"),
    "fewer bytes than its shape": ({"a": entry(0, 8, shape=[3])}, 8, r"'a': 8 bytes for F32 \(3,\)"),
    "more bytes than its shape": ({"a": entry(0, 8, shape=[1])}, 8, r"'a': 8 bytes for F32 \(1,\)"),
    "negative shape": ({"a": entry(0, 8, shape=[-1, -2])}, 8, r"shape \(-1, -2\)"),
    "unknown number format": ({"a": entry(0, 8, dtype="F99")}, 8, "dtype 'F99'"),
    "number format is a list": ({"a": entry(0, 8, dtype=["F32"])}, 8, "dtype"),
    "file ends early": ({"a": entry(0, 8)}, 7, r"describes \d+ bytes, the file has \d+"),
    "file has a tail": ({"a": entry(0, 8)}, 9, r"describes \d+ bytes, the file has \d+"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "KeyError"),
    "one offset": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8, "not enough values"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, 8, "too many values"),
    "offsets are an object": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": {"0": 0, "1": 8}}}, 8, "'0'"),
    "shape is no list": ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, 8, "TypeError"),
    "shape of words": ({"a": {"dtype": "F32", "shape": ["two"], "data_offsets": [0, 8]}}, 8, "ValueError"),
    "shape is infinite": (
        b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}',
        8,
        "'inf' is not a whole",
    ),
    "shape of fractions": ({"a": entry(0, 8, shape=[2.0])}, 8, "'2.0' is not a whole number"),
    "shape of truths": ({"a": entry(0, 4, shape=[True])}, 4, "'True' is not a whole number"),
    "numbers as text": ({"a": {"dtype": "F32", "shape": ["2"], "data_offsets": ["0", "8"]}}, 8, "'0' is not a whole"),
    "an extent beyond any file": ({"a": entry(0, 0, shape=[0, 2**63])}, 0, "not a whole number below"),
    "extents beyond any file": ({"a": entry(0, 0, shape=[0, 2**40, 2**40])}, 0, "more elements than a file can hold"),
    "a number of a thousand digits": (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 1000 + b"]}}", 0, "KeyError"),
    "an offset of many digits": (b'{"a": {"data_offsets": [0, ' + b"9" * 4300 + b"]}}", 0, "'9{40}' is not a whole"),
    "an offset of too many digits": (b'{"a": {"data_offsets": [0, ' + b"9" * 4301 + b"]}}", 0, "ValueError"),
    "more axes than torch has": ({"a": entry(0, 4, shape=[1] * 65)}, 4, "has 65 axes"),
    "half a four-bit pair": ({"a": entry(0, 2, dtype="F4", shape=[3])}, 2, r"2 bytes for F4 \(3,\)"),
    "a name twice": (
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        8,
        "the name 'a' occurs twice",
    ),
    "a key of an entry twice": (b'{"a": {"dtype": "F32", "dtype": "F16"}}', 0, "the name 'dtype' occurs twice"),
    "a name that is no text": ({"\ud800": entry(0, 8)}, 8, "UnicodeEncodeError"),
    "header in UTF-16": (json.dumps({"a": entry(0, 8)}).encode("utf-16-le"), 8, "header is not readable"),
    "entry is no object": ({"a": 3}, 8, "TypeError"),
    "header is a list": ([1], 0, "AttributeError"),
    "header is no JSON": (b'{"a": ', 0, "JSONDecodeError"),
    "header is no text": (b"\x81\x82\x83\x84", 0, "UnicodeDecodeError"),
    "header is nested without end": (b"[" * 100_000, 0, "RecursionError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_header_is_refused(tmp_path, fault):
    header, num_bytes, message = FAULTS[fault]
    file = write_header(tmp_path / "model.safetensors", header, bytes(num_bytes))
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert "fetch this file again" in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 200])
def test_an_absurd_header_length_is_refused_before_it_is_read(tmp_path, length):
    file = write_header(tmp_path / "model.safetensors", {"a": entry(0, 8)}, bytes(8), length=length)
    with pytest.raises(CorruptCheckpoint, match=f"claims {length} bytes, the file has {file.stat().st_size}"):
        read_header(file)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(3, 5), "b": torch.randn(7)}, file)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors"):
            read_header(file)


def test_a_damaged_header_gives_our_error_or_stays_within_the_file(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, file)
    whole = file.read_bytes()
    source = random.Random(0)
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(source.randint(1, 3)):
            content[source.randrange(150)] = source.randrange(256)
        file.write_bytes(content)
        try:
            found = read_header(file)
        except CorruptCheckpoint:
            refused += 1
        else:
            assert all(8 < info.begin <= info.end <= len(content) for info in found.values())
    assert refused > 150


#: JSON of any kind, with the words and numbers of headers among it.
words = st.sampled_from(["a", "b", "dtype", "shape", "data_offsets", "__metadata__", "F32", "F4", "U8"]) | st.text(
    max_size=3
)
numbers = st.sampled_from([0, 1, 2, 4, 8, 16, 24, -1, 2**31, 2**63, 2**64, 10**30]) | st.integers() | st.floats()
anything = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)
near_entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4", "BF16"]) | anything,
        "shape": st.lists(numbers, max_size=3) | anything,
        "data_offsets": st.tuples(numbers, numbers) | anything,
    }
)
near_header = st.dictionaries(words, near_entry, max_size=3) | st.dictionaries(words, anything, max_size=3) | anything


def check_header(file):
    """Read a header that nobody vouches for: what comes back lies within the file, or it is our error."""
    size = file.stat().st_size
    try:
        found = read_header(file)
    except CorruptCheckpoint:
        return False
    assert all(8 < info.begin <= info.end <= size for info in found.values())
    assert all(info.num_bytes == info.end - info.begin for info in found.values())
    assert sum(info.num_bytes for info in found.values()) <= size
    with Checkpoint(path=file.parent, config={}, tensors=found, digest="").reader() as reader:
        for name, info in found.items():
            assert math.prod(reader.read(name).shape) == info.num_elements // (2 if info.dtype == "F4" else 1)
    return True


@settings(max_examples=300)
@given(header=near_header, size=st.sampled_from([0, 4, 8, 16]))
def test_any_json_as_a_header_gives_our_error_or_stays_within_the_file(folder, header, size):
    check_header(write_header(folder / "any.safetensors", header, bytes(size)))


@settings(max_examples=200)
@given(edits=st.lists(st.tuples(st.integers(0, 190), st.binary(max_size=3), st.integers(0, 3)), max_size=3))
def test_an_edited_header_gives_our_error_or_stays_within_the_file(folder, edits):
    file = folder / "edited.safetensors"
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7), "c": torch.zeros(2, dtype=torch.uint8)}, file)
    content = file.read_bytes()
    for position, inserted, removed in edits:
        content = content[:position] + inserted + content[position + removed :]
    file.write_bytes(content)
    assert check_header(file) or edits


# --- folders that are wrong ---------------------------------------------------------------------------------------


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"model-00002-of-00002\.safetensors: the shard is missing"):
        Checkpoint.open(sharded)


def test_a_truncated_shard_is_named(sharded):
    shard = sharded / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(CorruptCheckpoint, match=r"model-00001-of-00002\.safetensors.*truncated"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_cannot_point_outside(sharded, name):
    save_file({"c": torch.zeros(5)}, sharded.parent / "x.safetensors")
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["c"] = name
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpoint, match="points outside its folder"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", ["..", ".", "", "a\0b"])
def test_an_index_that_names_no_file(sharded, name):
    (sharded / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CorruptCheckpoint):
        Checkpoint.open(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    save_file({"c": torch.zeros(5), "a": torch.zeros(2, 3)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(
        CorruptCheckpoint, match=r"'a' is in both model-00001-of-00002\.safetensors and model-00002-of-00002"
    ):
        Checkpoint.open(sharded)


def test_an_index_that_names_a_tensor_that_is_nowhere(sharded):
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpoint, match="places tensor 'ghost' in model-00001"):
        Checkpoint.open(sharded)


def test_an_index_that_places_a_tensor_in_the_wrong_shard(sharded):
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["a"] = "model-00002-of-00002.safetensors"
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpoint, match="places tensor 'a' in model-00002"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": {"a": 3}}', b"\xff"],
)
def test_an_index_that_is_none(sharded, content):
    (sharded / INDEX_NAME).write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=r"index\.json is not a weight index"):
        Checkpoint.open(sharded)


def test_shards_without_their_index_are_refused_as_stock_loaders_refuse_them(sharded):
    (sharded / INDEX_NAME).unlink()
    with pytest.raises(NotACheckpoint, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        Checkpoint.open(sharded)


def test_places_that_hold_no_checkpoint(tmp_path, sharded):
    with pytest.raises(NotACheckpoint, match=r"nowhere does not exist.*folder with config\.json"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(NotACheckpoint, match=r"config\.json is a file; pass a \*\.gguf, or the folder"):
        Checkpoint.open(sharded / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACheckpoint, match=r"has no config\.json"):
        Checkpoint.open(tmp_path / "empty")


@pytest.mark.parametrize(
    "content", [b"", b"{'model_type': 1}", b"\xff\xfe", b"[" * 100_000, b'{"x": ' + b"9" * 5000 + b"}"]
)
def test_a_config_that_is_no_json(sharded, content):
    (sharded / "config.json").write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=r"config\.json is not JSON"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("content", [[], 3, {}, {"hidden_size": 4}, {"model_type": None}, {"model_type": ["olmoe"]}])
def test_a_config_without_a_model_type(sharded, content):
    (sharded / "config.json").write_text(json.dumps(content))
    with pytest.raises(NotACheckpoint, match="names no model_type"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
def test_text_of_absurd_size_is_refused_unparsed(sharded, name):
    with (sharded / name).open("r+b") as file:
        file.truncate(200_000_000)  # a hole: takes no room
    with pytest.raises(CorruptCheckpoint, match=rf"{name} has 200000000 bytes, at most \d+ are believed"):
        Checkpoint.open(sharded)


def test_an_index_that_places_a_tensor_twice(sharded):
    text = (sharded / INDEX_NAME).read_text()
    (sharded / INDEX_NAME).write_text(text.replace('"a":', '"b": "model-00002-of-00002.safetensors", "a":'))
    with pytest.raises(CorruptCheckpoint, match=r"not a weight index: ValueError: the name 'b' occurs twice"):
        Checkpoint.open(sharded)


# --- links --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(sharded, tmp_path):
    """The same model as the hub's client keeps it: files are blobs, a snapshot links to them."""
    cache = tmp_path / "models--someone--some-model"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (sharded / "tokenizer.json").write_text("{}")
    for number, file in enumerate(sorted(sharded.iterdir())):
        shutil.copy(file, cache / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_download_cache_opens_as_the_folder_it_holds(sharded, cached):
    plain, linked = Checkpoint.open(sharded), Checkpoint.open(cached)
    assert linked.digest == plain.digest
    assert linked.tensors == plain.tensors
    assert linked.file_stamps().keys() == plain.file_stamps().keys()
    assert [file.name for file in linked.other_files()] == ["tokenizer.json"]
    with plain.reader() as one, linked.reader() as other:
        assert all(torch.equal(one.read(name), other.read(name)) for name in plain.tensors)
    with pytest.raises(NotACheckpoint, match=r"it is a download cache: pass .*snapshots/0123abcd"):
        Checkpoint.open(cached.parent.parent)


def test_a_link_to_a_model_folder(sharded, tmp_path):
    (tmp_path / "link").symlink_to(sharded)
    assert Checkpoint.open(tmp_path / "link").digest == Checkpoint.open(sharded).digest
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(NotACheckpoint, match=r"nowhere is a link to .*gone, which does not exist"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(NotACheckpoint, match=r"circle is a link to .*circle, which does not exist"):
        Checkpoint.open(tmp_path / "circle")


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, "model-00002-of-00002.safetensors", "tokenizer.json"])
def test_links_that_lead_nowhere_are_named(cached, name):
    (cached / name).resolve().unlink()
    message = rf"{name}:? .*is a link to \.\./\.\./blobs/0+\d, which does not exist; (fetch|remove)"
    with pytest.raises((CorruptCheckpoint, NotACheckpoint), match=message):
        Checkpoint.open(cached).other_files()


def test_a_shard_that_is_no_regular_file(sharded):
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.unlink()
    os.mkfifo(shard)  # opening it would wait for ever
    with pytest.raises(CorruptCheckpoint, match=r"00002\.safetensors: the shard is no regular file"):
        Checkpoint.open(sharded)


def test_links_to_files_and_folders_belong_to_the_model(sharded, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jinja").write_text("x")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    (sharded / "round").symlink_to(sharded)
    (tmp_path / "merges.txt").write_text("x")
    (sharded / "merges.txt").symlink_to(tmp_path / "merges.txt")
    (sharded / "folder").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(sharded / "pipe")
    found = [str(file.relative_to(sharded)) for file in Checkpoint.open(sharded).other_files()]
    assert found == ["folder/a.jinja", "merges.txt"]


def test_stamps_follow_every_write(cached):
    checkpoint = Checkpoint.open(cached)
    before = checkpoint.file_stamps()
    assert before.keys() == {"config.json", *checkpoint.shards}
    assert json.loads(json.dumps(before)) == before
    for name, (size, changed) in before.items():
        found = (cached / name).resolve().stat()
        assert (size, changed) == (found.st_size, found.st_mtime_ns)
    (cached / "tokenizer.json").resolve().write_text("changed")
    assert checkpoint.file_stamps() == before
    for name in before:
        file = (cached / name).resolve()
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        now = checkpoint.file_stamps()
        assert [other for other in before if now[other] != before[other]] == [name]
        before = now


# --- pickles ------------------------------------------------------------------------------------------------------


class Trap:
    """What runs a program when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.fixture
def pickled(tmp_path):
    folder = make(tmp_path / "pickled", {})
    one, two = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    torch.save({"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(4, dtype=torch.bfloat16)}, folder / one)
    torch.save({"c": torch.zeros(5, dtype=torch.int64)}, folder / two)
    (folder / PICKLE_INDEX_NAME).write_text(json.dumps({"weight_map": {"a": one, "b": one, "c": two}}))
    return folder


def test_pickles_are_read_only_when_allowed(pickled):
    message = r"it has pytorch_model-00001-of-00002\.bin, a pickle.*convert it.*or pass --allow-pickle .*trust"
    with pytest.raises(NotACheckpoint, match=message):
        Checkpoint.open(pickled)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in pickled.iterdir()}
    checkpoint = Checkpoint.open(pickled, allow_pickle=True)
    assert {name: (info.dtype, info.shape, info.num_bytes) for name, info in checkpoint.tensors.items()} == {
        "a": ("F32", (3, 2), 24),
        "b": ("BF16", (4,), 8),
        "c": ("I64", (5,), 40),
    }
    with checkpoint.reader() as reader:
        found = reader.read("a")
        assert torch.equal(found, torch.arange(6.0).view(2, 3).T)
        assert found.is_contiguous()
        found.add_(1)
        assert torch.equal(reader.read("a"), torch.arange(6.0).view(2, 3).T)
        assert torch.equal(reader.read("b"), torch.ones(4, dtype=torch.bfloat16))
        assert torch.equal(reader.read("c"), torch.zeros(5, dtype=torch.int64))
        assert reader.num_bytes_read == 24 + 24 + 8 + 40
        rows = reader.read_rows("a", 1, 3)
        assert torch.equal(rows, torch.arange(6.0).view(2, 3).T[1:3])
        assert rows.untyped_storage().nbytes() == 16, "the rest is let go"
        assert reader.num_bytes_read == 24 + 24 + 8 + 40 + 24, "of a pickle the whole tensor is read"
    assert checkpoint.file_stamps().keys() == {"config.json", *checkpoint.shards}
    assert checkpoint.other_files() == ()
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in pickled.iterdir()} == before
    shard = pickled / "pytorch_model-00002-of-00002.bin"
    torch.save({"c": torch.ones(5, dtype=torch.int64)}, shard)
    assert Checkpoint.open(pickled, allow_pickle=True).digest != checkpoint.digest


def test_safetensors_come_before_pickles(pickled):
    save_file({"x": torch.ones(2)}, pickled / "model.safetensors")
    checkpoint = Checkpoint.open(pickled, allow_pickle=True)
    assert set(checkpoint.tensors) == {"x"}
    assert not checkpoint.pickled


def test_a_pickle_under_the_name_of_a_safetensors_shard_is_not_unpickled(tmp_path):
    folder = make(tmp_path / "m", {}, index={"x": "x.bin"})
    (folder / "x.bin").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    for allowed in (False, True):
        with pytest.raises(CorruptCheckpoint, match=r"x\.bin: the header claims"):
            Checkpoint.open(folder, allow_pickle=allowed)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path, legacy):
    folder = make(tmp_path / "m", {})
    content = {"x": torch.ones(2), "y": Trap(tmp_path / "ran")}
    torch.save(content, folder / PICKLE_NAME, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CorruptCheckpoint, match=r"pytorch_model\.bin is not read as a dictionary of tensors"):
        Checkpoint.open(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_pickle_gives_our_error_or_what_it_still_says(tmp_path):
    folder = make(tmp_path / "m", {})
    file = folder / PICKLE_NAME
    torch.save({"x": torch.ones(3)}, file)
    whole = file.read_bytes()
    source = random.Random(0)
    refused = 0
    for attempt in range(150):
        content = bytearray(whole)
        if attempt % 2:
            content = content[: source.randrange(len(content))]
        else:
            for _ in range(8):
                content[source.randrange(len(content))] = source.randrange(256)
        file.write_bytes(content)
        try:
            assert set(Checkpoint.open(folder, allow_pickle=True).tensors) <= {"x"} or attempt % 2 == 0
        except CorruptCheckpoint:
            refused += 1
    assert refused > 75


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list, expected a dictionary"),
        ({"x": 3}, "entry 'x' is a int, no tensor"),
        ({3: torch.ones(2)}, "entry 3 is a Tensor, no tensor with a name"),
        ({"\ud800": torch.ones(2)}, "no tensor with a name"),
        ({"x": torch.ones(2).to_sparse()}, "tensor 'x' is torch.float32 torch.sparse_coo, no plain numbers"),
        ({"x": torch.ones(2, dtype=torch.complex128)}, "torch.complex128 torch.strided, no plain numbers"),
    ],
)
def test_pickles_of_other_things(tmp_path, content, message):
    folder = make(tmp_path / "m", {})
    torch.save(content, folder / PICKLE_NAME)
    with pytest.raises(CorruptCheckpoint, match=message):
        Checkpoint.open(folder, allow_pickle=True)


def test_pickles_that_do_not_fit_their_index(pickled):
    shard = pickled / "pytorch_model-00002-of-00002.bin"
    checkpoint = Checkpoint.open(pickled, allow_pickle=True)
    torch.save({"c": torch.ones(6)}, shard)
    with checkpoint.reader() as reader, pytest.raises(CorruptCheckpoint, match=r"'c' is not what it was"):
        reader.read("c")
    torch.save({"d": torch.ones(6)}, shard)
    with pytest.raises(CorruptCheckpoint, match=r"bin\.index\.json places tensor 'c' in pytorch_model-00002"):
        Checkpoint.open(pickled, allow_pickle=True)
    shard.unlink()
    with pytest.raises(CorruptCheckpoint, match=r"00002\.bin: the shard is missing"):
        Checkpoint.open(pickled, allow_pickle=True)


def test_folders_with_no_weights_that_may_be_read(tmp_path):
    folder = make(tmp_path / "m", {})
    with pytest.raises(NotACheckpoint, match=r"has no \*\.safetensors weights$"):
        Checkpoint.open(folder)
    (folder / "other.bin").write_bytes(b"")
    with pytest.raises(
        NotACheckpoint, match=r"other\.bin, but neither pytorch_model\.bin nor pytorch_model\.bin\.index"
    ):
        Checkpoint.open(folder, allow_pickle=True)


# --- digest and files ---------------------------------------------------------------------------------------------


def test_the_digest_follows_every_byte_and_the_config(sharded, tmp_path):
    before = Checkpoint.open(sharded).digest
    copy = tmp_path / "copy"
    shutil.copytree(sharded, copy)
    assert Checkpoint.open(copy).digest == before, "place and time are no part of it"

    seen = {before}
    for shard in sorted(copy.glob("*.safetensors")):
        content = shard.read_bytes()
        first = min(info.begin for info in read_header(shard).values())
        for position in range(first, len(content)):
            changed = bytearray(content)
            changed[position] ^= 1
            shard.write_bytes(changed)
            seen.add(Checkpoint.open(copy).digest)
        shard.write_bytes(content)
    assert len(seen) == 1 + 4 * (6 + 4 + 5), "each changed byte gives a digest of its own"

    (copy / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 5}))
    assert Checkpoint.open(copy).digest not in seen
    (copy / "config.json").write_text(json.dumps(dict(reversed(CONFIG.items())), indent=4))
    assert Checkpoint.open(copy).digest == before, "how the config is written is no part of it"


def test_the_digest_follows_names_and_shapes(tmp_path):
    first = make(tmp_path / "a", {"model.safetensors": {"x": torch.zeros(2, 3)}})
    other_name = make(tmp_path / "b", {"model.safetensors": {"y": torch.zeros(2, 3)}})
    other_shape = make(tmp_path / "c", {"model.safetensors": {"x": torch.zeros(3, 2)}})
    assert len({Checkpoint.open(path).digest for path in (first, other_name, other_shape)}) == 3


def test_other_files_are_what_belongs_to_the_model_beside_weights_and_config(sharded):
    belongs = {
        "tokenizer.json", "chat_template.jinja", "README.md", "generation_config.json", "merges.txt", "model.py",
        "LICENSE", "qwen.tiktoken", "additional_chat_templates/tool_use.jinja", "code/parts/model.py", "params.txt",
    }  # fmt: skip
    weights = {
        "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "model.onnx", "rust_model.ot", "tf_model.h5",
        "x.pt", "consolidated.pth", "flax_model.msgpack", "adapter.safetensors", "adapter.safetensors.index.json",
        "original/params.json", "original/tokenizer.model", "metal/model.bin", "metal/config.json", "params.json",
        "checkpoint-10/model.safetensors", "checkpoint-10/trainer_state.json", "onnx/model.onnx_data",
    }  # fmt: skip
    hidden = {".gitattributes", ".DS_Store", ".git/config", ".cache/huggingface/x.metadata", "__pycache__/model.pyc"}
    for name in belongs | weights | hidden:
        (sharded / name).parent.mkdir(parents=True, exist_ok=True)
        (sharded / name).write_text("x")
    found = Checkpoint.open(sharded).other_files()
    assert {file.relative_to(sharded).as_posix() for file in found} == belongs
    assert list(found) == sorted(found)


def test_looking_and_reading_writes_nothing(sharded):
    def state():
        return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in sharded.iterdir()}

    before = state()
    for file in sharded.iterdir():
        file.chmod(0o444)
    checkpoint = Checkpoint.open(sharded)
    with checkpoint.reader() as reader:
        for name in checkpoint.tensors:
            reader.read(name).add_(1)  # what the caller does with it stays with the caller
    checkpoint.other_files()
    assert state() == before


def test_reading_where_the_system_cannot_read_at_a_position(tiny, monkeypatch):
    """As on Windows."""
    with Checkpoint.open(tiny()).reader() as reader:
        expected = {name: reader.read(name) for name in Checkpoint.open(tiny()).tensors}
    monkeypatch.delattr("os.preadv")
    with Checkpoint.open(tiny()).reader() as reader:
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in expected.items())
