"""Test support for Coterie and for whoever adds to it: tiny checkpoints, tiny text, conformance checks.

Everything here is random but seeded, and small enough for a laptop: a checkpoint has some 300 kB. The weights are drawn
wide enough that routing varies and that every expert matters, which the usual initialisation of 0.02 does not give.

    from coterie.testing import check_method, tiny_checkpoint, tiny_text

    model = tiny_checkpoint(tmp_path / "model", "qwen3_moe", num_local_experts=16)
    text = tiny_text(tmp_path / "text")
    check_method("my-recipe")  # raises AssertionError, and says which promise is broken
    check_family("qwen3_moe")

`families.py` holds the one table of families that Coterie has: their smallest sensible configs. The library itself has
none.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coterie.testing.conformance import check_family as check_family
    from coterie.testing.conformance import check_method as check_method
    from coterie.testing.conformance import check_result as check_result
    from coterie.testing.facts import known_families as known_families
    from coterie.testing.families import CORE_FAMILIES as CORE_FAMILIES
    from coterie.testing.families import END_OF_TEXT_ID as END_OF_TEXT_ID
    from coterie.testing.families import UNSUPPORTED as UNSUPPORTED
    from coterie.testing.families import tiny_families as tiny_families
    from coterie.testing.tiny import draw_weights as draw_weights
    from coterie.testing.tiny import tiny_checkpoint as tiny_checkpoint
    from coterie.testing.tiny import tiny_text as tiny_text
    from coterie.testing.tiny import tiny_tokenizer as tiny_tokenizer

__all__ = [
    "CORE_FAMILIES",
    "END_OF_TEXT_ID",
    "UNSUPPORTED",
    "check_family",
    "check_method",
    "check_result",
    "draw_weights",
    "known_families",
    "tiny_checkpoint",
    "tiny_families",
    "tiny_text",
    "tiny_tokenizer",
]

# Names are imported when they are first used, so that a look into the table of families takes no torch.
_HOMES = {
    "CORE_FAMILIES": "families",
    "END_OF_TEXT_ID": "families",
    "UNSUPPORTED": "families",
    "check_family": "conformance",
    "check_method": "conformance",
    "check_result": "conformance",
    "draw_weights": "tiny",
    "known_families": "facts",
    "tiny_checkpoint": "tiny",
    "tiny_families": "families",
    "tiny_text": "tiny",
    "tiny_tokenizer": "tiny",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'coterie.testing' has no attribute {name!r}")
    value: object = getattr(import_module(f"coterie.testing.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
