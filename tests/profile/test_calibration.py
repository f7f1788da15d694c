"""From text to tokens: documents, domains, the draw of sequences, and every way in which text can be wrong."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coterie.errors import TextError, UnknownName
from coterie.profile.calibration import TokenSet, tokenize
from coterie.profile.documents import DOCUMENT_SEPARATOR, read_documents, text_files
from coterie.testing import END_OF_TEXT_ID, tiny_text, tiny_tokenizer

SEPARATOR = f"\n{DOCUMENT_SEPARATOR}\n"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("documents")


def ids_of(tokenizer, *documents):
    ids = []
    for document in documents:
        ids += [*tokenizer(document)["input_ids"], END_OF_TEXT_ID]
    return ids


# --- documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("one", ["one"]),
        ("one\ntwo\n", ["one\ntwo\n"]),
        (f"one{SEPARATOR}two{SEPARATOR}three\n", ["one", "two", "three\n"]),
        (f"one{SEPARATOR}", ["one"]),
        (f"one\n{DOCUMENT_SEPARATOR}", ["one"]),
        (f"{DOCUMENT_SEPARATOR}\none", ["one"]),
        (f"one{SEPARATOR}{DOCUMENT_SEPARATOR}\ntwo", ["one", "two"]),
        (f"one{SEPARATOR} \n\t{SEPARATOR}two", ["one", "two"]),
        (f"one\r\n{DOCUMENT_SEPARATOR}\r\ntwo", ["one", "two"]),
        (
            f"one {DOCUMENT_SEPARATOR} still one\n {DOCUMENT_SEPARATOR}",
            [f"one {DOCUMENT_SEPARATOR} still one\n {DOCUMENT_SEPARATOR}"],
        ),
        ("  indented\n\n\nspaced  \n", ["  indented\n\n\nspaced  \n"]),
    ],
)
def test_documents_stand_between_lines_that_are_the_separator(tmp_path, content, documents):
    file = tmp_path / "a.txt"
    file.write_bytes(content.encode())
    assert read_documents(file) == documents


any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20).filter(
    str.strip
)


@given(documents=st.lists(any_text.filter(lambda text: "\r" not in text), min_size=1, max_size=4))
def test_any_documents_come_back_from_txt(folder, documents):
    file = folder / "a.txt"
    file.write_text(SEPARATOR.join(documents), encoding="utf-8", newline="")
    assert read_documents(file) == documents


@given(documents=st.lists(any_text, min_size=1, max_size=4), ascii_only=st.booleans())
@example(documents=["a\u2028b\u2029c\x85d\x0be\x1cf"], ascii_only=False)
def test_any_documents_come_back_from_jsonl(folder, documents, ascii_only):
    # Text may hold raw U+2028 or U+0085: lines for str.splitlines, but not for JSON lines.
    file = folder / "a.jsonl"
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=ascii_only) for text in documents]
    file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert read_documents(file) == documents


@pytest.mark.parametrize(
    "line",
    ["{", '"text"', "[1]", "3", "null", '{"txt": "a"}', '{"text": null}', '{"text": 3}', '{"text": ["a"]}', "[" * 9999],
)
def test_a_bad_line_of_jsonl_is_named_by_number(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + '\n{"text": "fine"}\n')
    with pytest.raises(TextError, match=r'a\.jsonl, line 3: expected a JSON object with a "text" field'):
        read_documents(file)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\t\n", "\n"])
def test_empty_text_is_refused(tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(TextError, match=rf"{name} is empty"):
        read_documents(file)


def test_only_separators_and_only_blank_documents_are_empty_too(tmp_path):
    (tmp_path / "a.txt").write_text(SEPARATOR * 3)
    (tmp_path / "a.jsonl").write_text('{"text": "  "}\n')
    for name in ("a.txt", "a.jsonl"):
        with pytest.raises(TextError, match="is empty"):
            read_documents(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_is_not_utf8_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes("naïve".encode("latin-1"))
    with pytest.raises(TextError, match=rf"{name} is not UTF-8 text"):
        read_documents(tmp_path / name)


# --- files --------------------------------------------------------------------------------------------------------


def test_one_file_is_one_domain_and_questions_are_none(tmp_path):
    names = ["b.txt", "a-b.txt", "a.jsonl", "b.qa.jsonl", "notes.md", ".hidden", "c.TXT.bak"]
    for name in names:
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.txt").mkdir()
    files = text_files(tmp_path)
    assert {domain: file.name for domain, file in files.items()} == {"a": "a.jsonl", "a-b": "a-b.txt", "b": "b.txt"}
    assert list(files) == ["a", "a-b", "b"], "sorted by domain"


def test_domains_can_be_chosen(text):
    assert list(text_files(text)) == ["code", "prose"]
    assert list(text_files(text, ("prose",))) == ["prose"]
    assert list(text_files(text, ("prose", "code", "prose"))) == ["code", "prose"]


def test_an_unknown_domain_gets_the_nearest(text):
    with pytest.raises(UnknownName, match="unknown domain 'pros'; did you mean prose") as caught:
        text_files(text, ("code", "pros"))
    assert caught.value.nearest == ["prose"]


def test_no_domain_at_all_is_refused(text):
    with pytest.raises(TextError, match="none of the domains code, prose was asked for"):
        text_files(text, ())


def test_two_files_for_one_domain_are_refused(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text("x")
    with pytest.raises(TextError, match=r"domain 'a' has two files: a\.jsonl and a\.txt"):
        text_files(tmp_path)


def test_folders_without_text_are_refused(tmp_path, text):
    with pytest.raises(TextError, match="nowhere is not a folder"):
        text_files(tmp_path / "nowhere")
    says = r"prose\.txt is not a folder but a file; --text takes a folder .*: it is in .*, give that one"
    with pytest.raises(TextError, match=says):
        text_files(text / "prose.txt")
    (tmp_path / "a.qa.jsonl").write_text("{}")
    with pytest.raises(TextError, match=r"holds no \*\.txt and no \*\.jsonl"):
        text_files(tmp_path)


# --- sequences ----------------------------------------------------------------------------------------------------


def test_documents_are_joined_with_the_end_of_text_and_cut(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(f"abc{SEPARATOR}defgh")
    (tmp_path / "b.jsonl").write_text('{"text": "abc"}\n{"text": "defgh"}\n')
    found = tokenize(tokenizer, tmp_path, seq_len=4)
    expected = torch.tensor(ids_of(tokenizer, "abc", "defgh"))  # 10 tokens: two sequences, and two tokens left over
    for domain in ("a", "b"):
        rows = found.sequences[domain]
        assert rows.dtype == torch.int64
        assert sorted(rows.tolist()) == sorted([expected[:4].tolist(), expected[4:8].tolist()])
    assert found.domains == ("a", "b")
    assert found.num_tokens == {"a": 8, "b": 8}
    assert found.seq_len == 4


def test_a_tokenizer_without_an_end_of_text_token_just_joins(tmp_path):
    bare = tiny_tokenizer()
    bare.eos_token = None
    (tmp_path / "a.txt").write_text(f"abc{SEPARATOR}defgh")
    found = tokenize(bare, tmp_path, seq_len=8)
    assert found.sequences["a"].tolist() == [bare("abcdefgh")["input_ids"]]


def test_all_of_the_text_is_used_when_no_number_is_asked_for(text, tokenizer):
    found = tokenize(tokenizer, text, seq_len=64)
    for domain in ("code", "prose"):
        ids = ids_of(tokenizer, *read_documents(text / f"{domain}.txt"))
        rows = [ids[start : start + 64] for start in range(0, len(ids) - 63, 64)]
        assert sorted(found.sequences[domain].tolist()) == sorted(rows), "every sequence once"


@pytest.fixture(scope="module")
def short_text(tmp_path_factory):
    return tiny_text(tmp_path_factory.mktemp("short"), documents=1)


@given(small=st.integers(1, 3000), large=st.integers(1, 3000), seq_len=st.integers(2, 99), seed=st.integers(0, 2**32))
@settings(max_examples=20)
def test_more_tokens_contain_fewer_and_domains_share_equally(short_text, tokenizer, small, large, seq_len, seed):
    small, large = sorted((small, large))
    few, many = (tokenize(tokenizer, short_text, seq_len=seq_len, tokens=n, seed=seed) for n in (small, large))
    for wanted, found in ((small, few), (large, many)):
        counts = {domain: len(rows) for domain, rows in found.sequences.items()}
        assert counts["code"] == counts["prose"] == max(1, round(wanted / 2 / seq_len))
    for domain, rows in few.sequences.items():
        assert torch.equal(many.sequences[domain][: len(rows)], rows)


def test_the_seed_decides_the_draw(text, tokenizer):
    first, again, other = (tokenize(tokenizer, text, seq_len=32, tokens=640, seed=seed) for seed in (3, 3, 4))
    assert first.digest == again.digest
    assert all(torch.equal(first.sequences[domain], again.sequences[domain]) for domain in first.domains)
    assert other.digest != first.digest
    assert not torch.equal(first.sequences["prose"], other.sequences["prose"])


def test_the_digest_follows_text_length_domain_and_order(text, tmp_path, tokenizer):
    def digest(folder=text, **options):
        return tokenize(tokenizer, folder, **{"seq_len": 32, "tokens": 640} | options).digest

    shutil.copytree(text, tmp_path / "same")
    assert digest(tmp_path / "same") == digest()
    shutil.copytree(text, tmp_path / "renamed")
    (tmp_path / "renamed" / "prose.txt").rename(tmp_path / "renamed" / "prosa.txt")
    shutil.copytree(text, tmp_path / "changed")
    changed = (text / "prose.txt").read_text().replace("a", "A")
    (tmp_path / "changed" / "prose.txt").write_text(changed)
    others = {
        digest(seq_len=64), digest(tokens=704), digest(seed=1), digest(domains=("prose",)),
        digest(tmp_path / "renamed"), digest(tmp_path / "changed"),
    }  # fmt: skip
    assert len(others | {digest()}) == 7
    one, two = (tokenize(tokenizer, text, seq_len=length, tokens=1280).digest for length in (32, 64))
    assert one != two


def test_less_text_than_asked_for_is_all_of_it_and_a_warning(text, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        found = tokenize(tokenizer, text, seq_len=64, tokens=10**6)
    everything = tokenize(tokenizer, text, seq_len=64)
    assert found.num_tokens == everything.num_tokens
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert (
        messages[0]
        == f"domain code has {everything.num_tokens['code']} of the {round(10**6 / 128) * 64} tokens asked for"
    )


def test_text_shorter_than_a_sequence_is_refused_with_numbers(tmp_path, text, tokenizer):
    shutil.copytree(text, tmp_path / "text")
    (tmp_path / "text" / "short.txt").write_text("seven!!")
    with pytest.raises(TextError, match=r"short\.txt has 8 tokens, fewer than one sequence of 9; add text or lower"):
        tokenize(tokenizer, tmp_path / "text", seq_len=9)
    assert tokenize(tokenizer, tmp_path / "text", seq_len=8).num_tokens["short"] == 8


@pytest.mark.parametrize("seq_len", [1, 0, -5])
def test_sequences_that_predict_nothing_are_refused(text, tokenizer, seq_len):
    with pytest.raises(TextError, match=f"a sequence of {seq_len} tokens predicts nothing"):
        tokenize(tokenizer, text, seq_len=seq_len)


def test_documents_longer_than_the_context_make_no_noise(tmp_path, recwarn, caplog):
    short = tiny_tokenizer()
    short.model_max_length = 16
    (tmp_path / "a.txt").write_text("x" * 100)
    assert tokenize(short, tmp_path, seq_len=50).num_tokens == {"a": 100}
    assert not recwarn.list
    assert not caplog.records


@given(counts=st.lists(st.integers(1, 7), min_size=1, max_size=3), batch_size=st.integers(1, 8))
def test_batches_hold_one_domain_each_and_everything_once(counts, batch_size):
    rows = {f"d{index}": torch.randint(9, (count, 5)) for index, count in enumerate(counts)}
    token_set = TokenSet(sequences=rows, seq_len=5, digest="")
    batches = list(token_set.batches(batch_size))
    assert [domain for domain, _ in batches] == sorted(domain for domain, _ in batches)
    assert all(1 <= len(ids) <= batch_size for _, ids in batches)
    for index, ids in enumerate(rows.values()):
        assert torch.equal(torch.cat([batch for domain, batch in batches if domain == index]), ids)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "line"}\n', encoding="utf-8-sig")
    assert read_documents(tmp_path / "a.txt") == ["plain"]
    assert read_documents(tmp_path / "b.jsonl") == ["line"]
