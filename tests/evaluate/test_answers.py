import json
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from coterie.evaluate.answers import (
    attempt_batches,
    attempts,
    first_attempts,
    right_in_batch,
    second_attempts,
    written_ids,
)
from coterie.evaluate.generation import Question, end_ids, finished_line, first_lines, read_questions
from coterie.evaluate.run import evaluate
from coterie.model.arch.load import load_model
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.model.stream import likelihood
from coterie.testing import END_OF_TEXT_ID, tiny_tokenizer

ENDS = {END_OF_TEXT_ID}


class Scripted:
    """A stand-in for a model that continues every prompt with a text of its own, token by token."""

    def __init__(self, tokenizer, written):
        self.written = {tuple(tokenizer(prompt)["input_ids"]): tokenizer(text)["input_ids"]
                        for prompt, text in written.items()}  # fmt: skip

    def head(self, ids_BS, output):
        """Return logits whose largest is the script's next token, wherever the script was followed so far."""
        first = int(output.last_hidden_state[0, 0])  # the stand-in's hidden state is the position
        whole_BS = output.whole_BS
        logits_BSV = torch.zeros(*ids_BS.shape, 300)
        for row, ids in enumerate(whole_BS.tolist()):
            for place in range(ids_BS.shape[1]):
                logits_BSV[row, place, self.following(tuple(ids[: first + place + 1]))] = 1
        return logits_BSV

    def following(self, ids):
        for prompt, text in self.written.items():
            so_far = list(ids[len(prompt) :])
            if ids[: len(prompt)] == prompt and so_far == text[: len(so_far)]:
                return [*text, END_OF_TEXT_ID][len(so_far)]
        return 7


class Output:
    """What a stand-in's base model returns: hidden states that are positions, and the ids that it has read."""

    whole_BS = None

    def __init__(self, last_hidden_state):
        self.last_hidden_state = last_hidden_state


def right_of(written, questions, tried, begun=None, tokens=10_000):
    tokenizer = tiny_tokenizer()
    model = Scripted(tokenizer, written)
    found = set()
    for batch, ids_BS in attempt_batches(tried, tokens=tokens):
        Output.whole_BS = ids_BS
        output = Output(torch.arange(ids_BS.shape[1]).repeat(len(ids_BS), 1))
        found |= right_in_batch(
            model.head, batch, ids_BS, output, questions, tokenizer=tokenizer, ends=ENDS, vocab_size=300, begun=begun
        )
    return found


def right(written, questions, tokens=10_000):
    """Return the questions that are answered: found at once, and in turns, which must be the same."""
    tried = attempts(tiny_tokenizer(), questions)
    found = right_of(written, questions, tried, tokens=tokens)
    begun = {}
    first = right_of(written, questions, first_attempts(tried), begun, tokens=tokens)
    second = second_attempts(tried, begun, first)
    assert first | right_of(written, questions, second, tokens=tokens) == found
    return found


@pytest.mark.parametrize(
    ("written", "is_right"),
    [
        (" 95\nQ: 3", True),
        (" 95<|endoftext|>junk", True),
        ("95\n", True),
        (" 95", True),
        (" 96\n", False),
        (" 9\n", False),
        (" 950\n", False),
        (" 95 and more\n", False),
        ("\n95\n", False),
        ("<|endoftext|>", False),
    ],
)
@pytest.mark.parametrize("answer", [" 95", "95", " 95 "])
def test_an_answer_is_right_when_the_model_would_write_it_and_no_more(written, answer, is_right):
    assert right({"Q:": written}, [Question(question="Q:", answer=answer)]) == ({0} if is_right else set())


@pytest.mark.parametrize("tokens", [1, 12, 10_000])
def test_questions_of_any_length_keep_their_numbers(tokens):
    written = {"1+1:": " 2\n", "a longer one:": " two\n", "2+2:": " 5\n", "3+3:": " six\n", "4:": "4"}
    answers = (" 2", " two", " 4", " six", " 4")
    questions = [Question(question=prompt, answer=answer) for prompt, answer in zip(written, answers, strict=True)]
    assert right(written, questions, tokens) == {0, 1, 3, 4}


def test_logits_of_some_positions_exist_at_a_time(monkeypatch):
    monkeypatch.setattr(likelihood, "BATCH_ELEMENTS", 1)
    assert right({"Q:": " ninety\n"}, [Question(question="Q:", answer=" ninety")]) == {0}


def test_an_answer_is_tried_with_a_space_before_it_and_without():
    tokenizer = tiny_tokenizer()
    found = attempts(tokenizer, [Question(question="Q:", answer="5 ")])
    assert [tokenizer.decode(attempt.ids) for attempt in found] == ["Q: 5", "Q:5"]
    assert {attempt.prompt_length for attempt in found} == {2}


class Merging:
    """A stand-in for a tokenizer with the tokens "ab" and "\\n." beside single letters."""

    eos_token_id = None

    def __call__(self, text, add_special_tokens=True):
        ids = []
        while text:
            size = 2 if text[:2] in ("ab", ".\n") else 1
            ids.append({"ab": 1000, ".\n": 1001}.get(text[:size]) or ord(text[0]))
            text = text[size:]
        return {"input_ids": ids}

    def decode(self, ids, **options):
        return "".join({1000: "ab", 1001: ".\n"}.get(token) or chr(token) for token in ids)


def test_an_answer_that_would_merge_with_its_question_is_tokenized_alone():
    found = attempts(Merging(), [Question(question="a", answer="bc")])
    assert [attempt.ids for attempt in found] == [tuple(map(ord, "a bc")), tuple(map(ord, "abc"))]


def test_a_last_letter_that_merges_with_the_newline_is_right():
    tokenizer = Merging()
    answer = tokenizer("yes.")["input_ids"]
    written = written_ids(answer, [*answer[:-1], 1001, 7])
    assert written == [*map(ord, "yes"), 1001]
    assert finished_line(tokenizer, written, set()) == "yes."
    assert finished_line(tokenizer, written[:-1], set()) is None


def test_what_is_written_ends_where_it_leaves_the_answer():
    assert written_ids([1, 2, 3], [1, 2, 3, 9]) == [1, 2, 3, 9]
    assert written_ids([1, 2, 3], [1, 5, 3, 9]) == [1, 5]
    assert written_ids([1, 2, 3], [4, 2, 3, 9]) == [4]


def test_only_second_attempts_that_can_succeed_are_made():
    questions = [Question(question=name, answer="95") for name in ("A:", "B:", "C:", "D:")]
    written = {"A:": " 95\n", "B:": "95\n", "C:": "94\n", "D:": "\n"}
    tried = attempts(tiny_tokenizer(), questions)
    begun = {}
    first = first_attempts(tried)
    assert [attempt.question for attempt in first] == [0, 1, 2, 3]
    done = right_of(written, questions, first, begun)
    assert done == {0}
    second = second_attempts(tried, begun, done)
    assert [attempt.question for attempt in second] == [1, 2]  # both begin with the 9
    assert right_of(written, questions, second) == {1}


@pytest.mark.long
def test_answers_in_turns_are_those_at_once(bundled, text_path, tmp_path, monkeypatch):
    questions = [asdict(entry) for entry in read_questions(bundled / "text" / "test", limit=12)["math"]]
    for entry in questions[:6]:  # the bundled model writes a space after such a prompt
        entry["question"], entry["answer"] = entry["question"] + " ", entry["answer"].strip()
    text = tmp_path / "text"
    shutil.copytree(text_path, text)
    (text / "prose.qa.jsonl").write_text("\n".join(map(json.dumps, questions)))
    [in_turns] = evaluate(bundled / "model", text=text, tokens=64, seq_len=32)
    monkeypatch.setattr("coterie.evaluate.evaluation.READ_AGAIN_BYTES", 0)
    [at_once] = evaluate(bundled / "model", text=text, tokens=64, seq_len=32)
    assert in_turns.domains == at_once.domains
    assert at_once.domains["prose"]["accuracy"] > 0


@pytest.mark.parametrize("ids", [3, [3, 5], None])
def test_what_ends_a_text_is_in_the_generation_config_and_the_tokenizer(ids):
    tokenizer = SimpleNamespace(eos_token_id=9)
    expected = {9} | ({3, 5} if isinstance(ids, list) else {ids} - {None})
    assert end_ids(SimpleNamespace(eos_token_id=ids), tokenizer) == expected
    assert end_ids(None, tokenizer) == {9}


@pytest.mark.long
def test_reading_finds_what_writing_gets_right(bundled, text_path, tmp_path):
    """The bundled model and its own questions; every fourth gets the answer of the one before, which is wrong."""
    questions = read_questions(bundled / "text" / "test", limit=24)["math"]
    for number in range(4, 24, 4):
        questions[number] = replace(questions[number], answer=questions[number - 1].answer)
    model, tokenizer = load_model(bundled / "model"), load_tokenizer(bundled / "model")
    lines = first_lines(model, tokenizer, [entry.question for entry in questions], max_new_tokens=8, batch_size=24)
    pairs = enumerate(zip(lines, questions, strict=True))
    written = {number for number, (line, entry) in pairs if line == entry.answer.strip()}
    assert 12 < len(written) < 24

    found = set()
    for batch, ids_BS in attempt_batches(attempts(tokenizer, questions), tokens=2048):
        with torch.no_grad():
            output = model.base_model(input_ids=ids_BS, use_cache=False)
            found |= right_in_batch(
                lambda ids_BS, output: model.lm_head(output.last_hidden_state), batch, ids_BS, output, questions,
                tokenizer=tokenizer, ends=end_ids(model.generation_config, tokenizer), vocab_size=8192,
            )  # fmt: skip
    assert found == written

    text = tmp_path / "text"
    shutil.copytree(text_path, text)
    (text / "prose.qa.jsonl").write_text("\n".join(json.dumps(asdict(entry)) for entry in questions))
    [card] = evaluate(bundled / "model", text=text, tokens=64, seq_len=32)
    assert card.domains["prose"]["accuracy"] == len(written) / 24
