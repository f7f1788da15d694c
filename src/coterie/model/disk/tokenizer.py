"""The tokenizer of a model folder."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from coterie.errors import InputError
from coterie.model.disk.beside import TOKENIZER_FILES
from coterie.model.disk.checkpoint import read_config, resolve
from coterie.model.disk.damage import check_no_pointer
from coterie.model.disk.gguf.folder import check_tokenizer
from coterie.model.quiet import quiet

CONFIG = "tokenizer_config.json"


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        InputError: the folder has none, or one that needs code which comes with it: that is never run.
        CorruptCheckpoint: one of its files is a Git LFS pointer.
    """
    path = resolve(model, weights=False)
    read_config(path)
    check_tokenizer(path)
    for file in sorted(path.iterdir()):
        if TOKENIZER_FILES.search(file.name):
            check_no_pointer(file)
    with quiet():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # every tokenizer class checks its files, and config.json, in its own way
            if "trust_remote_code=True" in str(error):  # which it asks for
                raise InputError(_needs_own_code(path)) from error
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{path} has no tokenizer that loads ({reason}); put its files beside the weights"
            ) from error
    # Where a family has a tokenizer class of its own, transformers makes an empty one out of nothing.
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):
        raise InputError(
            f"{path} has no tokenizer: what loads knows {len(tokenizer)} special tokens and no text; "
            "put tokenizer.json or the vocabulary files beside the weights"
        )
    return tokenizer


def _needs_own_code(path: Path) -> str:
    """Say which class of whose the tokenizer of a folder is, and what to do without it."""
    named = json.loads((path / CONFIG).read_text(encoding="utf-8"))["auto_map"]
    if isinstance(named, dict):
        named = named["AutoTokenizer"]
    reference = named if isinstance(named, str) else next(name for name in reversed(named) if name)
    repository, _, place = reference.rpartition("--")
    module, _, name = place.rpartition(".")
    if (path / "tokenizer.json").is_file():
        way_out = f"if tokenizer.json says all that there is to say, remove auto_map from {CONFIG} in a copy"
    else:
        way_out = f"make a tokenizer.json of it where you trust it, and remove auto_map from {CONFIG}"
    return (
        f"{path}: its tokenizer is {name} in {module}.py{f' of {repository}' if repository else ''}, and code that "
        f"comes with a checkpoint is never run: {way_out}"
    )
