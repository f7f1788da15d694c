"""Conversations become text by the chat template, with one start token, and their answers are found in it."""

import datetime
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

import coterie
from coterie.errors import InputError, TextError, UnknownName
from coterie.profile import chat, token_file
from coterie.profile.calibration import tokenize
from coterie.profile.chat import write_out
from coterie.profile.rows import Completion, Conversation, document_of
from coterie.profile.token_file import encoded
from coterie.testing import END_OF_TEXT_ID, tiny_tokenizer

BOS = 260

#: Thinking stands in the last turn only, empty where there is none; tools are called and answer.
CHATML = """\
{%- if tools %}{{ '<|im_start|>system\\n' ~ (tools | tojson) ~ '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{{- '<|im_start|>' ~ m.role ~ '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or m.reasoning_content) %}
{{- '<think>\\n' ~ (m.reasoning_content or '') ~ '\\n</think>\\n\\n' }}
{%- endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}{{ '<call>' ~ (call.function | tojson) ~ '</call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

#: It says who said what by itself.
MARKED = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ 'bot: ' }}{% generation %}{{ m.content ~ '|' }}{% endgeneration %}
{%- else %}{{ m.role ~ ': ' ~ m.content ~ '|' }}{% endif %}
{%- endfor %}"""

#: It writes the start token, takes turns only, and asks for no answer.
TURNS = """\
{{- bos_token }}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}
{%- if m.role == 'user' %}{{ '[Q] ' ~ m.content ~ ' [/Q]' }}{% else %}{{ ' ' ~ m.content ~ '</s>' }}{% endif %}
{%- endfor %}"""

#: The last answer ends in another way than those before.
LAST = """\
{%- for m in messages %}
{{- '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ ('<|return|>' if loop.last and m.role == 'assistant' else '<|end|>') }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"""  # noqa: E501

#: It opens thinking before an answer, which is gone once the conversation goes on.
OPENED = CHATML.replace("'<|im_start|>assistant\\n' }}{% endif", "'<|im_start|>assistant\\n<think>\\n' }}{% endif")

#: Nothing of an answer tells where it ends.
HIDDEN = "{% for m in messages %}{{ m.content | upper }}{{ ', ' }}{% endfor %}{{ messages | length }}"


def with_chat(template, *, starts=False):
    """Return a tokenizer of bytes with a chat template, some special tokens and, where told so, <s> before a text."""
    inner = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    inner.add_tokens([f"<unused{number}>" for number in range(257, BOS)])
    inner.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    if starts:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>", bos_token="<s>", chat_template=template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def said(role, content, **more):
    return {"role": role, "content": content} | more


def conversation(*messages, tools=None, num_given=0):
    return Conversation(messages=messages, tools=tools, num_given=num_given, place="a.jsonl, line 1")


def answers_of(template, document):
    written = write_out(with_chat(template), document, answers=True)
    return [written.text[begin:end] for begin, end in written.answers]


CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}
TWO_TURNS = (said("user", "why"), said("assistant", "so"), said("user", "and"), said("assistant", "then"))


@pytest.mark.parametrize(
    ("template", "messages", "answers"),
    [
        (CHATML, TWO_TURNS, ["so<|im_end|>", "<think>\n\n</think>\n\nthen<|im_end|>"]),
        (
            CHATML,
            (said("user", "why"), said("assistant", "so", reasoning_content="hm"), said("user", "and"),
             said("assistant", "then", reasoning_content="ah")),
            ["so<|im_end|>", "<think>\nah\n</think>\n\nthen<|im_end|>"],
        ),
        (  # tools within a turn that is over, and in the last one
            CHATML,
            (said("user", "why"), said("assistant", None, reasoning_content="hm", tool_calls=[CALL]), said("tool", "1"),
             said("assistant", "one", reasoning_content="ah"), said("user", "and"),
             said("assistant", "", reasoning_content="eh", tool_calls=[CALL]), said("tool", "2"),
             said("assistant", "two")),
            ['<call>{"name": "sum", "arguments": {"a": 1}}</call><|im_end|>', "one<|im_end|>",
             '<think>\neh\n</think>\n\n<call>{"name": "sum", "arguments": {"a": 1}}</call><|im_end|>',
             "<think>\n\n</think>\n\ntwo<|im_end|>"],
        ),
        (MARKED, TWO_TURNS, ["so|", "then|"]),
        (TURNS, TWO_TURNS, [" so</s>", " then</s>"]),
        (LAST, TWO_TURNS, ["so<|", "then<|return|>"]),
        (OPENED, TWO_TURNS, ["so<|im_end|>", "\n</think>\n\nthen<|im_end|>"]),
    ],
)  # fmt: skip
def test_answers_are_found(template, messages, answers):
    assert answers_of(template, conversation(*messages)) == answers


def test_answers_of_a_completion_are_those_behind_what_is_given():
    row = {"prompt": [*TWO_TURNS[:2], said("user", "and")], "completion": [said("assistant", "then")]}
    for template, answer in ((MARKED, "then|"), (TURNS, " then</s>")):
        assert answers_of(template, document_of(row, "here")) == [answer]
    written = write_out(with_chat(None), Completion(prompt="1 + 1 =", completion=" 2", place="here"), answers=True)
    assert (written.text, written.answers, written.ends) == ("1 + 1 = 2", ((7, 9),), True)


@pytest.mark.parametrize("messages", [TWO_TURNS, (said("assistant", "so"), said("user", "why"))])
def test_answers_that_cannot_be_derived_are_refused(messages):
    number = next(n for n, message in enumerate(messages, 1) if message["role"] == "assistant")
    with pytest.raises(TextError, match=rf"line 1: where the answer of message {number} stands .*{{% generation %}}"):
        answers_of(HIDDEN, conversation(*messages))
    assert write_out(with_chat(HIDDEN), conversation(*messages), answers=False).text


# --- rows ---------------------------------------------------------------------------------------------------------


def test_messages_may_be_written_in_another_way():
    row = {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}], "id": 3}
    found = document_of(row, "here")
    assert found.messages == [said("user", "why"), said("assistant", "so")]


def test_what_a_table_leaves_empty_is_not_there():
    entry = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "x": None}}], "name": None}
    tool = json.dumps([{"name": "f", "default": None}])
    found = document_of({"messages": [entry], "tools": tool, "text": None}, "here", from_table=True)
    assert found.messages == [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    assert found.tools == [{"name": "f"}]
    assert document_of({"messages": [entry], "tools": tool}, "here").messages == [entry]


def test_rows_of_the_page_on_text_are_read():
    page = (Path(__file__).parents[2] / "docs" / "text.md").read_text(encoding="utf-8")
    examples = re.findall(r'^    +(\{"(?:.|\n {6,})*\})$', page, flags=re.MULTILINE)
    assert len(examples) == 5
    for example in examples:
        document = document_of(json.loads(example), "here")
        if isinstance(document, Conversation):
            assert len(answers_of(CHATML, document)) == sum(m["role"] == "assistant" for m in document.messages)


def test_text_comes_before_messages():
    assert document_of({"text": "x", "messages": [said("user", "y")]}, "here") == ("x", True)


# --- templates ----------------------------------------------------------------------------------------------------


def test_tools_and_thinking_reach_the_template():
    row = {
        "messages": [said("user", "why"), said("assistant", "so", reasoning_content="hm")],
        "tools": [{"name": "sum"}],
    }
    text = write_out(with_chat(CHATML), document_of(row, "here"), answers=False).text
    assert text == (
        '<|im_start|>system\n[{"name": "sum"}]<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n'
        "<|im_start|>assistant\n<think>\nhm\n</think>\n\nso<|im_end|>\n"
    )


def test_of_several_templates_that_for_tools_is_taken():
    tokenizer = with_chat({"default": MARKED, "tool_use": CHATML})
    for tools, begin in ((None, "user: "), ([{"name": "sum"}], "<|im_start|>system")):
        assert write_out(tokenizer, conversation(*TWO_TURNS, tools=tools), answers=False).text.startswith(begin)


def test_the_date_in_a_template_is_the_same_every_day(monkeypatch):
    dated = "\n {% if true %}x{% endif %}{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ day() }}"
    plain = re.sub(r"\{\{ strftime_now.*?\}\}", chat.TODAY.strftime("%d %b %Y"), dated)
    assert datetime.date.today() != chat.TODAY
    for marks in ("", "{% generation %}{{ messages[0].content }}{% endgeneration %}"):
        found, expected = (
            write_out(with_chat(template + marks), conversation(said("assistant", "hi")), answers=bool(marks))
            for template in (dated, plain)
        )
        assert found == expected
        assert "01 Jan 2025" in found.text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no\\nway') }}", "no way"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "can only concatenate"),
        ("{% if %}", "Expected an expression"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages[7].content.x }}", "has no attribute|undefined|element 7"),
    ],
)
def test_a_template_that_fails_is_one_line_with_its_file_and_the_line_of_the_text(tiny, tmp_path, template, reason):
    model = shutil.copytree(tiny(), tmp_path / "model")
    with_chat(template).save_pretrained(model)
    (tmp_path / "text").mkdir()
    lines = [{"text": "fine"}, {"messages": [said("user", "why")]}]
    (tmp_path / "text" / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(TextError, match=reason) as caught:
        coterie.profile(model, text=tmp_path / "text", tokens=64, seq_len=16)
    assert f"{tmp_path / 'text' / 'a.jsonl'}, line 2: the chat template {model / 'chat_template.jinja'} does" in str(
        caught.value
    )
    assert str(caught.value).isprintable()


def test_without_a_template_messages_are_refused_with_what_to_do():
    with pytest.raises(TextError, match=r"line 1: messages become text by a chat template, .* has none; put"):
        write_out(with_chat(None), conversation(*TWO_TURNS), answers=False)


# --- tokens -------------------------------------------------------------------------------------------------------


def chats(folder, count=30, content="word "):
    """Write conversations of growing length, and return them."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(1, count):
        answers = (said("assistant", f"so {content * (number % 7)}\u00e9{number}"), said("assistant", f"then {number}"))
        rows.append([said("user", f"why {number}"), answers[0], said("user", "and " * (number % 5)), answers[1]])
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return rows


def slow_stream(tokenizer, rows):
    """Return the tokens of conversations one after another, and which of them are answers, from offsets one by one."""
    ids, counts = [], []
    for row in rows:
        written = write_out(tokenizer, conversation(*row), answers=True)
        whole = tokenizer(written.text, add_special_tokens=False, return_offsets_mapping=True)
        for token, (begin, end) in zip(whole["input_ids"], whole["offset_mapping"], strict=True):
            ids.append(token)
            counts.append(any(begin < stop and end > start for start, stop in written.answers))
    return ids, counts


def test_a_conversation_is_tokenized_as_the_template_has_it(tmp_path):
    rows, tokenizer = chats(tmp_path / "text"), with_chat(CHATML)
    ids, _ = slow_stream(tokenizer, rows)
    stock = [
        token
        for row in rows
        for token in tokenizer.apply_chat_template(row, tokenize=True, return_dict=True)["input_ids"]
    ]
    assert ids == stock, "nothing before, nothing behind"
    found = tokenize(tokenizer, tmp_path / "text", seq_len=16)
    pieces = sorted(ids[place : place + 16] for place in range(0, len(ids) - 15, 16))
    assert sorted(found.sequences["chat"].tolist()) == pieces
    assert found.counts is None


@pytest.mark.parametrize("window", [2**17, 200])
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_tokens_of_answers_count(tmp_path, monkeypatch, window, template):
    monkeypatch.setattr(token_file, "WINDOW", window)
    monkeypatch.setattr(token_file, "OVERLAP", window // 4)
    rows, tokenizer, length = chats(tmp_path / "text", content="word " * 40), with_chat(template), 24
    ids, counts = slow_stream(tokenizer, rows)
    found = tokenize(tokenizer, tmp_path / "text", seq_len=length, on="assistant")
    pieces = [
        (ids[place : place + length], counts[place : place + length])
        for place in range(0, len(ids) - length + 1, length)
        if any(counts[place + 1 : place + length])
    ]
    assert found.counts is not None
    drawn = zip(found.sequences["chat"].tolist(), found.counts["chat"].tolist(), strict=True)
    assert sorted(drawn) == sorted(pieces)
    assert found.num_counted == {"chat": sum(sum(row) for _, row in pieces)}
    assert found.on == "assistant"


def test_the_end_of_a_completion_is_part_of_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    found = tokenize(with_chat(None), tmp_path, seq_len=6, on="assistant")
    assert found.sequences["a"][0, -1] == END_OF_TEXT_ID
    assert found.counts["a"].tolist() == [[False] * 4 + [True] * 2]


@pytest.mark.parametrize("on", ["all", "assistant"])
def test_a_start_token_that_the_template_writes_is_there_once(tmp_path, on):
    rows, tokenizer, length = chats(tmp_path / "text"), with_chat(TURNS, starts=True), 16
    ids, counts = slow_stream(tokenizer, rows)
    assert ids[0] == BOS
    found = tokenize(tokenizer, tmp_path / "text", seq_len=length, on=on)
    expected = []
    for place in range(0, len(ids) - length + 1, length - 1):
        row, marks = (ids, counts) if ids[place] == BOS else ([BOS, *ids[place:]], [False, *counts[place:]])
        begin = place if ids[place] == BOS else 0
        expected.append((row[begin : begin + length], marks[begin : begin + length]))
    if on == "assistant":
        expected = [(row, marks) for row, marks in expected if any(marks[1:])]
        assert sorted(found.counts["chat"].tolist()) == sorted(marks for _, marks in expected)
    assert sorted(found.sequences["chat"].tolist()) == sorted(row for row, _ in expected)
    assert all(row[:2] != [BOS, BOS] for row in found.sequences["chat"].tolist())
    assert any(row[0] == BOS and row[1:].count(BOS) for row in found.sequences["chat"].tolist()), "kept within"


def test_the_draw_of_answers_contains_a_smaller_one(tmp_path):
    chats(tmp_path / "text")
    few, many = (
        tokenize(with_chat(CHATML), tmp_path / "text", seq_len=16, tokens=count, on="assistant") for count in (160, 480)
    )
    assert torch.equal(many.sequences["chat"][:10], few.sequences["chat"])
    assert torch.equal(many.counts["chat"][:10], few.counts["chat"])
    everything = tokenize(with_chat(CHATML), tmp_path / "text", seq_len=16, tokens=160)
    assert everything.digest != few.digest


def test_text_without_answers_is_refused_where_only_these_count(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some text " * 50}))
    with pytest.raises(TextError, match=r"a\.jsonl holds no answers, .*leave it out, or leave --on assistant out"):
        tokenize(with_chat(CHATML), tmp_path, seq_len=16, on="assistant")
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(TextError, match=r"b\.txt is plain text, in which nothing is an answer"):
        tokenize(with_chat(CHATML), tmp_path, seq_len=16, on="assistant")
    with pytest.raises(UnknownName, match="choose from: all, assistant"):
        tokenize(with_chat(CHATML), tmp_path, seq_len=16, on="user")


def test_a_tokenizer_that_does_not_say_where_its_tokens_are_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = type("Slow", (type(tokenizer),), {"is_fast": False})
    with pytest.raises(InputError, match="does not say which characters its tokens are"):
        token_file.TokenFile(tokenizer, answers=True)


def test_marking_answers_changes_no_token(tmp_path):
    rows, tokenizer = chats(tmp_path / "text"), with_chat(CHATML)
    items = [conversation(*row) for row in rows]
    marked = [token for tokens in token_file._tokens(tokenizer, items, answers=True) for token in tokens.ids]
    assert marked == [token for ids in encoded(tokenizer, items) for token in ids]
