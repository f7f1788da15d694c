"""Text is tokenized once, piece by piece, and comes out as if it had been tokenized as a whole."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from coterie.errors import InputError, TextError
from coterie.evaluate.speed import memory_in_use, peak_memory
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.profile import documents as documents_module
from coterie.profile import sources, token_file
from coterie.profile.calibration import tokenize
from coterie.profile.documents import DOCUMENT_SEPARATOR, document_pieces, documents, read_documents
from coterie.profile.text import CalibrationText, TextSettings
from coterie.testing import tiny_tokenizer

REFERENCE = Path(__file__).parents[2] / "reference" / "model"
PROSE = REFERENCE.parent / "text" / "calibration" / "english_prose.txt"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("texts")


# --- documents in pieces ------------------------------------------------------------------------------------------

parts = st.sampled_from(
    ["\n", "a", " ", DOCUMENT_SEPARATOR, f"\n{DOCUMENT_SEPARATOR}\n", DOCUMENT_SEPARATOR[:7], "\r", "é"]
)


@given(content=st.lists(parts, max_size=12).map("".join), size=st.integers(1, 40))
@example(content=f"a\n{DOCUMENT_SEPARATOR}b\n{DOCUMENT_SEPARATOR}\nc", size=15)
@example(content=f"\n{DOCUMENT_SEPARATOR}x", size=14)
@example(content=f"xxxxxxxxxxxxxxxxxxx{DOCUMENT_SEPARATOR}\nb", size=19)
@example(content=f"a{DOCUMENT_SEPARATOR}{DOCUMENT_SEPARATOR}", size=1)
def test_documents_do_not_depend_on_where_pieces_end(folder, content, size):
    file = folder / "a.txt"
    file.write_bytes(content.encode())
    whole = content.replace("\r\n", "\n").replace("\r", "\n")
    expected = re.split(rf"\n?^{re.escape(DOCUMENT_SEPARATOR)}$\n?", whole, flags=re.MULTILINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "READ_CHARACTERS", size)
        pieces = list(document_pieces(file))
    assert max(len(text) for text, _ in pieces) <= size + len(DOCUMENT_SEPARATOR) + 2
    assert list(documents(pieces)) == [document for document in expected if document.strip()]
    assert pieces[-1][1], "the last document ends"


# --- tokens in pieces ---------------------------------------------------------------------------------------------


def trained(model, trainer, *, normalizer=None, pre_tokenizer=None):
    """Return a tokenizer of some 600 tokens made from our own text."""
    inner = Tokenizer(model)
    if normalizer is not None:
        inner.normalizer = normalizer
    if pre_tokenizer is not None:
        inner.pre_tokenizer = pre_tokenizer
    lines = read_documents(PROSE)[:25]
    inner.train_from_iterator(lines, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def tokenizers(bundled):
    """Kinds of tokenizers: words first or none, with a space put before a text, and the likeliest cut of all."""
    special = ["<unk>", "<end>"]
    bpe = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    unigram = trainers.UnigramTrainer(vocab_size=600, special_tokens=special, unk_token="<unk>", show_progress=False)
    like_llama = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return {
        "bytes": tiny_tokenizer(),
        "reference": load_tokenizer(REFERENCE),
        "without words": trained(models.BPE(unk_token="<unk>"), bpe, normalizer=like_llama),
        "unigram": trained(models.Unigram(), unigram, pre_tokenizer=pre_tokenizers.Metaspace()),
    }


KINDS = ["bytes", "reference", "without words", "unigram"]


def ids_of(tokenizer, texts):
    """Tokenize documents as a whole, one by one."""
    ids = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return ids


def pieces_of(texts, sizes):
    """Cut documents into pieces of the given sizes in turns."""
    size = itertools.cycle(sizes)
    for text in texts:
        while len(text) > (here := next(size)):
            yield text[:here], False
            text = text[here:]
        yield text, True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[700], [10**9], [3000, 1, 500]])
def test_long_documents_have_the_tokens_of_the_whole(tokenizers, monkeypatch, kind, sizes):
    monkeypatch.setattr(token_file, "WINDOW", 1500)
    monkeypatch.setattr(token_file, "OVERLAP", 400)
    tokenizer = tokenizers[kind]
    whole = "\n\n".join(read_documents(PROSE))[:40_000]
    texts = [whole[:9000], "short", whole[9000:], "caf\u00e9 \U0001f600 " * 700, "end"]
    windows = []
    real = token_file._LongDocument.extend
    monkeypatch.setattr(
        token_file._LongDocument, "extend", lambda self, text: windows.append(len(text)) or real(self, text)
    )
    found = [token for ids in token_file.encoded(tokenizer, pieces_of(texts, sizes)) for token in ids]
    assert found == ids_of(tokenizer, texts)
    assert len(windows) > 10
    assert max(windows) <= 1500


@pytest.mark.parametrize("kind", KINDS)
def test_where_windows_never_agree_they_become_one(tokenizers, monkeypatch, kind):
    monkeypatch.setattr(token_file, "WINDOW", 1000)
    monkeypatch.setattr(token_file, "OVERLAP", 100)
    texts = ["a" * 5003, "  " * 700 + "b" * 2100]
    found = [token for ids in token_file.encoded(tokenizers[kind], pieces_of(texts, [300])) for token in ids]
    assert found == ids_of(tokenizers[kind], texts)


def test_blank_documents_have_no_tokens_however_long(monkeypatch):
    monkeypatch.setattr(token_file, "WINDOW", 50)
    texts = [" " * 400, "one", "\n", " " * 200 + "two"]
    found = [token for ids in token_file.encoded(tiny_tokenizer(), pieces_of(texts, [30])) for token in ids]
    assert found == ids_of(tiny_tokenizer(), [text for text in texts if text.strip()])


# --- drawn more than once -----------------------------------------------------------------------------------------


def test_a_text_is_tokenized_once_and_drawn_from_as_if_each_time_anew(tiny, text, monkeypatch):
    read, draws = [], (None, 1280, 320, 640)
    tokenizer = load_tokenizer(tiny())
    anew = [tokenize(tokenizer, text, seq_len=32, tokens=tokens or 640, seed=3) for tokens in draws]
    real = sources.document_pieces
    monkeypatch.setattr(sources, "document_pieces", lambda file: read.append(file.name) or real(file))
    settings = TextSettings(source=text, tokens=640, seq_len=32, seed=3)
    calibration = CalibrationText(Checkpoint.open(tiny()), settings)
    assert read == []
    for tokens, expected in zip(draws, anew, strict=True):
        drawn = calibration.draw(tokens)
        assert drawn.digest == expected.digest
        assert drawn.domains == expected.domains
        assert all(torch.equal(drawn.sequences[name], rows) for name, rows in expected.sequences.items())
    assert read == ["code.txt", "prose.txt"]


def test_weights_share_out_every_draw(tiny, text):
    settings = TextSettings(source=text, tokens=640, seq_len=32, weights={"prose": 3, "code": 1})
    calibration = CalibrationText(Checkpoint.open(tiny()), settings)
    assert calibration.draw().num_tokens == {"code": 160, "prose": 480}
    assert calibration.draw(1280).num_tokens == {"code": 320, "prose": 960}


def test_what_cannot_be_is_refused_before_text_is_read(tiny, text, monkeypatch):
    monkeypatch.setattr(sources, "document_pieces", lambda file: pytest.fail(f"{file} is read"))
    with pytest.raises(InputError, match="text that the model writes has no domains"):
        CalibrationText(Checkpoint.open(tiny()), TextSettings(source="self", tokens=1, seq_len=8, domains=("a",)))
    with pytest.raises(TextError, match="a sequence of 1 tokens predicts nothing"):
        CalibrationText(Checkpoint.open(tiny()), TextSettings(source=text, tokens=64, seq_len=1)).draw()


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", ["a.jsonl", pytest.param("a.txt", marks=pytest.mark.slow)])
def test_long_text_is_tokenized_in_little_memory(tmp_path, name):
    """A million tokens, which the tokenizer needs 200 bytes each for, and Python 36."""
    tokenizer, line, count = tiny_tokenizer(), "The cat that sat on the mat ran away. ", 25_000
    tokenize_folder = tmp_path / "text"
    tokenize_folder.mkdir()
    with (tokenize_folder / name).open("w") as file:
        for number in range(count):  # one document, or many
            file.write(f"{line}{number}\n" if name == "a.txt" else f'{{"text": "{line}{number}"}}\n')
    tokenize(tokenizer, tokenize_folder, seq_len=512, tokens=512 * 3)  # what the first use of everything takes
    with peak_memory(CPU, above=memory_in_use(CPU)) as peak:
        drawn = tokenize(tokenizer, tokenize_folder, seq_len=512, tokens=4096)
    assert drawn.num_tokens == {"a": 4096}
    assert peak.num_bytes < 120 * 2**20, f"{peak.num_bytes / 2**20:.0f} MiB"


def test_tokens_go_beside_an_output_whose_folder_is_made_later(tmp_path):
    made_later = tmp_path / "a" / "b"
    file = token_file.TokenFile(tiny_tokenizer(), scratch=made_later)
    file.add("prose", "here", [("some words", True)])
    assert file.domains == ("prose",)
    assert list(tmp_path.iterdir()) == [], "it has no name, and no folder was made for it"
