"""Reading headers: what safetensors writes is understood byte by byte, and every kind of damage has a clear error."""

import json
import random
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from coterie.errors import CorruptCheckpoint, NotACheckpoint
from coterie.model.checkpoint import DTYPE_BITS, INDEX_NAME, Checkpoint, read_header

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


def test_looking_needs_no_torch(sharded):
    code = (
        f"import sys; from coterie.model.checkpoint import Checkpoint; Checkpoint.open({str(sharded)!r}).other_files()"
    )
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
    "one offset": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8, "IndexError"),
    "shape is no list": ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, 8, "TypeError"),
    "shape of words": ({"a": {"dtype": "F32", "shape": ["two"], "data_offsets": [0, 8]}}, 8, "ValueError"),
    "shape is infinite": (b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}', 8, "OverflowError"),
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
    with pytest.raises(NotACheckpoint, match=r"config\.json is a file; pass the folder"):
        Checkpoint.open(sharded / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACheckpoint, match=r"has no config\.json"):
        Checkpoint.open(tmp_path / "empty")


@pytest.mark.parametrize("name", ["someone/some-model", "a--b/c", "a/b..c", "someone/model-"])
def test_a_hub_id_that_cannot_be_fetched(name):
    with pytest.raises(NotACheckpoint, match=f"{name} is no local folder and could not be fetched"):
        Checkpoint.open(name)


def test_a_hub_id_is_fetched(sharded, monkeypatch):
    asked = []

    def fetch(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(sharded)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert Checkpoint.open("someone/some-model").path == sharded
    [(name, patterns)] = asked
    assert name == "someone/some-model"
    assert not any(pattern in patterns for pattern in ("*", "*.bin", "*.py")), "no pickles and no code are fetched"


@pytest.mark.parametrize("content", [b"", b"{'model_type': 1}", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_json(sharded, content):
    (sharded / "config.json").write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=r"config\.json is not JSON"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("content", [[], 3, {}, {"hidden_size": 4}, {"model_type": None}, {"model_type": ["olmoe"]}])
def test_a_config_without_a_model_type(sharded, content):
    (sharded / "config.json").write_text(json.dumps(content))
    with pytest.raises(NotACheckpoint, match="names no model_type"):
        Checkpoint.open(sharded)


def test_pickles_only(tmp_path):
    make(tmp_path / "m", {})
    with pytest.raises(NotACheckpoint, match=r"has no \*\.safetensors weights$"):
        Checkpoint.open(tmp_path / "m")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(NotACheckpoint, match=r"it has pytorch_model\.bin: convert it"):
        Checkpoint.open(tmp_path / "m")


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
    belongs = {"tokenizer.json", "chat_template.jinja", "README.md", "generation_config.json", "merges.txt", "model.py"}
    weights = {
        "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "model.onnx", "rust_model.ot", "tf_model.h5",
        "x.pt", "consolidated.pth", "flax_model.msgpack", "adapter.safetensors", "adapter.safetensors.index.json",
    }  # fmt: skip
    for name in belongs | weights | {".gitattributes", ".DS_Store"}:
        (sharded / name).write_text("x")
    (sharded / "original").mkdir()
    found = Checkpoint.open(sharded).other_files()
    assert {file.name for file in found} == belongs
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
