"""Conversations as a model reads them: its chat template makes text of messages, and tells which of it are answers.

Rendering is transformers' own, in its sandbox. Where a template marks what the assistant says (``{% generation %}``),
those are the answers. Elsewhere they are found by rendering prefixes of the conversation: an answer begins where the
conversation before it ends with the prompt for an answer, and ends where that conversation with the answer ends. A
template may leave out thinking, or write another end, once something follows; so what a prefix ends with need only be
there again.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from coterie.errors import TextError
from coterie.profile.rows import Completion, Conversation, check_characters

#: Characters of a text, begin and end.
Span = tuple[int, int]

#: The day that it is in every text: a template that asks for the date must not give another text tomorrow.
TODAY = datetime.date(2025, 1, 1)
_DATES = {f"%{code}": TODAY.strftime(f"%{code}") for code in "aAbBdHIjmMpSuUwWyY"}
_CLOCK = (
    "{% macro strftime_now(format) %}{% set date = namespace(text=format) %}{% for code, value in DATES.items() %}"
    "{% set date.text = date.text.replace(code, value) %}{% endfor %}{{ date.text }}{% endmacro %}\n"
)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

#: What templates read thinking from, and may leave out of all but the last answer.
_THINKING = ("reasoning_content", "reasoning", "thinking")

#: Characters by which the begin of an answer is looked for.
_PROBE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The text of a document.

    Attributes:
        text: all of it.
        answers: where in it the answers are, ascending; empty where nobody asked.
        ends: whether an end-of-text token goes behind it, which is part of the last answer.
    """

    text: str
    answers: tuple[Span, ...]
    ends: bool


def write_out(tokenizer: Any, document: Completion | Conversation, *, answers: bool) -> Written:
    """Return the text of a document for a model.

    What a chat template writes is whole: nothing goes behind it.

    Args:
        tokenizer: the model's, with its chat template.
        document: a conversation, or a prompt with its completion.
        answers: whether to find the answers.

    Raises:
        TextError: there is no chat template, it does not take the messages, or answers cannot be told from the rest.
    """
    if isinstance(document, Completion):
        begin, text = len(document.prompt), document.prompt + document.completion
        return Written(text=text, answers=((begin, len(text)),), ends=True)
    template = _Template(tokenizer, document)
    text = check_characters(template.render(document.messages), document.place)
    spans = tuple(_spans(template, text)) if answers else ()
    return Written(text=text, answers=spans, ends=False)


class _Template:
    """The chat template of a model, for one conversation."""

    def __init__(self, tokenizer: Any, conversation: Conversation) -> None:
        self.conversation = conversation
        self._tokenizer = tokenizer
        tools = conversation.tools
        self._tools = None if tools is None else [dict(tool) for tool in tools]
        if not tokenizer.chat_template:
            raise TextError(
                f"{conversation.place}: messages become text by a chat template, and {_home(tokenizer)} has none; put "
                'the chat_template.jinja of its chat model there, or give lines with "text"'
            )
        try:
            source: str = tokenizer.get_chat_template(None, self._tools)
        except Exception as error:
            raise self.wrong(error) from error
        self._more = {}
        if "strftime_now" in source:
            source, self._more = _CLOCK + source, {"DATES": _DATES}
        self._source = source
        self.marks_answers = _GENERATION.search(source) is not None

    def render(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str:
        """Return the text of messages; with `prompt`, up to where an answer begins."""
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tools=self._tools, chat_template=self._source, tokenize=False,
                add_generation_prompt=prompt, **self._more,
            )  # fmt: skip
        except Exception as error:  # a template is a program, and fails as programs do
            raise self.wrong(error) from error
        return str(text)

    def marked(self) -> tuple[str, list[Span]]:
        """Return the text of the conversation, and what the template marks in it."""
        render: Any = render_jinja_template
        try:
            texts, spans = render(
                [[dict(message) for message in self.conversation.messages]], tools=self._tools,
                chat_template=self._source, return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map, **self._more,
            )  # fmt: skip
        except Exception as error:
            raise self.wrong(error) from error
        return str(texts[0]), [(int(begin), int(end)) for begin, end in spans[0]]

    def wrong(self, error: Exception) -> TextError:
        """Return the error of a template that does not take the messages."""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return TextError(
            f"{self.conversation.place}: the chat template {_home(self._tokenizer, template=True)} does not take these "
            f"messages ({reason}); change the line, or the template"
        )

    def underivable(self, number: int) -> TextError:
        """Return the error of a template whose answers cannot be told from the rest; `number` of the message."""
        return TextError(
            f"{self.conversation.place}: where the answer of message {number + 1} stands cannot be derived from the "
            f"chat template {_home(self._tokenizer, template=True)}: mark them there with {{% generation %}} and "
            "{% endgeneration %}, or leave --on assistant out"
        )


def _home(tokenizer: Any, *, template: bool = False) -> str:
    """Return where a tokenizer, or its chat template, is from."""
    name = str(getattr(tokenizer, "name_or_path", "") or "")
    if not template:
        return name or "the tokenizer"
    file = "chat_template.jinja" if (Path(name) / "chat_template.jinja").is_file() else "tokenizer_config.json"
    return str(Path(name) / file) if name and Path(name).is_dir() else "of the tokenizer"


def _spans(template: _Template, text: str) -> Iterator[Span]:
    """Yield where the answers of a conversation are in its text."""
    conversation = template.conversation
    numbers = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    wanted = [number for number in numbers if number >= conversation.num_given]
    if template.marks_answers:
        marked_text, spans = template.marked()
        if marked_text == text and (len(wanted) == len(numbers) or len(spans) == len(numbers)):
            yield from spans[len(spans) - len(wanted) :] if len(wanted) < len(numbers) else spans
            return
    for number in wanted:
        span = _derived(template, number, text)
        if span is None:
            raise template.underivable(number)
        yield span


def _derived(template: _Template, number: int, text: str) -> Span | None:
    """Return where the answer in a message is, from renderings of prefixes; None where they do not tell."""
    message = template.conversation.messages[number]
    before = template.conversation.messages[:number]
    silent = [{key: value for key, value in each.items() if key not in _THINKING} for each in before]
    for prefix in (before, silent):
        try:
            context, asked, answered = (
                template.render(prefix), template.render(prefix, prompt=True), template.render([*prefix, message]),
            )  # fmt: skip
        except TextError:  # some take no conversation that begins, or ends, in this way
            continue
        begin = _common(text, asked)
        if not (text.startswith(context) and asked.startswith(context) and answered.startswith(text[:begin])):
            continue
        if begin == len(context) < len(asked):  # the prompt for an answer stands nowhere
            continue
        length = _length(text[begin:], answered[begin:], message)
        if length is not None:
            answer = text[begin : begin + length]
            return begin, begin + len(answer.rstrip())  # the line break between turns is written by nobody
    return None


def _length(rest: str, answer: str, message: Mapping[str, Any]) -> int | None:
    """Return how much of what follows is an answer that is `answer` where nothing follows it.

    Its begin may have been left out, and its end may be another one.
    """
    if rest.startswith(answer):
        return len(answer)
    needed = _needed(message)
    place = 0
    while place != -1 and place < len(answer):
        same = _common(rest, answer[place:])
        if same and all(part in rest[:same] for part in needed) and needed:
            return same
        place = answer.find(rest[:_PROBE], place + 1) if rest else -1
    return None


def _common(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if one[least:middle] == other[least:middle] else (least, middle - 1)
    return least


def _needed(message: Mapping[str, Any]) -> list[str]:
    """Return what an answer must hold to be the one of a message: what it says, and the tools that it calls."""
    content, calls = message.get("content"), message.get("tool_calls")
    parts = [content] if isinstance(content, str) else [part.get("text") for part in _objects(content)]
    names = [call.get("name") for call in _objects([call.get("function", call) for call in _objects(calls)])]
    said = [part.rpartition("</think>")[2] for part in parts if isinstance(part, str)]
    return [part.strip() for part in (*said, *names) if isinstance(part, str) and part.strip()]


def _objects(value: object) -> list[Mapping[str, Any]]:
    """Return the objects of a list; none of anything else."""
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list | tuple) else []
