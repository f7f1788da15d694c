"""Tiny checkpoints, a tiny tokenizer and tiny text: random but seeded, and small enough for a laptop."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from coterie.errors import OutputExists
from coterie.model.quiet import quiet
from coterie.profile.documents import DOCUMENT_SEPARATOR
from coterie.testing.families import END_OF_TEXT_ID, model_class, tiny_config

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
_MODEL_CARD = "---\ntags: [test]\n---\n\n# A tiny random model\n\nMade by `coterie.testing`; it knows nothing.\n"


def tiny_checkpoint(
    path: str | Path,
    model_type: str = "olmoe",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config_changes: Any,
) -> Path:
    """Write a tiny random checkpoint in the layout that its family has on the hub, with all that comes with a model.

    Beside the weights there are a byte-level tokenizer (256 bytes and the end of text), a chat template, a generation
    config and a model card. A seed always gives the same bytes, and a tensor's values depend on seed, name and shape
    only: two checkpoints that differ in one config key have all tensors in common that the key does not reach.

    Args:
        path: the folder to write; made when missing, must be empty.
        model_type: one of `tiny_families`.
        seed: seed of the weights.
        dtype: number format of the weights on disk.
        **config_changes: config keys to set, for example ``num_hidden_layers=4``.

    Returns:
        The folder.

    Raises:
        UnknownName: a model type or config key that does not exist.
        OutputExists: the folder is not empty.
    """
    folder = Path(path)
    config = tiny_config(model_type, **config_changes)
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputExists(f"{folder} is not empty; tiny_checkpoint writes a new folder")
    stock = model_class(model_type)
    with quiet(), torch.random.fork_rng(devices=[]):
        model = stock._from_config(config, dtype=torch.float32)
        draw_weights(model, seed)
        model.save_pretrained(folder)
        if dtype != torch.float32:
            # Loading decides which tensors a family keeps in float32.
            model = stock.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
            model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(_MODEL_CARD, encoding="utf-8")
    return folder


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Draw all saved tensors of a model anew, in place, such that routing varies and every expert matters.

    Matrices have a standard deviation of 0.3 (embeddings 0.5), norm weights are around 1, biases around 0 with 0.1.
    """
    drawn: set[int] = set()
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.is_floating_point() or tensor.data_ptr() in drawn:
            continue  # tied tensors are drawn once
        drawn.add(tensor.data_ptr())
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(_scaled(name, tensor, noise))


def _scaled(name: str, tensor: Tensor, noise: Tensor) -> Tensor:
    if "bias" in name or tensor.ndim < 2:
        is_norm = tensor.ndim == 1 and bool((tensor == 1).all())
        drawn = 0.1 * noise + (1.0 if is_norm else 0.0)
        # A single value among zeros is one that the family sets on purpose, and sets again when it loads.
        return torch.where(tensor != 0, tensor, drawn) if (tensor == 0).sum() == tensor.numel() - 1 > 0 else drawn
    return (0.5 if "embed" in name else 0.3) * noise


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the 256 bytes and ``<|endoftext|>``."""
    # Ids in the order of the bytes' printable stand-ins; which byte gets which id does not matter.
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary[DOCUMENT_SEPARATOR] = END_OF_TEXT_ID
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT_SEPARATOR,
        eos_token=DOCUMENT_SEPARATOR,
        pad_token=DOCUMENT_SEPARATOR,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_text(
    path: str | Path, *, domains: tuple[str, ...] = ("prose", "code"), documents: int = 12, seed: int = 0
) -> Path:
    """Write a text folder: one ``*.txt`` file a domain, and a ``*.qa.jsonl`` file of sums beside the first.

    The domain "code" is pseudo-code; any other name is pseudo-prose in a vocabulary of its own. A document has some
    1.7 kB, and a seed always gives the same bytes.

    Args:
        path: the folder to write; made when missing.
        domains: names of the domains.
        documents: number of documents in each domain.
        seed: seed of the text.

    Returns:
        The folder.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for domain in domains:
        source = random.Random(f"{seed} {domain}")
        lines = _code_lines(source) if domain == "code" else _prose_lines(source)
        texts = (_document(lines, 1700) for _ in range(documents))
        content = f"\n{DOCUMENT_SEPARATOR}\n".join(texts)
        (folder / f"{domain}.txt").write_text(content + "\n", encoding="utf-8", newline="\n")
    source = random.Random(f"{seed} questions")
    with (folder / f"{domains[0]}.qa.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for _ in range(6):
            a, b = source.randint(1, 49), source.randint(1, 49)
            file.write(json.dumps({"question": f"Q: {a} + {b} = ?\nA:", "answer": f" {a + b}"}) + "\n")
    return folder


def _document(lines: Iterator[str], length: int) -> str:
    text = ""
    while len(text) < length:
        text += next(lines) + "\n"
    return text.rstrip("\n")


def _words(source: random.Random, count: int) -> list[str]:
    onsets = source.sample(["b", "br", "d", "f", "g", "gl", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v"], 9)
    vowels = source.sample(["a", "e", "i", "o", "u", "ai", "ee", "ou"], 4)
    codas = ["", "", source.choice("lmnr"), source.choice("dkst")]

    def syllable() -> str:
        return source.choice(onsets) + source.choice(vowels) + source.choice(codas)

    return ["".join(syllable() for _ in range(source.choice((1, 2, 2, 3)))) for _ in range(count)]


def _prose_lines(source: random.Random) -> Iterator[str]:
    words = _words(source, 160)
    weights = [1 / (rank + 2) for rank in range(len(words))]  # Zipf: a few words do most of the work
    while True:
        sentences = []
        for _ in range(source.randint(2, 4)):
            chosen = source.choices(words, weights, k=source.randint(4, 11))
            comma = source.randrange(1, len(chosen))
            chosen[comma - 1] += "," if len(chosen) > 7 else ""
            sentences.append(" ".join(chosen).capitalize() + source.choice("...?!"))
        yield " ".join(sentences)


def _code_lines(source: random.Random) -> Iterator[str]:
    names = [f"{word}_{source.randrange(100):02d}" for word in _words(source, 24)]
    while True:
        function, a, b, result = (source.choice(names) for _ in range(4))
        yield f"def {function}({a}: int, {b}: int = {source.randrange(256)}) -> int:"
        for _ in range(source.randint(2, 5)):
            operator = source.choice(("+", "-", "*", "//", "%", "^", "&"))
            yield f"    {result} = ({a} {operator} {source.randrange(1, 4096):#06x}) << {source.randrange(8)}"
            yield f"    if {result} >= {b}[{source.randrange(16)}]:"
            yield f"        {a}, {b} = {b}, {{{source.randrange(64)}: {result}}}"
        yield f"    return {result};  # {source.randrange(10**6)}\n"
