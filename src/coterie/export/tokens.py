"""The tokenizer of a model as llama.cpp has it: vocabulary, merges, how text is cut up first, special tokens.

llama.cpp cuts text up with code of its own, one for each way that is known; which one a tokenizer needs is told from
what its pre-tokenizer does, not from its name. Facts: ``src/llama-vocab.cpp`` of llama.cpp, and ``conversion/base.py``.
What is in the tables was compared on text with digits, code and many scripts (``tests/export/test_tokens.py``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from coterie.errors import InputError
from coterie.model.disk.gguf.tokens import BYTE_LEVEL, NO_MERGE, SPACE
from coterie.model.disk.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import gguf

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """A tokenizer as a GGUF file has it.

    Attributes:
        model: "gpt2" for merges of bytes, "llama" for pieces, the first of which are joined first.
        pre: how text is cut up first.
        tokens: text of every token; those that the tokenizer does not have are filled in.
        types: kind of every token, a `gguf.TokenType`.
        merges: pairs that become one, in order.
        special: id of special tokens, by the name that gguf has for the role.
        add_bos: whether a text begins with one.
        add_eos: whether a text ends with one.
        chat_template: Jinja text, or one by name.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | Mapping[str, str] | None


def read_vocabulary(folder: Path, num_tokens: int) -> Vocabulary:
    """Return the tokenizer of a model folder.

    Args:
        folder: the model.
        num_tokens: rows of the embedding.

    Raises:
        InputError: there is none, or one that llama.cpp is not known to have.
    """
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(folder, "it is not one of those that tokenizer.json describes")
    content: dict[str, Any] = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _unknown(folder, f"it is of the type {model['type']}, and merges of pairs (BPE) are known")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _unknown(folder, f"its {key} is {model[key]!r}")
    for added in content["added_tokens"]:
        for key in ("single_word", "lstrip", "rstrip"):
            if added[key]:
                raise _unknown(folder, f"{key} is set for its token {added['content']!r}")
    tokens, types = _tokens(tokenizer, content, num_tokens, folder)
    if model.get("byte_fallback"):
        kind, pre = "llama", "default"
        _check_pieces(content, folder)
        _check_spaces(content, folder)
    else:
        kind, pre = "gpt2", _pre_tokenizer(content, folder)
        _check_whole_words(model, folder)
    add_bos, add_eos = _added_around(tokenizer, folder)
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        merges=tuple(" ".join(merge) for merge in _merges(model)),
        special=_special(tokenizer, folder, num_tokens),
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=tokenizer.chat_template,
    )


def describe_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write a tokenizer."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        # The neighbours whose piece has the highest score are joined first, see `_check_pieces`.
        writer.add_token_scores([-float(index) for index in range(len(vocabulary.tokens))])
        writer.add_add_space_prefix(True)
    else:
        # A list must not be empty there. The letters that stand for bytes are others than these.
        writer.add_token_merges(vocabulary.merges or (NO_MERGE,))
    for role, token in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    template = vocabulary.chat_template
    if isinstance(template, str):
        writer.add_chat_template(template)
    elif template:
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])


def _unknown(folder: Path, reason: str) -> InputError:
    return InputError(f"{folder}: its tokenizer cannot be exported: {reason}, which llama.cpp is not known to do alike")


def _tokens(
    tokenizer: PreTrainedTokenizerBase, content: Mapping[str, Any], num_tokens: int, folder: Path
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    import gguf

    kinds = gguf.TokenType
    text = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(text) >= num_tokens:
        raise InputError(
            f"{folder}: its tokenizer has tokens up to {max(text)}, and its embedding {num_tokens} rows; put the files "
            "of the right tokenizer there"
        )
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    unknown = content["model"].get("unk_token")
    tokens, types = [], []
    for index in range(num_tokens):
        token = text.get(index)
        if token is None:
            token, kind = f"[PAD{index}]", kinds.UNUSED
        elif token == unknown and content["model"].get("byte_fallback"):
            kind = kinds.UNKNOWN
        elif index in added:
            kind = kinds.CONTROL if added[index]["special"] else kinds.USER_DEFINED
        elif content["model"].get("byte_fallback") and _is_byte(token):
            kind = kinds.BYTE
        else:
            kind = kinds.NORMAL
        tokens.append(token)
        types.append(int(kind))
    return tuple(tokens), tuple(types)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _steps(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    step = content["pre_tokenizer"]
    if step is None:
        return []
    return list(step["pretokenizers"]) if step["type"] == "Sequence" else [step]


def _pre_tokenizer(content: Mapping[str, Any], folder: Path) -> str:
    """Return what llama.cpp calls the way in which text is cut up."""
    normalizer = content["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _unknown(folder, f"it has a normaliser, {normalizer['type']}")
    if normalizer is not None:
        log.info("its tokenizer composes characters first (NFC), which llama.cpp leaves to whoever writes the text")
    steps: list[str] = []
    *rest, last = _steps(content) or [{"type": "none"}]
    for step in rest:
        if step["type"] == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append(step["pattern"].get("Regex", step["pattern"].get("String")))
        else:
            raise _unknown(folder, f"it cuts text up with {_shortened(step)}")
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _unknown(folder, f"it cuts text up with {_shortened(last)} at last")
    if last["use_regex"]:
        steps.append("words")
    if tuple(steps) not in BYTE_LEVEL:
        raise _unknown(folder, f"it cuts text up by {_shortened(steps)}")
    return BYTE_LEVEL[tuple(steps)]


def _shortened(content: object) -> str:
    text = json.dumps(content, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _check_whole_words(model: Mapping[str, Any], folder: Path) -> None:
    """Check that words which are tokens come out as one through merges alone, where a tokenizer looks them up first."""
    if not model.get("ignore_merges"):
        return
    from tokenizers import models

    merges = _merges(model)
    plain = models.BPE(vocab=model["vocab"], merges=merges)
    in_merges = {left + right for left, right in merges}
    for token in model["vocab"]:
        if len(token) > 1 and (token not in in_merges or len(plain.tokenize(token)) > 1):
            raise _unknown(folder, f"it looks words up first (ignore_merges), and merges never lead to {token!r}")


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs that become one, in order; older files have a text for each."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _check_pieces(content: Mapping[str, Any], folder: Path) -> None:
    """Check that joining the neighbours whose piece has the lowest id is what merges do.

    transformers joins the neighbours whose merge comes first, llama.cpp those whose piece has the highest score: the
    same where merges come in the order of the pieces' ids, and there is one for every way to cut a piece in two.
    """
    model = content["model"]
    vocabulary: Mapping[str, int] = model["vocab"]
    merges = _merges(model)
    joined = [vocabulary[left + right] for left, right in merges]
    if joined != sorted(joined):
        raise _unknown(folder, "its merges are not in the order of its pieces")
    known = set(merges)
    added = {entry["content"] for entry in content["added_tokens"]}
    for token in vocabulary:
        if token in added or _is_byte(token):
            continue
        # llama.cpp begins with letters, those of no piece too, and transformers with the bytes of these.
        strange = next((letter for letter in token if letter not in vocabulary), None)
        if strange is not None:
            raise _unknown(folder, f"{strange!r} is in its piece {token!r}, and is no piece by itself")
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair not in known and all(half in vocabulary for half in pair):
                raise _unknown(
                    folder, f"{pair[0]!r} and {pair[1]!r} are pieces, and so are both together, with no merge"
                )
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    if missing:
        raise _unknown(folder, f"it has no piece for the byte {missing[0]}")


def _check_spaces(content: Mapping[str, Any], folder: Path) -> None:
    """Check that spaces become the character that stands for them, with one more before the text."""
    normalizer, steps = content["normalizer"], _steps(content)
    changes: Sequence[Mapping[str, Any]] = ()
    if normalizer is not None:
        changes = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    said = [(change["type"], change.get("prepend") or change.get("content")) for change in changes]
    if said == [("Prepend", SPACE), ("Replace", SPACE)] and changes[1]["pattern"] == {"String": " "} and not steps:
        return
    if not said and len(steps) == 1 and steps[0]["type"] == "Metaspace":
        step = steps[0]
        if step["replacement"] == SPACE and not step["split"] and step["prepend_scheme"] in ("always", "first"):
            behind = ", and none behind special tokens" if step["prepend_scheme"] == "first" else ""
            log.warning(
                "its tokenizer puts a space before a text that begins with none%s; llama.cpp puts one in all of these "
                "places, so texts that begin with a space have other tokens there", behind,
            )  # fmt: skip
            return
    raise _unknown(folder, f"it treats spaces with {_shortened([normalizer, *steps])}")


def _added_around(tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[bool, bool]:
    """Return whether a text begins with the first special token, and ends with the last."""
    bare = tokenizer("a b", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a b")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for add_bos in (False, True):
        for add_eos in (False, True):
            if whole == [bos] * add_bos + bare + [eos] * add_eos:
                return add_bos, add_eos
    raise _unknown(folder, f"it puts {whole} in the place of {bare}")


def _special(tokenizer: PreTrainedTokenizerBase, folder: Path, num_tokens: int) -> dict[str, int]:
    special: dict[str, int] = {}
    for role in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{role}_token_id")
        if token is not None and 0 <= token < num_tokens:
            special[role] = int(token)
    ends = _more_ends(folder, special.get("eos"), num_tokens)
    return special | dict(zip(("eot", "eom"), ends, strict=False))


def _more_ends(folder: Path, end: int | None, num_tokens: int) -> list[int]:
    """Return the tokens that end a generation beside the end of text, as the generation config says."""
    file = folder / "generation_config.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return []
    ends = said if isinstance(said, list) else [said]
    return [token for token in ends if type(token) is int and token != end and 0 <= token < num_tokens][:2]
