"""What listens to a generation: text as it is made, and tokens with the scores that they are chosen by."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, TextStreamer


class Streamer(TextStreamer):
    """Hands on text as it is made, and notes when the first token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first: float | None = None
        self._on_text = on_text
        self._calls = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, then token after token."""
        self._calls += 1
        if self._calls == 2:
            self.first = time.perf_counter()
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on text that no later token changes."""
        if self._on_text is not None and text:
            self._on_text(text)


class Steps(StoppingCriteria):
    """Hands on each token with the scores that it was chosen by, and ends where that says so."""

    def __init__(self, on_token: Callable[[int, Tensor], bool]) -> None:
        self._on_token = on_token
        self._scores_V: Tensor | None = None

    def note(self, model: object, arguments: object, output: Any) -> None:
        """Keep the scores of the last token of a forward pass; a hook."""
        self.see(output.logits[0, -1])

    def see(self, scores_V: Tensor) -> None:
        """Keep scores of a token."""
        self._scores_V = scores_V.float().clone()

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        """Say whether the token that was chosen last is the last one."""
        assert self._scores_V is not None
        return torch.tensor([self._on_token(int(input_ids[0, -1]), self._scores_V)], device=input_ids.device)
