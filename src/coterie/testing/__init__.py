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

from coterie.testing.conformance import check_family, check_method, check_result
from coterie.testing.families import CORE_FAMILIES, END_OF_TEXT_ID, UNSUPPORTED, tiny_families
from coterie.testing.tiny import draw_weights, tiny_checkpoint, tiny_text, tiny_tokenizer

__all__ = [
    "CORE_FAMILIES",
    "END_OF_TEXT_ID",
    "UNSUPPORTED",
    "check_family",
    "check_method",
    "check_result",
    "draw_weights",
    "tiny_checkpoint",
    "tiny_families",
    "tiny_text",
    "tiny_tokenizer",
]
