"""Artefacts: what is written comes back, damage and mix-ups are noticed, and a failed write changes nothing."""

import errno
import json
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import coterie
from coterie import artifact
from coterie.artifact import (
    FORMAT,
    atomic_path,
    check_file,
    differences,
    digest_of,
    file_digest,
    open_artifact,
    read_artifact,
    read_header,
    write_artifact,
    write_json,
)
from coterie.errors import CorruptArtifact, OutOfSpace, StaleArtifact

BODY = {"layers": [{"index": 0, "name": "größe ☃"}], "keep": 0.1, "none": None}
INPUTS = {"model": "a" * 64, "text": "b" * 64}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def tensors():
    return {
        "0.usage": torch.arange(6, dtype=torch.float64).view(2, 3),
        "0.weight": torch.randn(3, 4).to(torch.bfloat16),
        "transposed": torch.randn(2, 5).T,
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture
def written(tmp_path, tensors):
    path = tmp_path / "run" / "profile.json"
    write_artifact(path, kind="profile", body=BODY, inputs=INPUTS, tensors=tensors)
    return path


def change(path: Path, *, forged: bool = False, **entries) -> None:
    """Change entries of the document, when it is forged with a digest that fits."""
    document = json.loads(path.read_text(encoding="utf-8")) | entries
    if forged:
        del document["digest"]
        document["digest"] = digest_of(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def listing(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_was_written_comes_back(written, tensors):
    body, found = read_artifact(written, kind="profile", inputs=INPUTS)
    assert body == BODY
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert sorted(file.name for file in written.parent.iterdir()) == ["profile.json", "profile.safetensors"]


def test_the_document_says_what_it_is(written):
    document = read_header(written)
    assert (document["kind"], document["format"], document["inputs"]) == ("profile", FORMAT, INPUTS)
    assert document["coterie"] == coterie.__version__
    assert document["tensors_digest"] == file_digest(written.with_suffix(".safetensors"))
    assert "größe ☃" in written.read_text(encoding="utf-8"), "people read these files"


def test_without_tensors_there_is_one_file(tmp_path):
    path = tmp_path / "plan.json"
    write_artifact(path, kind="plan", body=BODY, inputs={})
    assert read_artifact(path, kind="plan") == (BODY, {})
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_equal_content_is_equal_bytes(tmp_path, tensors):
    for name in ("a", "b"):
        write_artifact(tmp_path / name / "p.json", kind="profile", body=BODY, inputs=INPUTS, tensors=tensors)
    assert listing(tmp_path / "a") == listing(tmp_path / "b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bodies")


@given(body=st.dictionaries(st.text(max_size=5), json_values, max_size=4))
def test_any_json_body_survives(folder, body):
    path = folder / "x.json"
    write_artifact(path, kind="plan", body=body, inputs={})
    assert read_artifact(path, kind="plan")[0] == body


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=12), inner, max_size=6),
    max_leaves=40,
)


@given(JSON)
def test_readable_json_is_the_same_content_on_short_lines(content):
    text = artifact._readable(content)
    assert json.loads(text) == content
    for line in text.split("\n"):
        value = line.strip().rstrip(",").partition(": ")[2] or line.strip().rstrip(",")
        holds_more = value.startswith(("[", "{")) and len(value) > 2
        assert len(line) <= 101 or not holds_more  # a comma may follow


def test_readable_json_puts_what_fits_on_one_line():
    content = {"layers": [{"num_experts": 2, "experts": [{"sources": [1]}, {"sources": [5]}]}] * 2, "seed": 0}
    assert artifact._readable(content) == (
        '{\n  "layers": [\n    {"num_experts": 2, "experts": [{"sources": [1]}, {"sources": [5]}]},\n'
        '    {"num_experts": 2, "experts": [{"sources": [1]}, {"sources": [5]}]}\n  ],\n  "seed": 0\n}'
    )


@given(content=json_values)
def test_a_digest_is_of_the_content_not_of_its_writing(content):
    assert digest_of(content) == digest_of(json.loads(json.dumps(content)))
    assert digest_of({"a": content, "b": 1}) == digest_of({"b": 1, "a": content})
    assert digest_of({"a": content}) != digest_of({"a": [content]})


def test_another_kind_is_refused(written):
    with pytest.raises(CorruptArtifact, match=r"profile\.json is a profile, not a plan"):
        read_artifact(written, kind="plan")


@pytest.mark.parametrize("name", ["model", "text"])
def test_another_input_is_stale_and_named(written, name):
    with pytest.raises(StaleArtifact, match=rf"made from another {name}.*{INPUTS[name][:12]}.*cccc"):
        read_artifact(written, kind="profile", inputs=INPUTS | {name: "c" * 64})


def test_inputs_that_are_not_given_are_not_checked(written):
    assert read_artifact(written, kind="profile", inputs={"text": INPUTS["text"]})[0] == BODY
    with pytest.raises(StaleArtifact, match="another plan"):
        read_artifact(written, kind="profile", inputs={"plan": "d" * 64})


def test_a_newer_format_is_refused(written):
    change(written, format=FORMAT + 1)
    with pytest.raises(StaleArtifact, match=rf"format {FORMAT + 1}.*up to {FORMAT}.*upgrade"):
        read_artifact(written, kind="profile")


def test_a_changed_body_is_noticed(written):
    change(written, body=BODY | {"keep": 0.2})
    with pytest.raises(CorruptArtifact, match="does not match its digest"):
        read_artifact(written, kind="profile")


@pytest.mark.parametrize(
    "entries",
    [
        {"inputs": INPUTS | {"model": "c" * 64}},
        {"inputs": {}},
        {"kind": "plan"},
        {"coterie": "9"},
        {"tensors": "other.safetensors"},
        {"tensors_digest": "c" * 64},
        {"files": {"more.safetensors": "c" * 64}},
        {"digest": "c" * 64},
        {"digest": None},
    ],
)
def test_all_that_the_document_says_is_covered_by_its_digest(written, entries):
    change(written, **entries)
    kind = entries.get("kind", "profile")
    with pytest.raises(CorruptArtifact, match="does not match its digest"):
        read_artifact(written, kind=kind, inputs=entries.get("inputs"))
    with pytest.raises(CorruptArtifact, match="does not match its digest"):
        read_header(written)


@pytest.mark.parametrize("number", [0, -1, True])
def test_a_format_that_never_was_is_refused(written, number):
    change(written, format=number)
    with pytest.raises(CorruptArtifact, match=rf"format {number}, expected a whole number from 1 on"):
        read_artifact(written, kind="profile")


def test_an_artefact_of_the_first_format_is_read(written):
    """Its digest was of the body alone."""
    document = json.loads(written.read_text(encoding="utf-8"))
    del document["digest"]
    document |= {"format": 1, "body_digest": digest_of(document["body"])}
    written.write_text(json.dumps(document), encoding="utf-8")
    assert read_artifact(written, kind="profile", inputs=INPUTS)[0] == BODY
    change(written, body={})
    with pytest.raises(CorruptArtifact, match="does not match its digest"):
        read_artifact(written, kind="profile")
    change(written, body=BODY, format=2)
    with pytest.raises(CorruptArtifact, match="does not match its digest"):
        read_artifact(written, kind="profile")


def test_opening_gives_all_that_an_artefact_says(tmp_path, tensors):
    path = tmp_path / "profile.json"
    (tmp_path / "layer-0.safetensors").write_bytes(b"abc")
    files = {"layer-0.safetensors": file_digest(tmp_path / "layer-0.safetensors")}
    write_artifact(path, kind="profile", body=BODY, inputs=INPUTS, tensors=tensors, files=files)
    found = open_artifact(path, kind="profile", inputs=INPUTS)
    assert (found.body, found.inputs, found.files) == (BODY, INPUTS, files)
    assert found.tensors.keys() == tensors.keys()
    for name, digest in found.files.items():
        check_file(tmp_path, name, digest)
    write_artifact(tmp_path / "plan.json", kind="plan", body={}, inputs={}, files=files)
    plan = open_artifact(tmp_path / "plan.json", kind="plan")
    assert (plan.files, plan.tensors, plan.inputs) == (files, {}, {})
    assert open_artifact(path, kind="profile").body == read_artifact(path, kind="profile")[0]


def test_other_files_are_checked_when_they_are_asked_for(tmp_path):
    digest = file_digest(_with_content(tmp_path / "a.bin", b"abc"))
    check_file(tmp_path, "a.bin", digest)
    _with_content(tmp_path / "a.bin", b"abd")
    with pytest.raises(
        CorruptArtifact, match=r"a\.bin: the bytes do not match the digest in plan\.json; it is damaged"
    ):
        check_file(tmp_path, "a.bin", digest, owner="plan.json")
    with pytest.raises(CorruptArtifact, match=r"b\.bin is missing; the artefact needs it"):
        check_file(tmp_path, "b.bin", digest)


def _with_content(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["../a.bin", "sub/a.bin", "", "..", ".", "a\\b"])
def test_other_files_are_beside_the_document(tmp_path, name):
    path = tmp_path / "sub" / "plan.json"
    with pytest.raises(ValueError, match="no name of a file beside"):
        write_artifact(path, kind="plan", body={}, inputs={}, files={name: "a" * 64})
    assert not path.exists()
    write_artifact(path, kind="plan", body={}, inputs={})
    change(path, forged=True, files={name: "a" * 64})
    with pytest.raises(CorruptArtifact, match="cannot be"):
        open_artifact(path, kind="plan")


@pytest.mark.parametrize("files", [[], 3, {"a.bin": 3}])
def test_a_list_of_files_that_is_none_is_refused(tmp_path, files):
    write_artifact(tmp_path / "plan.json", kind="plan", body={}, inputs={})
    change(tmp_path / "plan.json", forged=True, files=files)
    with pytest.raises(CorruptArtifact, match="cannot be"):
        open_artifact(tmp_path / "plan.json", kind="plan")


@given(old=st.dictionaries(st.text(max_size=3), json_values), new=st.dictionaries(st.text(max_size=3), json_values))
def test_differences_are_told_exactly_where_there_are_some(old, new):
    assert differences(old, json.loads(json.dumps(old))) == []
    assert bool(differences(old, new)) == (old != new) or flattens_alike(old, new)


def flattens_alike(old, new) -> bool:
    """Dotted names cannot tell {"a.b": 1} from {"a": {"b": 1}}."""
    return "." in "".join([*map(str, old), *map(str, new)])


def test_differences_in_words():
    old = {"model": "a" * 64, "keep": 0.5, "nested": {"x": {"y": 1}, "same": 1}, "gone": None, "long": "x" * 200}
    new = {"model": "b" * 64, "keep": 0.25, "nested": {"x": {"y": [2]}, "same": 1}, "long": "y" * 200, "new": {}}
    assert differences(old, new) == [
        f"model was {'a' * 12}, now it is {'b' * 12}",
        "keep was 0.5, now it is 0.25",
        "nested.x.y was 1, now it is [2]",
        f'long was "{"x" * 56}..., now it is "{"y" * 56}...',
        "new was not set, now it is {}",
        "gone was null, now it is not set",
    ]


def test_a_written_file_and_its_folder_are_flushed_to_the_disk(tmp_path, monkeypatch):
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell which file a descriptor is")
    synced = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").resolve(), (tmp_path / "x.json").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    write_json(tmp_path / "x.json", [1])
    (file, there), (folder, there_then) = synced
    assert file.name.startswith(".x.json.")
    assert not there, "the content is on the disk before the name"
    assert (folder, there_then) == (tmp_path, True)


def test_a_changed_byte_of_the_tensors_is_noticed(written):
    file = written.with_suffix(".safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=r"profile\.safetensors.*digest"):
        read_artifact(written, kind="profile")


def test_missing_tensors_are_noticed(written):
    written.with_suffix(".safetensors").unlink()
    with pytest.raises(CorruptArtifact, match=r"profile\.safetensors is missing"):
        read_artifact(written, kind="profile")


@pytest.mark.parametrize("name", ["../profile.safetensors", "", "..", 3, "profile.pt"])
def test_tensors_elsewhere_are_not_opened(written, name):
    change(written, forged=True, tensors=name)
    with pytest.raises(CorruptArtifact, match="cannot be"):
        read_artifact(written, kind="profile")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b'{"kind": "profile", ', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "no artefact"),
        (b"3", "no artefact"),
        (b'{"kind": "profile"}', "no artefact"),
        (b'{"kind": "p", "format": "1", "inputs": {}, "body": {}, "body_digest": ""}', "no artefact"),
        (b'{"kind": "p", "format": 1, "inputs": [], "body": {}, "body_digest": ""}', "no artefact"),
    ],
)
def test_what_is_no_artefact_is_refused(tmp_path, content, message):
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=rf"profile\.json.*{message}"):
        read_artifact(path, kind="profile")


def test_a_file_cut_off_anywhere_is_noticed(written):
    whole = written.read_bytes().rstrip()
    for length in range(0, len(whole), 37):
        written.write_bytes(whole[:length])
        with pytest.raises(CorruptArtifact):
            read_artifact(written, kind="profile")


def test_places_that_hold_no_artefact(written):
    with pytest.raises(CorruptArtifact, match="does not exist"):
        read_artifact(written.with_name("other.json"), kind="profile")
    with pytest.raises(CorruptArtifact, match="does not exist"):
        read_artifact(written / "profile.json", kind="profile")  # the file was given where its folder belongs
    with pytest.raises(CorruptArtifact, match="is a folder"):
        read_artifact(written.parent, kind="profile")


def no_space(*_args, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in_words(_tensors, path, **_options):
    from safetensors import SafetensorError

    Path(path).write_bytes(b"half")
    raise SafetensorError(f"Error while serializing: I/O error: No space left (os error {errno.ENOSPC})")


@pytest.mark.parametrize(
    ("target", "failure"),
    [
        ("tempfile.mkstemp", no_space),
        ("safetensors.torch.save_file", no_space_in_words),
        ("pathlib.Path.write_text", no_space),
        ("os.fsync", no_space),
    ],
)
def test_a_full_disk_leaves_the_artefact_that_was_there(written, tensors, monkeypatch, target, failure):
    before = listing(written.parent)
    monkeypatch.setattr(target, failure)
    with pytest.raises(OutOfSpace, match="disk filled up") as caught:
        write_artifact(written, kind="profile", body={"other": 1}, inputs=INPUTS, tensors={"x": torch.ones(3)})
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert listing(written.parent) == before, "neither file changed, and no temporary file is left"
    body, found = read_artifact(written, kind="profile", inputs=INPUTS)
    assert body == BODY
    assert found.keys() == tensors.keys()


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is a POSIX one")
def test_what_the_system_really_raises_on_a_full_disk_is_understood(tmp_path, monkeypatch):
    # A limit on file sizes is the nearest thing to a full disk that a test can have; it has a number of its own.
    import resource
    import signal

    monkeypatch.setattr(artifact.errno, "ENOSPC", errno.EFBIG)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        for body, tensors in (({}, {"x": torch.ones(10_000)}), ({"long": "x" * 10_000}, None)):
            with pytest.raises(OutOfSpace):
                write_artifact(tmp_path / "a.json", kind="profile", body=body, inputs={}, tensors=tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not listing(tmp_path)


def test_the_document_takes_its_place_last(written, monkeypatch):
    order = []
    replace = Path.replace

    def interrupted(self, target):
        order.append(Path(target).name)
        if len(order) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_artifact(written, kind="profile", body={"new": 1}, inputs=INPUTS, tensors={"x": torch.ones(3)})
    assert order == ["profile.safetensors", "profile.json"]
    with pytest.raises(CorruptArtifact, match="digest"):  # stopped in between, it is never taken for a whole one
        read_artifact(written, kind="profile")
    assert len(listing(written.parent)) == 2


def test_other_errors_pass_and_leave_nothing(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    def fail(error):
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error

    for error in (KeyboardInterrupt(), PermissionError(errno.EACCES, "no"), ValueError("no")):
        with pytest.raises(type(error)):
            fail(error)
    assert listing(tmp_path) == {"x.json": b"old"}


def test_results_have_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_json(tmp_path / "x.json", [1])
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_file_digest_is_the_sha256_of_the_whole_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
