"""Tokenizers in a real llama.cpp: the same tokens as in transformers, or a refusal."""

import json
import re
import shutil

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from coterie import export
from coterie.errors import InputError
from coterie.model.disk.gguf.tokens import ALIASES, BYTE_LEVEL
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.testing import tiny_checkpoint
from export_cases import rewritten
from llama_runtime import llama, token_ids

#: Digits, code, contractions, breaks, scripts, emoji, spaces of all kinds.
TEXTS = [
    "Hello world, it's 2024! 3.14159 and 1000000; I'VE we'll they'Re x'y 'tis",
    "def f(x, *, y=None):\n\treturn {k: v for k, v in x.items() if v >= 0x1F}  # 100%\r\n\r\n\n    pass\n",
    "größer Übermut, naïve café; Привет, мир 123; 你好，世界 12345 こんにちは カタカナ; हिन्दी पाठ; שלום ١٢٣ ½ ²",
    "🚀🌫️ 👩‍👩‍👧 emoji ✅  two  spaces   three\t\ttabs \u00a0nbsp\u3000wide",
    "   leading\n\n   \n trailing   ",
    "camelCaseWords HTTPServer ALLCAPS iPhone15Pro a1b22c333d4444",
    '!!! ??? ... --- === /*comment*/ //path/to/file.txt a/b\\c <tag attr="v">&amp;</tag> $x_1 + (y)[z]',
    "",
]

CORPUS = [*TEXTS, *(f"{word} {word}s {word.upper()} {number} {number}th\n" for number, word in enumerate(
    re.findall(r"\w+", " ".join(TEXTS)) * 3
))]  # fmt: skip


def byte_level(steps, **options):
    """Return a tokenizer that cuts text up in some steps, trained on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    split = [
        pre_tokenizers.Digits(individual_digits=True)
        if step == "digits"
        else pre_tokenizers.Split(Regex(step), "isolated")
        for step in steps
        if step != "words"
    ]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="words" in steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, last])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>", "<|user|>"],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer, bos_token="<|end|>", eos_token="<|end|>", **options)


def pieces(scheme):
    """Return a tokenizer of pieces with bytes for what they do not have, as SentencePiece makes them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, show_progress=False))
    special = ["<unk>", "<s>", "</s>"]
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    # Letters that come late have no piece, and fall back to bytes.
    common = [word for word in learned if all(ord(letter) < 0x2600 for letter in word)]
    words = sorted(common, key=lambda word: len(word) == 1)
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    halves = (
        (vocabulary[w], (w[:cut], w[cut:])) for w in words for cut in range(1, len(w))
        if w[:cut] in vocabulary and w[cut:] in vocabulary
    )  # fmt: skip
    merges = [pair for _, pair in sorted(halves, key=lambda entry: entry[0])]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    if scheme == "prepend":
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme, split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wrapped(tokenizer, **options):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)


def model_with(tokenizer, folder):
    """Write a tiny model with a tokenizer."""
    count = max(tokenizer.get_vocab().values()) + 4  # rows that no token has
    checkpoint = tiny_checkpoint(folder, "qwen3_moe", vocab_size=count, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    for file in checkpoint.glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(checkpoint)
    return checkpoint


def compare(checkpoint, file, texts=TEXTS):
    export(checkpoint, file)
    tokenizer, read_back = load_tokenizer(checkpoint), load_tokenizer(file)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert read_back(text)["input_ids"] == ids, text
        if tokenizer.backend_tokenizer.decoder is not None:
            assert read_back.decode(ids) == tokenizer.decode(ids)
        assert read_back.decode(ids, skip_special_tokens=True) == re.sub(r"<\|\w+\|>", "", text)
    assert read_back.special_tokens_map == tokenizer.special_tokens_map
    with llama(file) as server:
        for text in texts:
            assert token_ids(server, text) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("steps", BYTE_LEVEL, ids=BYTE_LEVEL.values())
def test_every_known_way_to_cut_text_up_gives_the_same_tokens(steps, tmp_path):
    checkpoint = model_with(byte_level(steps), tmp_path / "model")
    compare(checkpoint, tmp_path / "model.gguf", [*TEXTS, "<|user|>hello<|end|> there"])


@pytest.mark.long
@pytest.mark.parametrize("alias", ALIASES)
def test_other_names_of_a_way_read_back_as_llama_cpp_reads_them(alias, tmp_path):
    [steps] = [steps for steps, name in BYTE_LEVEL.items() if name == ALIASES[alias]]
    export(model_with(byte_level(steps), tmp_path / "model"), tmp_path / "model.gguf")

    def renamed(fields):
        fields["tokenizer.ggml.pre"] = (alias, *fields["tokenizer.ggml.pre"][1:])

    file = rewritten(tmp_path / "model.gguf", tmp_path / "renamed.gguf", renamed)
    tokenizer = load_tokenizer(file)
    with llama(file) as server:
        for text in [*TEXTS, "<|user|>hello<|end|> there"]:
            assert token_ids(server, text) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("scheme", ["prepend", "always", "first"])
def test_pieces_give_the_same_tokens(scheme, tmp_path, caplog):
    checkpoint = model_with(pieces(scheme), tmp_path / "model")
    texts = [text for text in TEXTS if text and (scheme == "prepend" or not text.startswith(" "))]
    compare(checkpoint, tmp_path / "model.gguf", texts)
    assert ("puts a space before a text that begins with none" in caplog.text) == (scheme != "prepend")


def test_the_bundled_tokenizer_gives_the_same_tokens(bundled, tmp_path):
    checkpoint = tmp_path / "model"
    shutil.copytree(bundled / "glm4_moe", checkpoint)
    corpus = [file.read_text(encoding="utf-8")[:20_000] for file in sorted((bundled / "text" / "test").rglob("*.txt"))]
    assert len(corpus) > 3
    compare(checkpoint, tmp_path / "model.gguf", [*TEXTS, *corpus])


def changed(tmp_path, change, tokenizer=None):
    """Return a tiny model whose tokenizer.json was changed."""
    checkpoint = model_with(tokenizer or byte_level(("words",)), tmp_path / "model")
    file = checkpoint / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    return checkpoint


def lowercase(content):
    content["normalizer"] = {"type": "Lowercase"}


def own_pattern(content):
    step = {"type": "Split", "pattern": {"Regex": "[aeiou]+"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"]["pretokenizers"].insert(0, step)


def strip(content):
    content["added_tokens"][1]["lstrip"] = True


def unreachable(content):
    content["model"]["ignore_merges"] = True
    content["model"]["merges"] = content["model"]["merges"][:20]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lowercase, "it has a normaliser, Lowercase"),
        (own_pattern, "it cuts text up by"),
        (strip, "lstrip is set for its token '<|user|>'"),
        (unreachable, "merges never lead to"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused(change, words, tmp_path):
    with pytest.raises(InputError, match="its tokenizer cannot be exported") as caught:
        export(changed(tmp_path, change), tmp_path / "model.gguf")
    assert words in str(caught.value)
    assert not (tmp_path / "model.gguf").exists()


def test_pieces_whose_merges_lack_one_are_refused(tmp_path):
    checkpoint = changed(tmp_path, lambda content: content["model"]["merges"].pop(), pieces("always"))
    with pytest.raises(InputError, match="with no merge"):
        export(checkpoint, tmp_path / "model.gguf")


def test_pieces_with_letters_that_are_none_are_refused(tmp_path):
    def drop(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["Zq"] = vocabulary.pop("H")
        content["model"]["merges"] = [m for m in content["model"]["merges"] if "H" not in "".join(m)]
        for token in [t for t in vocabulary if "H" in t and not t.startswith("<")]:
            vocabulary[token.replace("H", "q") + "!"] = vocabulary.pop(token)

    checkpoint = changed(tmp_path, drop, pieces("always"))
    with pytest.raises(InputError, match="is no piece by itself"):
        export(checkpoint, tmp_path / "model.gguf")


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "model", "qwen3_moe")
    for file in checkpoint.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="tokenizer"):
        export(checkpoint, tmp_path / "model.gguf")
