"""One pass of tokens through a model, with what transformers prepares for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

#: What transformers prepares of a sequence that whoever lets tokens pass keeps up himself.
KEPT = frozenset({"attention_mask", "position_ids", "past_key_values"})


def let_pass(
    model: Any,
    ids_BC: Tensor,
    cache: object,
    positions: Tensor | None,
    given: Mapping[str, Any],
    *,
    mask_BS: Tensor | None = None,
    is_first: bool = False,
    scored: int = 1,
) -> Tensor:
    """Let tokens pass, and return the scores (B, `scored`, V) behind the last ones.

    Args:
        model: the model.
        ids_BC: the tokens.
        cache: what is kept of those before them; these are added to it.
        positions: of these tokens, (..., B, C); None where the model finds them itself.
        given: what transformers prepared for the model beside that.
        mask_BS: which of all tokens so far count; None for all.
        is_first: whether nothing has passed before them.
        scored: of how many tokens at the end scores are needed.
    """
    more = {name: value for name, value in given.items() if name not in KEPT}
    inputs = model.prepare_inputs_for_generation(
        ids_BC, past_key_values=cache, attention_mask=mask_BS, position_ids=positions, is_first_iteration=is_first,
        **more,
    )  # fmt: skip
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = scored
    scores_BCV: Tensor = model(**inputs, return_dict=True).logits[:, -scored:]
    return scores_BCV
