"""Text as it really is: every format gives the same documents, and what cannot be read is named with file and line."""

import gzip
import json
import logging
import os
import sys
from types import SimpleNamespace

import pytest

import coterie
from coterie.errors import InputError, TextError, UnknownName
from coterie.evaluate.generation import read_questions
from coterie.evaluate.speed import memory_in_use, peak_memory
from coterie.profile import sources
from coterie.profile.calibration import tokenize
from coterie.profile.data_sets import DataSet
from coterie.profile.documents import log_unread, read_documents, text_files
from coterie.profile.sources import text_sources
from coterie.testing import tiny_tokenizer

TEXTS = ["one", "two\nlines", "caf\u00e9 \U0001f600", " \n", "four"]
LINES = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS))


def write_table(file, rows):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist(rows), file)
    return file


# --- formats ------------------------------------------------------------------------------------------------------


def test_gzip_is_read_as_what_it_holds(tmp_path):
    for name, content in (("a.txt.gz", "one\n<|endoftext|>\ntwo"), ("b.c.jsonl.gz", LINES), ("d.jsonl", LINES)):
        data = content.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    files = text_files(tmp_path)
    assert list(files) == ["a", "b.c", "d"]
    assert read_documents(files["a"]) == ["one", "two"]
    assert read_documents(files["b.c"]) == read_documents(files["d"]) == [text for text in TEXTS if text.strip()]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("spoil", [lambda data: data[:-9], lambda data: data[:20], lambda data: b"no gzip" + data])
def test_a_gzip_file_that_is_not_whole_is_named(tmp_path, name, spoil):
    (tmp_path / name).write_bytes(spoil(gzip.compress(LINES.encode() * 50)))
    with pytest.raises(TextError, match=rf"{name} is no whole gzip file"):
        read_documents(tmp_path / name)


def test_parquet_gives_the_documents_of_its_text_column(tmp_path):
    rows = [{"other": [number], "text": text} for number, text in enumerate(TEXTS * 40)]
    file = write_table(tmp_path / "a.parquet", rows)
    assert text_files(tmp_path) == {"a": file}
    assert read_documents(file) == [text for text in TEXTS * 40 if text.strip()]
    with_none = write_table(tmp_path / "b.parquet", [{"text": "x"}, {"text": None}])
    with pytest.raises(TextError, match=r"b\.parquet, row 2: expected a JSON object with a \"text\" field"):
        read_documents(with_none)


def test_a_table_without_text_is_refused_with_its_columns(tmp_path):
    file = write_table(tmp_path / "a.parquet", [{"question": "x", "n": 1}])
    with pytest.raises(TextError, match=r'a\.parquet has no column "text".* but question, n'):
        read_documents(file)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(TextError, match=r"b\.parquet cannot be read"):
        read_documents(tmp_path / "b.parquet")


@pytest.mark.parametrize("module", ["pyarrow.parquet", "datasets"])
def test_what_is_not_installed_is_said_with_the_extra(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").write_bytes(b"")
    read = text_sources(tmp_path if "." in module else "hf:org/name")
    with pytest.raises(InputError, match=r"is not installed, which reads this: pip install 'coterie\[data\]'"):
        list(next(iter(read.values())).read())


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "chats"
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([{"text": text, "n": 1} for text in TEXTS]).save_to_disk(folder)
    datasets.enable_progress_bars()
    return folder


def test_a_saved_data_set_is_a_domain(saved):
    assert text_files(saved) == {"chats": saved.resolve()}
    (saved.parent / "b.txt").write_text("x")
    assert text_files(saved.parent) == {"b": saved.parent / "b.txt", "chats": saved}
    assert read_documents(saved) == [text for text in TEXTS if text.strip()]


def test_of_saved_splits_train_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("test", "train", "more")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "all")
    datasets.DatasetDict({"test": parts["test"], "more": parts["more"]}).save_to_disk(tmp_path / "two")
    datasets.enable_progress_bars()
    assert read_documents(tmp_path / "all") == ["train"]
    with pytest.raises(TextError, match="two has several splits: name one of test, more"):
        read_documents(tmp_path / "two")


def test_a_folder_of_parquet_is_read_as_a_data_set(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for name, text in (("train-00000-of-00002", "one"), ("train-00001-of-00002", "two"), ("test-00000-of-00001", "no")):
        write_table(folder / "data" / f"{name}.parquet", [{"text": text, "n": 1}])
    with pytest.raises(TextError, match=rf"it looks like a data set: give hf:{folder}"):
        text_files(folder)
    read = text_sources(f"hf:{folder}")
    assert list(read) == ["set"]
    assert list(read["set"].read()) == [("one", True), ("two", True)]
    assert list(text_sources(f"hf:{folder}::test")["set"].read()) == [("no", True)]
    with pytest.raises(TextError, match=r"has no split 'dev': name one of train, test"):
        list(text_sources(f"hf:{folder}::dev")["set"].read())


def test_names_of_data_sets():
    def parts(text):
        data_set = DataSet.parse(text)
        assert str(data_set) == text
        assert data_set.domain == "name"
        return data_set.name, data_set.config, data_set.split

    assert parts("hf:org/name") == ("org/name", None, None)
    assert parts("hf:org/name:de:test") == ("org/name", "de", "test")
    assert parts("hf:org/name::test") == ("org/name", None, "test")
    assert parts("hf:org/name@refs/pr/1:de") == ("org/name", "de", None)
    assert DataSet.parse("hf:org/name@v1").revision == "v1"
    for wrong in ("hf:", "hf: ", "hf::x", "hf:a:b:c:d", "hf:a@", "hf:@v1"):
        with pytest.raises(TextError, match="names no data set"):
            DataSet.parse(wrong)
    with pytest.raises(UnknownName, match="did you mean name"):
        text_sources("hf:org/name", ("names",))
    with pytest.raises(TextError, match="the domain name was not asked for"):
        text_sources("hf:org/name", ())
    with pytest.raises(TextError, match=r"the name b'n\\xe9' is not UTF-8"):
        text_sources("hf:org/n\udce9")


def test_nothing_is_written_into_a_data_set(tiny, tmp_path):
    with pytest.raises(InputError, match="is inside the text folder"):
        coterie.profile(tiny(), tmp_path / "out", text=f"hf:{tmp_path}:config")
    for texts in ({"text": f"hf:{tmp_path}", "test": "hf:a/b"}, {"text": "hf:a/b", "test": f"hf:{tmp_path}::test"}):
        with pytest.raises(InputError, match="is inside the text folder"):
            coterie.bench(tiny(), tmp_path / "bench", **texts)


def test_a_data_set_of_the_hub_is_pinned_to_a_commit_and_a_folder_to_its_place(tmp_path, monkeypatch):
    asked = []

    def dataset_info(self, name, *, revision):
        asked.append((name, revision))
        return SimpleNamespace(sha="c0ffee")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    assert str(DataSet.parse("hf:org/name@v1:de:test").pinned()) == "hf:org/name@c0ffee:de:test"
    assert asked == [("org/name", "v1")]
    (tmp_path / "at@home").mkdir()
    monkeypatch.chdir(tmp_path)
    assert str(DataSet.parse("hf:at@home::test").pinned()) == f"hf:{tmp_path.resolve()}/at@home::test"
    assert DataSet.parse("hf:at@home").domain == "at@home"


def test_a_data_set_that_cannot_be_reached_is_one_line():
    pytest.importorskip("datasets")
    [source] = text_sources("hf:nobody-at-all/nothing").values()
    with pytest.raises(TextError, match="hf:nobody-at-all/nothing cannot be read") as caught:
        list(source.read())
    assert "\n" not in str(caught.value)


def test_of_a_data_set_of_the_hub_the_begin_is_read(tmp_path, monkeypatch, caplog):
    pytest.importorskip("datasets")
    write_table(tmp_path / "a.parquet", [{"text": f"text number {number} " * 400} for number in range(200)])
    monkeypatch.setattr(sources, "HUB_TOKENS", 150_000)
    found = tokenize(tiny_tokenizer(), f"hf:{tmp_path}", seq_len=100)
    [count] = found.num_tokens.values()
    assert 150_000 <= count < 400_000
    assert "the first" in caplog.text


def test_long_tables_are_tokenized_in_little_memory(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    schema = arrow.schema([("text", arrow.string())])
    for folder, count in (("warm", 1), ("long", 60)):
        (tmp_path / folder).mkdir()
        with parquet.ParquetWriter(tmp_path / folder / "a.parquet", schema) as writer:
            for number in range(count):
                lines = [f"The cat that sat on the mat ran away. {number} {line}" * 8 for line in range(40)]
                writer.write_table(arrow.table({"text": lines}, schema=schema))
    tokenize(tiny_tokenizer(), tmp_path / "warm", seq_len=512, tokens=512)  # what the first use of everything takes
    device = pytest.importorskip("torch").device("cpu")
    with peak_memory(device, above=memory_in_use(device)) as peak:
        tokenize(tiny_tokenizer(), tmp_path / "long", seq_len=512, tokens=4096)
    assert peak.num_bytes < 120 * 2**20, f"{peak.num_bytes / 2**20:.0f} MiB"


# --- what cannot be read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "x"}\n{"n": ' + "9" * 5000 + "}\n", "line 2: a number in it has more digits"),
        ("a.jsonl", '{"text": "x"}\n{"text": "cut \\ud83d off"}\n', r"line 2: .*the lone surrogate \\ud83d"),
        ("a.jsonl", '{"text": "x"}\n{"text": "a\\u0000b"}\n', "line 2: its text holds the character NUL"),
        ("a.jsonl", '{"prompt": "x", "completion": "\\udc00"}', r"line 1: .*the lone surrogate \\udc00"),
        ("a.jsonl", '{"text": "x"}\n{"prompt": "x"}\n', r'line 2: expected .*; this has "prompt"'),
        ("a.jsonl", '{"text": "x"}\n{"prompt": "x", "completion": []}\n', "line 2: .* two strings, or two lists"),
        ("a.jsonl", '{"messages": "hi"}', r'line 1: "messages" should be a list of objects with "role"'),
        ("a.jsonl", '{"messages": []}', r'line 1: "messages" is empty'),
        ("a.jsonl", '{"messages": [{"content": "x"}]}', r'line 1: "messages" should be a list of objects with "role"'),
        ("a.jsonl", '{"messages": [{"role": "user"}], "tools": "{"}', 'line 1: "tools" is a string that is not JSON'),
        ("a.jsonl", '{"messages": [{"role": "user"}], "tools": [3]}', 'line 1: "tools" should be a list of objects'),
        ("a.txt", "fine\n" * 70_000 + "a\0b", "line 70001: its text holds the character NUL"),
        ("a.txt", b"fine\n" * 70_000 + b"caf\xe9 noir", "is not UTF-8 text: line 70001 holds the byte 0xe9"),
        ("a.txt", b"fine\n" * 9 + "\ud83d".encode(errors="surrogatepass"), "line 10 holds the byte 0xed"),
        ("a.txt", "text".encode("utf-16"), "is not UTF-8 text: line 1 begins as UTF-16 does; .* iconv -f UTF-16"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16-le"), "line 1 begins as UTF-16LE does"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16-be"), "line 1 begins as UTF-16BE does"),
        ("a.txt", "text".encode("utf-32"), "line 1 begins as UTF-32 does"),
        ("a.txt.gz", gzip.compress("text".encode("utf-16"), mtime=0), "line 1 begins as UTF-16 does"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_named_with_file_and_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TextError, match=f"(?s){name}.*{says}") as caught:
        read_documents(tmp_path / name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"question": ' + "9" * 5000 + "}", "line 1: a number in it has more digits"),
        ('{"question": "a\\ud83d", "answer": "b"}', "line 1: .*the lone surrogate"),
    ],
)
def test_questions_too(tmp_path, content, says):
    (tmp_path / "a.qa.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    with pytest.raises(TextError, match=rf"a\.qa\.jsonl\.gz, {says}"):
        read_questions(tmp_path)


def test_compressed_questions_are_questions(tmp_path):
    line = json.dumps({"question": "1 + 1 =", "answer": "2"})
    (tmp_path / "a.qa.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    assert [entry.answer for entry in read_questions(tmp_path)["a"]] == ["2"]
    (tmp_path / "a.qa.jsonl").write_text(line)
    with pytest.raises(TextError, match="two files of questions for the domain 'a'"):
        read_questions(tmp_path)


def test_names_that_are_not_utf8_are_refused_where_they_would_be_domains(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("x")
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    with open(odd + b".md", "w") as file:  # noqa: PTH123  # a name in bytes
        file.write("x")
    assert list(text_files(tmp_path)) == ["a"]
    log_unread(tmp_path)
    assert caplog.messages[0].startswith(r"caf\udce9.md is not read")
    with open(odd + b".txt", "w") as file:  # noqa: PTH123
        file.write("x")
    with pytest.raises(TextError, match=r"the name b'caf\\xe9.txt' is not UTF-8; rename it"):
        text_files(tmp_path)


def test_files_that_are_not_read_are_named_with_the_reason(tmp_path, caplog):
    for name in ("a.txt", "a.json", "b.jsonl", "b.json", "b.qa.jsonl", ".hidden.txt", "d.csv", "e.parquet.gz"):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    assert list(text_files(tmp_path)) == ["a", "b"], "hidden files are no domains"
    with caplog.at_level(logging.WARNING):
        log_unread(tmp_path)
    formats = "text is *.txt, *.jsonl (either also as .gz) or *.parquet"
    assert caplog.messages == [
        f"a.json is not read: {formats}",
        f"d.csv is not read: {formats}",
        f"e.parquet.gz is not read: {formats}",
        "folder is not read: it is a folder; put its files beside the others",
        "gone.txt is not read: it is a link that leads nowhere",
        "pipe.txt is not read: it is no regular file",
    ]
    caplog.clear()
    for number in range(20):
        (tmp_path / f"x{number}.csv").write_text("x")
    log_unread(tmp_path)
    assert len(caplog.messages) == 11
    assert caplog.messages[-1] == "16 more files and folders there are not read"


def test_a_folder_without_text_says_what_is_there(tmp_path):
    for name in ("a.csv", "b.csv", "c.csv", "d.csv"):
        (tmp_path / name).write_text("x")
    with pytest.raises(TextError, match=r"put one file a domain there; there is a\.csv \(text is .*, and 1 more"):
        text_files(tmp_path)
    with pytest.raises(TextError, match=r"no/such is not a folder; .*or a data set: hf:no/such"):
        text_files("no/such")
