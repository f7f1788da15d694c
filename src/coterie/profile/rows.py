"""What a row of a data set says: text, a prompt and its completion, or a conversation. No torch here.

A row is a line of JSON or a row of a table. The first of these that it has counts:

- ``text``: a string.
- ``messages``: objects with ``role`` and ``content``, as chat templates take them, with whatever else the template
  reads (``reasoning_content``, ``tool_calls``); ``tools`` beside it are those that the model may call.
- ``conversations``: the same, and its entries may be ``{"from": "human", "value": ...}`` in place of that.
- ``prompt`` and ``completion``: two strings, or two lists of messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coterie.errors import TextError

#: Names of all that is read of a row.
FIELDS = ("text", "messages", "conversations", "prompt", "completion", "tools")

EXPECTED = (
    'expected a JSON object with a "text" field that is a string, or with "messages", or with "prompt" and "completion"'
)

#: Roles by the names that entries with "from" and "value" have for them.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "observation": "tool"}

#: What no tokenizer takes: half of a character beyond the first 65,536; and what no text holds.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """Text of which the end is an answer.

    Attributes:
        prompt: what comes before it.
        completion: the answer.
        place: file and line, for messages.
    """

    prompt: str
    completion: str
    place: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Messages that a chat template makes text of.

    Attributes:
        messages: as the template takes them.
        tools: what the model may call, or None.
        num_given: messages at the start of which none is an answer, whoever wrote them.
        place: file and line, for messages.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    num_given: int
    place: str


#: A part of a document, and whether the document ends with it.
Piece = tuple[str, bool]

#: What files of text hold.
Document = Piece | Completion | Conversation


def document_of(row: object, place: str, *, from_table: bool = False) -> Document:
    """Return the document of a row.

    Args:
        row: what JSON or a table says.
        place: file and line, for messages.
        from_table: whether entries that a row lacks stand in it as None, as in tables.

    Raises:
        TextError: it is none, or its text holds what is no character.
    """
    if not isinstance(row, Mapping):
        raise TextError(f"{place}: {EXPECTED}; this is {_kind(row)}")
    said = {name: row[name] for name in FIELDS if row.get(name) is not None}
    if "text" in said:
        if not isinstance(said["text"], str):
            raise TextError(f'{place}: {EXPECTED}; its "text" is {_kind(said["text"])}')
        return check_characters(said["text"], place), True
    tools = _tools(said.get("tools"), place, from_table=from_table)
    for name in ("messages", "conversations"):
        if name in said:
            messages = _messages(said[name], name, place, from_table=from_table)
            if not messages:
                raise TextError(f'{place}: "{name}" is empty; remove the line')
            return Conversation(messages=messages, tools=tools, num_given=0, place=place)
    if {"prompt", "completion"} <= said.keys():
        prompt, completion = said["prompt"], said["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            for text in (prompt, completion):
                check_characters(text, place)
            return Completion(prompt=prompt, completion=completion, place=place)
        if isinstance(prompt, str) or isinstance(completion, str):
            raise TextError(f'{place}: "prompt" and "completion" should be two strings, or two lists of messages')
        given, answer = (_messages(said[name], name, place, from_table=from_table) for name in ("prompt", "completion"))
        return Conversation(messages=[*given, *answer], tools=tools, num_given=len(given), place=place)
    names = ", ".join(sorted(json.dumps(str(name))[:40] for name in row)[:8])
    raise TextError(f"{place}: {EXPECTED}; {f'this has {names}' if names else 'this has no field'}")


def check_characters(text: str, place: str) -> str:
    """Return a text, or raise TextError where it holds a NUL, or half of a character."""
    match = _NO_TEXT.search(text)
    if match is None:
        return text
    if match[0] == "\0":
        raise TextError(f"{place}: its text holds the character NUL; remove it, or save the file as UTF-8 if it is not")
    raise TextError(
        f"{place}: its text holds half of a character (the lone surrogate \\u{ord(match[0]):04x}), which no tokenizer "
        "takes; mend or remove it"
    )


def _messages(value: object, name: str, place: str, *, from_table: bool) -> list[dict[str, Any]]:
    wrong = TextError(f'{place}: "{name}" should be a list of objects with "role" and "content"')
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise wrong
    messages = []
    for entry in value:
        if not isinstance(entry, Mapping):
            raise wrong
        message = _without_nothing(entry, keep=("content",)) if from_table else dict(entry)
        if "role" not in message and isinstance(role := message.pop("from", None), str):
            message["role"] = _ROLES.get(role, role)
            message["content"] = message.pop("value", None)
        if not isinstance(message.get("role"), str):
            raise wrong
        messages.append(message)
    return messages


def _tools(value: object, place: str, *, from_table: bool) -> list[dict[str, Any]] | None:
    """Return the tools of a row, which may be written as JSON, since no two of them have the same fields."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise TextError(f'{place}: "tools" is a string that is not JSON') from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise TextError(f'{place}: "tools" should be a list of objects')
    return [_without_nothing(tool) if from_table else dict(tool) for tool in value]


def _without_nothing(value: Any, *, keep: Sequence[str] = ()) -> Any:
    """Return a value without entries that are None, however deep, but for those of some names at the top."""
    if isinstance(value, Mapping):
        return {key: _without_nothing(item) for key, item in value.items() if item is not None or key in keep}
    return [_without_nothing(item) for item in value] if isinstance(value, list | tuple) else value


def _kind(value: object) -> str:
    names = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")
