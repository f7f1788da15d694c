"""How a model calls functions: derived from its chat template, and read from what it writes.

A template that writes calls of functions as JSON objects between marks shows both when it is given a message with two
calls: what stands between the two is the mark that ends one and the mark that begins the next, and what follows the
second tells where one stops and the other starts. Nothing is known of any family; what cannot be derived is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

#: A call of a function that no model has.
_NAME, _KEY, _VALUE = "probe_function", "probe_argument", "probe_value"


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolForm:
    """How calls of functions are written.

    Attributes:
        opening: the mark before a call.
        closing: the mark behind it; empty where there is none but the end of the answer.
        name: the key of the function's name.
        arguments: the key of its arguments.
    """

    opening: str
    closing: str
    name: str
    arguments: str

    def call(self, text: str) -> ToolCall | None:
        """Return the call that stands between two marks, or None for what is none."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(content, dict) or not isinstance(content.get(self.name), str):
            return None
        arguments = content.get(self.arguments, {})
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return ToolCall(name=content[self.name], arguments=written)


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A function that the model wants to be called.

    Attributes:
        name: its name.
        arguments: its arguments, as JSON.
    """

    name: str
    arguments: str


def derive_tool_form(tokenizer: Any) -> ToolForm | None:
    """Return how a model calls functions, as far as its chat template writes JSON between marks; None elsewhere."""
    if tokenizer.chat_template is None:
        return None
    arguments = {_KEY: _VALUE}
    calls = [
        {"id": f"call0000{n}", "type": "function", "function": {"name": f"{_NAME}_{n}", "arguments": arguments}}
        for n in (1, 2)
    ]
    tools = [{"type": "function", "function": {
        "name": f"{_NAME}_{n}", "description": "None.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
    }} for n in (1, 2)]  # fmt: skip
    messages = [{"role": "user", "content": "x"}]
    try:
        prompt = str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True))
        messages.append({"role": "assistant", "content": "", "tool_calls": calls})  # type: ignore[dict-item]
        whole = str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
    except Exception:  # a template is a program; one that does not take this has no such form
        return None
    written = whole[len(_common(prompt, whole)) :]
    spans = [span for n in (1, 2) if (span := _object(written, f"{_NAME}_{n}")) is not None]
    if len(spans) < 2:
        return None
    (_, first_end, content), (second_begin, second_end, _) = spans
    between, rest = written[first_end:second_begin], written[second_end:]
    closing = _common(between, rest)
    form = ToolForm(
        opening=between[len(closing) :].strip(),
        closing=closing.strip(),
        name=next(key for key, value in content.items() if value == f"{_NAME}_1"),
        arguments=next(
            (key for key, value in content.items() if value in (arguments, json.dumps(arguments))), "arguments"
        ),
    )
    return form if _is_seen(tokenizer, form) else None


def _common(one: str, other: str) -> str:
    """Return what two texts begin with."""
    pairs = zip(one, other, strict=False)
    return "".join(character for character, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _object(text: str, name: str) -> tuple[int, int, dict[str, Any]] | None:
    """Return where a JSON object is in a text that holds a name itself, and the object."""
    begin = text.find("{")
    while begin >= 0:
        try:
            content, end = json.JSONDecoder().raw_decode(text, begin)
        except (ValueError, RecursionError):
            content, end = None, begin
        if isinstance(content, dict) and name in content.values():
            return begin, end, content
        begin = text.find("{", begin + 1)
    return None


def _is_seen(tokenizer: Any, form: ToolForm) -> bool:
    """Return whether the marks are some, and are not left out of an answer's text."""
    for mark in (form.opening, form.closing):
        ids = tokenizer(mark, add_special_tokens=False).input_ids
        if str(tokenizer.decode(ids, skip_special_tokens=True)).strip() != mark:
            return False
    return any(character.isalpha() for character in form.opening)


class ToolText:
    """The text of an answer so far, apart from the functions that it calls.

    Attributes:
        calls: the functions so far.
    """

    def __init__(self, form: ToolForm) -> None:
        """Begin."""
        self.calls: list[ToolCall] = []
        self._form = form
        self._kept = ""
        self._is_after_call = False

    def add(self, text: str, *, is_last: bool = False) -> str:
        """Take text, and return what of it is said and calls nothing, as far as that is certain now."""
        self._kept += text
        said = ""
        while self._kept:
            if self._is_after_call:  # space between calls says nothing
                self._kept = self._kept.lstrip()
                self._is_after_call = not self._kept
            before, mark, rest = self._kept.partition(self._form.opening)
            if not mark:
                count = 0 if is_last else _overlap(self._kept, self._form.opening)
                said += self._kept[: len(self._kept) - count]
                self._kept = self._kept[len(self._kept) - count :]
                break
            inside, end, after = rest.partition(self._form.closing or self._form.opening)
            if not end and not is_last:
                said, self._kept = said + before, mark + rest
                break
            call = self._form.call(inside)
            said += before if call is not None else before + mark + inside + (end if self._form.closing else "")
            if call is not None:
                self.calls.append(call)
                self._is_after_call = True
            self._kept = after if self._form.closing else end + after
        return said


def _overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of a text may begin a mark."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-size:])), 0)
