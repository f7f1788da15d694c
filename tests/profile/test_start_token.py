"""Text begins as the tokenizer has it: every sequence with its start token, wherever text is measured or trained on."""

import hashlib
import itertools
import json
import math
import shutil
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

import coterie
from coterie.errors import InputError, TextError
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.model.stream.stream import Stream
from coterie.profile.calibration import tokenize
from coterie.profile.documents import document_pieces, read_documents
from coterie.profile.information import measure_information
from coterie.profile.self_text import Writing, write_documents
from coterie.profile.text import CalibrationText, TextSettings
from coterie.profile.token_file import encoded, start_ids
from coterie.testing import END_OF_TEXT_ID, tiny_tokenizer

BOS, SECOND = 260, 261
TOKENS = {"<|endoftext|>": END_OF_TEXT_ID, "<s>": BOS, "<sop>": SECOND}


def with_template(template):
    """Return a tokenizer of bytes that adds tokens to a text: "<s> $A <|endoftext|>"."""
    inner = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    inner.add_tokens([f"<unused{number}>" for number in range(257, BOS)])
    inner.add_special_tokens(["<s>", "<sop>"])
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(TOKENS.items()))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>", bos_token="<s>", clean_up_tokenization_spaces=False
    )


class Slow(PreTrainedTokenizer):
    """A tokenizer of bytes in Python that adds tokens by its own code."""

    def __init__(self, **options):
        super().__init__(bos_token="<s>", eos_token="</s>", **options)

    @property
    def vocab_size(self):
        return 256

    def get_vocab(self):
        return {chr(number): number for number in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text, **options):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)

    def build_inputs_with_special_tokens(self, first, second=None):
        return [self.bos_token_id, *first, self.eos_token_id]


@pytest.fixture(scope="module")
def starting(tiny, tmp_path_factory):
    """Return a model whose tokenizer puts <s> before a text and the end of text behind it."""
    folder = shutil.copytree(tiny(), tmp_path_factory.mktemp("starting") / "model")
    with_template("<s> $A <|endoftext|>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("template", "start"),
    [
        ("$A", []),
        ("$A <|endoftext|>", []),
        ("<s> $A", [BOS]),
        ("<|endoftext|> $A <|endoftext|>", [END_OF_TEXT_ID]),
        ("<s> <sop> $A <|endoftext|>", [BOS, SECOND]),
    ],
)
def test_the_start_is_what_stands_before_a_text(template, start):
    assert start_ids(with_template(template)) == start


def test_the_start_of_other_kinds_of_tokenizers():
    assert start_ids(tiny_tokenizer()) == []
    bare = tiny_tokenizer()
    bare.bos_token = bare.eos_token = None
    assert start_ids(bare) == []
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3} | {letter: 4 + n for n, letter in enumerate("Sometx.")}
    for added, start in ((True, [1]), (False, [])):
        llama = LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=added, add_eos_token=added)
        assert start_ids(llama) == start
    slow = Slow()
    assert start_ids(slow) == [slow.bos_token_id]


def test_a_tokenizer_that_does_not_keep_to_its_text_is_refused():
    def odd(text, *, add_special_tokens):
        return {"input_ids": [1, 2, 3] if add_special_tokens else [4, 5]}

    with pytest.raises(InputError, match=r"into \[4, 5\] and, with its special tokens, into \[1, 2, 3\]"):
        start_ids(odd)


@pytest.mark.parametrize("template", ["<s> $A", "<s> <sop> $A <|endoftext|>"])
@pytest.mark.parametrize("tokens", [None, 640])
def test_every_sequence_begins_with_the_start_and_goes_on_with_text(text, template, tokens):
    tokenizer = with_template(template)
    start = start_ids(tokenizer)
    found = tokenize(tokenizer, text, seq_len=32, tokens=tokens)
    plain = tokenize(with_template("$A"), text, seq_len=32, tokens=tokens)
    assert (found.num_start, plain.num_start) == (len(start), 0)
    assert found.seq_len == plain.seq_len == 32
    assert found.digest != plain.digest
    length = 32 - len(start)
    for domain, rows in found.sequences.items():
        ids = list(itertools.chain.from_iterable(encoded(tokenizer, document_pieces(text / f"{domain}.txt"))))
        pieces = [ids[place : place + length] for place in range(0, len(ids) - length + 1, length)]
        assert rows.dtype == torch.int64
        assert rows.is_contiguous()
        assert all(row[: len(start)] == start for row in rows.tolist())
        drawn = [row[len(start) :] for row in rows.tolist()]
        assert all(drawn.count(piece) <= pieces.count(piece) for piece in drawn)
        assert len(rows) == (len(pieces) if tokens is None else 640 / 2 / 32)
        assert found.num_tokens[domain] == len(rows) * 32
    if tokens is not None:
        assert found.num_tokens == plain.num_tokens, "start tokens count as tokens"


def test_without_a_start_token_sequences_and_digest_are_what_they_were(text):
    tokenizer, seq_len, seed, count = tiny_tokenizer(), 32, 3, 10
    digest = hashlib.sha256(str(seq_len).encode())
    for domain in ("code", "prose"):
        ids = []
        for document in read_documents(text / f"{domain}.txt"):
            ids += [*document.encode(), END_OF_TEXT_ID]
        numbers = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        symbols = bytes_to_symbols()
        ids = [number if number == END_OF_TEXT_ID else numbers[symbols[number]] for number in ids]
        rows = [ids[place : place + seq_len] for place in range(0, len(ids) - seq_len + 1, seq_len)]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        digest.update(domain.encode())
        for number in order[:count]:
            for token in rows[number]:
                digest.update(token.to_bytes(8, "little"))
    found = tokenize(tokenizer, text, seq_len=seq_len, tokens=2 * count * seq_len, seed=seed)
    assert found.digest == digest.hexdigest()
    assert found.num_start == 0


def bytes_to_symbols():
    """Return the printable symbol that stands for each byte, as byte-level tokenizers have had it since GPT-2."""
    decoder = Tokenizer(models.BPE(vocab={}, merges=[]))
    decoder.decoder = decoders.ByteLevel()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [number for number in range(256) if number not in printable]
    return {number: chr(number) for number in printable} | {n: chr(256 + place) for place, n in enumerate(others)}


def test_text_that_is_too_short_is_refused_with_numbers(tmp_path):
    (tmp_path / "a.txt").write_text("seven!!")  # and its end: 8 tokens
    tokenizer = with_template("<s> $A")
    assert tokenize(tokenizer, tmp_path, seq_len=9).num_tokens == {"a": 9}
    with pytest.raises(TextError, match=r"has 8 tokens, fewer than the 9 of a sequence of 10; add text or lower"):
        tokenize(tokenizer, tmp_path, seq_len=10)
    assert tokenize(tokenizer, tmp_path, seq_len=2).num_tokens == {"a": 16}
    with pytest.raises(TextError, match=r"no text beside the 2 that .* use --seq-len 3 or more"):
        tokenize(with_template("<s> <sop> $A"), tmp_path, seq_len=2)


def test_a_profile_is_measured_on_sequences_that_begin_with_it(starting, tiny, text, tmp_path):
    settings = {"text": text, "tokens": 512, "seq_len": 64, "sample_tokens": 64}
    profile, plain = coterie.profile(starting, **settings), coterie.profile(tiny(), **settings)
    assert profile.num_tokens == plain.num_tokens == (256, 256)
    assert profile.text_digest != plain.text_digest
    top_k = profile.layers[0].top_k
    assert int(profile.sum(0, "usage").sum()) == 512 * top_k
    assert not torch.equal(profile.sum(0, "usage"), plain.sum(0, "usage"))


@pytest.mark.long
def test_results_are_trained_on_sequences_that_begin_with_it(starting, text, tmp_path, monkeypatch):
    seen, draw = [], CalibrationText.draw

    def note(*arguments, **options):
        seen.append(draw(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(CalibrationText, "draw", note)
    coterie.compress(
        starting, tmp_path / "out", keep=0.5, recipe="coterie", text=text, tokens=512, seq_len=64, sample_tokens=64,
        train_tokens=512,
    )  # fmt: skip
    assert len(seen) == 2, "to be measured, and to be trained on"
    for token_set in seen:
        assert all(set(rows[:, 0].tolist()) == {BOS} for rows in token_set.sequences.values())


def slow_perplexity(path, text, seq_len):
    """Return (perplexity, predicted tokens) by domain, and over all: one sequence and one token at a time, float64."""
    model, tokenizer = load_model(path, dtype=torch.float64), load_tokenizer(path)
    model.set_experts_implementation("eager")
    losses = {}
    for domain in ("code", "prose"):
        ids = list(itertools.chain.from_iterable(encoded(tokenizer, document_pieces(text / f"{domain}.txt"))))
        losses[domain] = []
        for place in range(0, len(ids) - seq_len + 2, seq_len - 1):
            row = [BOS, *ids[place : place + seq_len - 1]]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row])).logits[0].double()
            for position in range(seq_len - 1):
                losses[domain].append(-float(logits[position].log_softmax(-1)[row[position + 1]]))
    losses["all"] = losses["code"] + losses["prose"]
    return {name: (math.exp(sum(values) / len(values)), len(values)) for name, values in losses.items()}


@pytest.mark.long
def test_perplexity_is_that_of_the_text_after_the_start_token(starting, tiny, text):
    [card] = coterie.evaluate(starting, text=text, seq_len=128, questions=0)
    expected = slow_perplexity(starting, text, 128)
    for name, scores in {**card.domains, "all": card.overall}.items():
        assert scores["perplexity"] == pytest.approx(expected[name][0], rel=1e-5)
        assert scores["tokens"] == expected[name][1]
    [plain] = coterie.evaluate(tiny(), text=text, seq_len=128, questions=0)
    assert card.overall["perplexity"] != pytest.approx(plain.overall["perplexity"], rel=1e-5)


def test_n_grams_and_entropy_are_those_of_the_text(starting, text):
    found = tokenize(load_tokenizer(starting), text, seq_len=24, tokens=480)
    with Stream(Checkpoint.open(starting)) as stream:
        measured = {source.domain: source for source in measure_information(stream, found)}
    for domain, rows in found.sequences.items():
        texts = [row[1:] for row in rows.tolist()]
        pairs = [pair for row in texts for pair in itertools.pairwise(row)]
        counts = Counter(token for row in texts for token in row)
        total = sum(counts.values())
        assert measured[domain].diversity == pytest.approx(len(set(pairs)) / len(pairs))
        entropy = -sum(count / total * math.log(count / total) for count in counts.values())
        assert measured[domain].entropy == pytest.approx(entropy)
    short = tokenize(load_tokenizer(starting), text, seq_len=4, tokens=64)
    with Stream(Checkpoint.open(starting)) as stream, pytest.raises(TextError, match="use --seq-len 5 or more"):
        measure_information(stream, short)


@pytest.mark.parametrize(("template", "start"), [("<s> $A", [BOS]), ("<s> <sop> $A", [BOS, SECOND]), ("$A", [BOS])])
def test_what_the_model_writes_starts_after_it(starting, monkeypatch, template, start):
    model = load_model(starting)
    written = []

    def note(generate=model.generate, **options):
        ids = generate(**options)
        written.extend(ids.tolist())
        return ids

    monkeypatch.setattr(model, "generate", note)
    tokenizer = with_template(template)
    documents = write_documents(model, tokenizer, Writing(tokens=40, max_length=9))
    assert all(ids[: len(start)] == start and len(ids) == 9 for ids in written)
    texts = [tokenizer.decode(ids[len(start) :], skip_special_tokens=True) for ids in written]
    assert [text.rstrip("\ufffd") for text in texts] == [document.rstrip("\ufffd") for document in documents]


def test_the_model_s_own_text_is_measured_after_its_start_token(starting):
    settings = TextSettings(source="self", tokens=64, seq_len=16)
    found = CalibrationText(Checkpoint.open(starting), settings).draw()
    assert found.num_tokens == {"self": 64}
    assert set(found.sequences["self"][:, 0].tolist()) == {BOS}


def test_the_template_of_a_checkpoint_is_read(starting):
    content = json.loads((starting / "tokenizer.json").read_text(encoding="utf-8"))
    assert content["post_processor"]["type"] == "TemplateProcessing"
    assert load_tokenizer(starting)("ab")["input_ids"][0] == BOS
