"""Answers as OpenAI's API has them: whole, and in the pieces of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from coterie.serve.generation import Called, Ended, Piece
from coterie.serve.scores import ScoredToken


@dataclass(kw_only=True, slots=True)
class Answers:
    """The answers to one request, in the form of one of two endpoints.

    Attributes:
        model: the name of the model.
        is_chat: whether answers are messages, or texts.
        prompt_tokens: tokens of all prompts.
        count: answers.
        per_prompt: answers to each prompt.
        is_scored: whether probabilities of tokens are told.
        id: what the request is called.
        created: when it came, in seconds.
        tokens: tokens of answers that have ended.
        reused: tokens of prompts whose keys and values were there when the first answer to each was asked for.
        texts: the answers so far.
        calls: the functions that they call.
        scored: their tokens so far, where they are asked for.
        reasons: why those that have ended did.
    """

    model: str
    is_chat: bool
    prompt_tokens: int
    count: int
    per_prompt: int = 1
    is_scored: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    tokens: int = 0
    reused: int = 0
    texts: list[str] = field(init=False)
    calls: list[list[dict[str, Any]]] = field(init=False)
    scored: list[list[ScoredToken]] = field(init=False)
    reasons: list[str | None] = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.texts, self.reasons = [""] * self.count, [None] * self.count
        self.calls = [[] for _ in range(self.count)]
        self.scored = [[] for _ in range(self.count)]

    def take(self, event: Piece | Called | Ended) -> None:
        """Note what has come."""
        if isinstance(event, Piece):
            self.texts[event.answer] += event.text
            self.scored[event.answer] += event.tokens
        elif isinstance(event, Called):
            function = {"name": event.call.name, "arguments": event.call.arguments}
            call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
            self.calls[event.answer].append(call)
        else:
            self.reasons[event.answer] = event.reason
            self.tokens += event.tokens
            if event.answer % self.per_prompt == 0:
                self.reused += event.reused

    def usage(self) -> dict[str, Any]:
        """Return the numbers of tokens."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }

    def whole(self) -> dict[str, Any]:
        """Return all answers."""
        choices: list[dict[str, Any]] = []
        for number, (text, reason) in enumerate(zip(self.texts, self.reasons, strict=True)):
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if self.calls[number]:
                message |= {"content": text or None, "tool_calls": self.calls[number]}
            said = {"message": message} if self.is_chat else {"text": text}
            logprobs = self._logprobs(self.scored[number], 0)
            choices.append({"index": number, **said, "logprobs": logprobs, "finish_reason": reason})
        return self._object(choices, is_piece=False) | {"usage": self.usage()}

    def beginning(self) -> Iterator[dict[str, Any]]:
        """Yield what a stream begins with: whose messages these are."""
        if self.is_chat:
            for number in range(self.count):
                yield self._piece(number, {"role": "assistant", "content": ""}, None)

    def piece(self, event: Piece | Called | Ended) -> dict[str, Any]:
        """Return a piece of a stream, which was taken."""
        if isinstance(event, Ended):
            return self._piece(event.answer, {} if self.is_chat else "", event.reason)
        if isinstance(event, Called):
            call = {"index": event.number} | self.calls[event.answer][event.number]
            return self._piece(event.answer, {"tool_calls": [call]}, None)
        scored = self.scored[event.answer]
        logprobs = self._logprobs(
            event.tokens, sum(len(each.text) for each in scored[: len(scored) - len(event.tokens)])
        )
        return self._piece(event.answer, {"content": event.text} if self.is_chat else event.text, None, logprobs)

    def ending(self) -> dict[str, Any]:
        """Return the piece with the numbers of tokens, which ends a stream where it is asked for."""
        return self._object([], is_piece=True) | {"usage": self.usage()}

    def _logprobs(self, tokens: Sequence[ScoredToken], offset: int) -> dict[str, Any] | None:
        """Return tokens with their probabilities; `offset` is where in the answer they begin."""
        if not self.is_scored:
            return None
        if self.is_chat:
            content = [_scored(each) | {"top_logprobs": [_scored(other) for other in each.top]} for each in tokens]
            return {"content": content, "refusal": None}
        return {
            "tokens": [each.text for each in tokens],
            "token_logprobs": [each.logprob for each in tokens],
            "top_logprobs": [{other.text: other.logprob for other in each.top} for each in tokens],
            "text_offset": [offset + sum(len(each.text) for each in tokens[:place]) for place in range(len(tokens))],
        }

    def _piece(
        self, number: int, said: Any, reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        name = "delta" if self.is_chat else "text"
        choice = {"index": number, name: said, "logprobs": logprobs, "finish_reason": reason}
        return self._object([choice], is_piece=True)

    def _object(self, choices: list[dict[str, Any]], *, is_piece: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if is_piece else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def _scored(token: ScoredToken) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": token.utf8}
