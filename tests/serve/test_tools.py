"""Calls of functions: their form by the chat template, and out of what a model writes."""

import copy
import json
from typing import Any

import pytest

from coterie.run.engine import Runtime
from coterie.serve.tools import ToolForm, ToolText, derive_tool_form
from coterie.testing import tiny_tokenizer

from .conftest import listening
from .test_server import chat, error, events

#: Turns, and calls as JSON between marks, as several families have them; arguments are text, or what it says.
MARKED = """\
{%- if tools %}{{ '<|system|>tools: ' ~ tools|tojson ~ '\n' }}{% endif %}
{%- for m in messages %}{{ '<|' ~ m.role ~ '|>' }}{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}
{%- if m.content or not loop.first %}{{ '\n' }}{% endif %}
{{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments|tojson }}
{{- '}\n</tool_call>' }}{% endfor %}{{ '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
FORM = ToolForm(opening="<tool_call>", closing="</tool_call>", name="name", arguments="arguments")

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {
    "a": {"type": "number"}, "b": {"type": "number"}}}}}]  # fmt: skip
ASK = [{"role": "user", "content": "What is 2 + 3?"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


def tokenizer_with(template: str | None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_the_form_is_what_the_template_writes():
    assert derive_tool_form(tokenizer_with(MARKED)) == FORM
    other = (
        MARKED.replace("</tool_call>", "").replace("<tool_call>\n", "<|call|>").replace('"arguments"', '"parameters"')
    )
    assert derive_tool_form(tokenizer_with(other)) == ToolForm(
        opening="<|call|>", closing="", name="name", arguments="parameters"
    )


@pytest.mark.parametrize(
    "template",
    [
        None,
        tiny_tokenizer().chat_template,
        MARKED.replace("<tool_call>\n", "").replace("\n</tool_call>", ""),  # no marks
        MARKED.replace('{"name": "', '<function="'),  # no JSON
        "{{ raise_exception('no tools here') }}",
        # one call alone
        MARKED.replace(
            "{%- for call", "{%- if m.tool_calls|length > 1 %}{{ raise_exception('one') }}{% endif %}{%- for call"
        ),
    ],
)
def test_what_cannot_be_derived_is_not_guessed(template):
    assert derive_tool_form(tokenizer_with(template)) is None


def test_marks_that_would_be_left_out_of_the_text_are_none():
    tokenizer = tokenizer_with(MARKED)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>"]})
    assert derive_tool_form(tokenizer) is None


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("written", "said", "calls"),
    [
        ("nothing to call <tool", "nothing to call <tool", []),
        (f"Well,\n{CALL}", "Well,\n", [("add", {"a": 2, "b": 3})]),
        (f"{CALL}\n{CALL}\nand so on", "and so on", [("add", {"a": 2, "b": 3})] * 2),
        ('<tool_call>{"name": "now"}', "", [("now", {})]),  # cut off behind the object
        ("<tool_call>{broken</tool_call> x", "<tool_call>{broken</tool_call> x", []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ('<tool_call>{"name": "add", "argum', '<tool_call>{"name": "add", "argum', []),
        ('<tool_call>{"name": "é", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("é", {"x": 1})]),
    ],
)
def test_calls_are_told_from_text_however_it_comes(written, said, calls, size):
    text = ToolText(FORM)
    parts = [text.add(written[begin : begin + size]) for begin in range(0, len(written), size)]
    assert "".join([*parts, text.add("", is_last=True)]) == said
    assert [(call.name, json.loads(call.arguments)) for call in text.calls] == calls


def test_calls_without_a_mark_behind_them_end_where_the_next_begins():
    text = ToolText(ToolForm(opening="<|call|>", closing="", name="name", arguments="parameters"))
    said = [text.add(part) for part in ('so <|call|>{"name": "a"}<|ca', 'll|> {"name": "b", "parameters": {"x": 1}}')]
    assert [*said, text.add("", is_last=True)] == ["so ", "", ""]
    assert [(call.name, call.arguments) for call in text.calls] == [("a", "{}"), ("b", '{"x": 1}')]


@pytest.fixture
def client(runtime: Runtime, monkeypatch: pytest.MonkeyPatch):
    """A server of a model whose template has tools; what it writes is told by `client.writes`."""
    tokenizer = copy.deepcopy(runtime.tokenizer)
    tokenizer.chat_template = MARKED
    monkeypatch.setattr(runtime, "tokenizer", tokenizer)
    with listening(runtime) as client:

        def write(ids_1S: Any, *, on_token: Any, **_: Any) -> list[int]:
            client.prompt = tokenizer.decode(ids_1S[0])
            ids = [*tokenizer(client.writes).input_ids, *runtime.ends]
            for place, token in enumerate(ids):
                if on_token(token, None):
                    return ids[: place + 1]
            return ids

        monkeypatch.setattr(runtime, "generate_ids", write)
        yield client


def test_calls_come_as_openai_has_them(client):
    client.writes = f"I add.\n{CALL}\n{CALL}"
    [choice] = chat(client, messages=ASK, tools=TOOLS).json()["choices"]
    assert '"name": "add"' in client.prompt
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I add.\n"
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [
        {"name": "add", "arguments": '{"a": 2, "b": 3}'}
    ] * 2
    pieces = [piece["choices"][0] for piece in events(chat(client, messages=ASK, tools=TOOLS, stream=True))[:-1]]
    assert "".join(piece["delta"].get("content", "") for piece in pieces) == "I add.\n"
    calls = [call for piece in pieces for call in piece["delta"].get("tool_calls", [])]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "add"), (1, "add")]
    assert len({call["id"] for call in calls}) == 2
    assert pieces[-1]["finish_reason"] == "tool_calls"


def test_what_a_call_returned_goes_back_to_the_model(client):
    client.writes = "It is 5."
    called = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    messages = [
        *ASK, {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "5"}]},
    ]  # fmt: skip
    [choice] = chat(client, messages=messages, tools=TOOLS).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It is 5.", "stop")
    assert "tool_calls" not in choice["message"]
    assert f"{CALL}<|end|>\n<|tool|>5<|end|>" in client.prompt
    called["function"]["arguments"] = "{"
    assert error(chat(client, messages=messages), 400)["param"] == "messages"


def test_without_tools_nothing_is_a_call(client):
    client.writes = CALL
    for more in ({}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}):
        [choice] = chat(client, messages=ASK, **more).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
        assert "tools:" not in client.prompt


def test_what_cannot_be_is_refused(client, runtime):
    assert error(chat(client, tools=TOOLS, tool_choice="required"), 400)["param"] == "tool_choice"
    assert error(chat(client, tools=[{"type": "retrieval"}]), 400)["param"] == "tools"
    runtime.tokenizer.chat_template = tiny_tokenizer().chat_template
    with listening(runtime) as other:
        assert "leave tools out" in error(chat(other, tools=TOOLS), 400)["message"]
