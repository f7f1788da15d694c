"""The tokenizer in a GGUF file as the files that transformers reads: tokenizer.json and what goes with it.

How text is cut up is a name in a file and a pattern in tokenizer.json: one table, which `coterie.export.tokens` reads
from left to right. Facts: ``src/llama-vocab.cpp`` of llama.cpp. No torch and no tokenizers here: the files are JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coterie.errors import InputError
from coterie.model.disk.gguf.fields import GgufFields

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_BREAKS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTIONS + "?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTIONS + "?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ASCII_THEN_LETTERS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: How a tokenizer of bytes cuts up text -> the name of that in llama.cpp. A step is a pattern whose matches stand by
#: themselves, "digits" for each digit by itself, or "words" for what GPT-2 has.
BYTE_LEVEL: dict[tuple[str, ...], str] = {
    ("words",): "gpt-2",
    ("digits", "words"): "starcoder",
    (_WORDS_AND_BREAKS % "",): "qwen2",
    (_WORDS_AND_BREAKS % "{1,3}",): "dbrx",
    (_CASED,): "gpt-4o",
    (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _ASCII_THEN_LETTERS): "deepseek-v3",
}

#: Other names that llama.cpp's converter gives to the same ways.
ALIASES = {
    "olmo": "gpt-2", "refact": "starcoder", "smollm": "starcoder", "command-r": "starcoder", "hunyuan": "qwen2",
    "stablelm2": "qwen2", "glm4": "dbrx", "chatglm-bpe": "dbrx", "llama-bpe": "dbrx", "smaug-bpe": "dbrx",
}  # fmt: skip

#: Those whose texts begin with a special token, and whose words that are tokens are looked up first, unless a file says
#: otherwise.
_LIKE_LLAMA = ("llama-bpe",)

#: Composes characters first, which a file does not say: all tokenizers of this name do.
_COMPOSED = ("qwen2",)

SPACE = "\u2581"  # what stands for a space in vocabularies made by SentencePiece

#: A list of merges must not be empty in a file: this pair stands there for none. It never occurs.
NO_MERGE = f"{SPACE} {SPACE}"

#: Kinds of tokens; ``llama_token_type`` in ``llama.h``.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def tokenizer_files(fields: GgufFields) -> dict[str, Any]:
    """Return the content of the files of a tokenizer, by name.

    Raises:
        InputError: there is none, or one that is not known here.
        CorruptCheckpoint: it contradicts itself.
    """
    kind = fields.text("tokenizer.ggml.model", "none")
    if kind not in ("gpt2", "llama"):
        raise _unknown(fields, f"is of the kind {kind[:40]!r}, and merges of bytes (gpt2) and pieces (llama) are known")
    tokens = fields.list_of("tokenizer.ggml.tokens", str)
    types = [NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in fields:
        types = fields.list_of("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise fields.wrong("tokenizer.ggml.token_type", f"has {len(types)} entries for {len(tokens)} tokens")
    there = {token: index for index, token in enumerate(tokens) if types[index] != UNUSED}
    used = sum(type_ != UNUSED for type_ in types)
    if len(there) != used:
        raise fields.wrong("tokenizer.ggml.tokens", f"names {used - len(there)} tokens twice")
    special = _special(fields, tokens)
    if kind == "gpt2":
        content, begins = _of_bytes(fields, there)
    else:
        content, begins = _of_pieces(fields, there, special.get("unk_token")), True
    added = [
        _added(token, index, special=types[index] != USER_DEFINED)
        for token, index in there.items()
        if types[index] in (CONTROL, USER_DEFINED) or (types[index] == UNKNOWN and token == special.get("unk_token"))
    ]
    content |= {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    content["post_processor"] = _around(
        special.get("bos_token") if fields.truth("tokenizer.ggml.add_bos_token", begins) else None,
        special.get("eos_token") if fields.truth("tokenizer.ggml.add_eos_token", False) else None,
        there,
    )
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special,
    }  # fmt: skip
    if template := _template(fields):
        settings["chat_template"] = template
    files = {"tokenizer.json": content, "tokenizer_config.json": settings}
    if ends := _ends(fields, len(tokens)):
        files["generation_config.json"] = {"eos_token_id": ends}
    return files


def _unknown(fields: GgufFields, reason: str) -> InputError:
    return InputError(
        f"{fields.where}: its tokenizer {reason}; put the tokenizer.json of the checkpoint that it was made from "
        "beside the file, in a folder of their own, and pass the folder"
    )


def _special(fields: GgufFields, tokens: Sequence[str]) -> dict[str, str]:
    special = {}
    for role, name in _ROLES.items():
        key = f"tokenizer.ggml.{role}_token_id"
        if key in fields and (index := fields.whole(key, most=2**32 - 1)) < len(tokens):
            special[name] = tokens[index]
    return special


def _ends(fields: GgufFields, num_tokens: int) -> list[int]:
    """Return the tokens that end a generation, where there are several."""
    keys = [f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom")]
    ids = [fields.whole(key, most=2**32 - 1) for key in keys if key in fields]
    ends = [index for index in dict.fromkeys(ids) if index < num_tokens]
    return ends if len(ends) > 1 else []


def _template(fields: GgufFields) -> Any:
    """Return the chat template; several as transformers lists them."""
    key = "tokenizer.chat_template"
    named = {name.removeprefix(f"{key}."): name for name in fields.fields if name.startswith(f"{key}.")}
    if not named:
        return fields.text(key, "")
    whole = [{"name": "default", "template": fields.text(key)}] if key in fields else []
    return whole + [{"name": name, "template": fields.text(there)} for name, there in named.items()]


def _added(token: str, index: int, *, special: bool) -> dict[str, Any]:
    never = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": token, **never, "special": special}


def _of_bytes(fields: GgufFields, vocabulary: Mapping[str, int]) -> tuple[dict[str, Any], bool]:
    """Return the parts of a tokenizer of merges of bytes, and whether texts begin with a special token by default."""
    name = fields.text("tokenizer.ggml.pre", "default")
    steps = {known: steps for steps, known in BYTE_LEVEL.items()}.get(ALIASES.get(name, name))
    if steps is None:
        known = sorted({*BYTE_LEVEL.values(), *ALIASES})
        raise _unknown(fields, f"cuts text up in the way {name[:40]!r}, and {', '.join(known)} are known")
    bytes_: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = [
        {"type": "Digits", "individual_digits": True}
        if step == "digits"
        else {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        for step in steps
        if step != "words"
    ]
    last = bytes_ | {"use_regex": "words" in steps}
    merges = []
    key = "tokenizer.ggml.merges"
    for merge in fields.list_of(key, str) if key in fields else ():
        left, _, right = merge.partition(" ")
        if left in vocabulary and right in vocabulary and left + right in vocabulary:
            merges.append([left, right])
        elif merge != NO_MERGE:
            raise fields.wrong(key, f"joins {merge[:40]!r}, which are no tokens")
    return {
        "normalizer": {"type": "NFC"} if name in _COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, last]},
        "decoder": bytes_ | {"use_regex": True},
        "model": _merging(vocabulary, merges, ignore_merges=name in _LIKE_LLAMA),
    }, name in _LIKE_LLAMA


def _of_pieces(fields: GgufFields, vocabulary: Mapping[str, int], unknown: str | None) -> dict[str, Any]:
    """Return the parts of a tokenizer of pieces, with bytes for what they do not have."""
    scores = fields.list_of("tokenizer.ggml.scores", float)
    if len(scores) <= max(vocabulary.values(), default=-1):
        raise fields.wrong("tokenizer.ggml.scores", f"has {len(scores)} entries, and there are more tokens")
    # The neighbours whose piece has the highest score are joined first; a merge for every way to cut a piece in two.
    merges = []
    for token in sorted(vocabulary, key=lambda token: (-scores[vocabulary[token]], vocabulary[token])):
        halves = ([token[:cut], token[cut:]] for cut in range(1, len(token)))
        merges += sorted(
            (pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary),
            key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]),
        )
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    if fields.truth("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    pieces = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _merging(vocabulary, merges, **pieces),
    }


def _merging(vocabulary: Mapping[str, int], merges: list[list[str]], **others: Any) -> dict[str, Any]:
    plain = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    return {**plain, **others, "vocab": dict(vocabulary), "merges": merges}


def _around(first: str | None, last: str | None, ids: Mapping[str, int]) -> dict[str, Any] | None:
    """Return what puts special tokens before and behind a text."""
    around_text = [token for token in (first, last) if token is not None and token in ids]
    special = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in around_text}
    if not special:
        return None

    def around(kind: str, type_id: int) -> list[dict[str, Any]]:
        text = [{"Sequence": {"id": kind, "type_id": type_id}}]
        before = [{"SpecialToken": {"id": first, "type_id": type_id}}] if first in special else []
        return before + text + ([{"SpecialToken": {"id": last, "type_id": type_id}}] if last in special else [])

    pair = around("A", 0) + around("B", 1)
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": special}
