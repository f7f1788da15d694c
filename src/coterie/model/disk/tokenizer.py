"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from coterie.errors import InputError
from coterie.model.disk.checkpoint import read_config, resolve
from coterie.model.quiet import quiet


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        InputError: the folder has none.
    """
    path = resolve(model)
    read_config(path)
    with quiet():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise InputError(
                f"{path} has no tokenizer that loads ({first_line}); put its files beside the weights"
            ) from error
    # Where a family has a tokenizer class of its own, transformers makes an empty one out of nothing.
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):
        raise InputError(
            f"{path} has no tokenizer: what loads knows {len(tokenizer)} special tokens and no text; "
            "put tokenizer.json or the vocabulary files beside the weights"
        )
    return tokenizer
