import json
from types import SimpleNamespace

import pytest
import torch

from coterie.errors import TextError
from coterie.evaluate.generation import MARGIN, Question, count_correct, first_lines, read_questions
from coterie.model.arch.load import load_model
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.testing import END_OF_TEXT_ID, tiny_tokenizer


class Rigged:
    """A stand-in for a model: writes what a table says after each prompt, with a stop check after every token."""

    device = torch.device("cpu")
    generation_config = SimpleNamespace(eos_token_id=END_OF_TEXT_ID)

    def __init__(self, written):
        self.tokenizer = tiny_tokenizer()
        self.written = written
        self.batches = []
        self.limits = set()
        self.arguments = {}

    def generate(self, *, input_ids, attention_mask, max_new_tokens, pad_token_id, stopping_criteria, **arguments):
        assert bool(attention_mask.all())
        self.batches.append(tuple(input_ids.shape))
        self.limits.add(max_new_tokens)
        self.arguments = arguments
        texts = [self.written[prompt] for prompt in self.tokenizer.batch_decode(input_ids)]
        rows = [self.tokenizer(text)["input_ids"] for text in texts]
        done = torch.zeros(len(rows), dtype=torch.bool)
        for step in range(max_new_tokens):
            following = torch.tensor([row[step] if step < len(row) else END_OF_TEXT_ID for row in rows])
            following = torch.where(done, torch.tensor(pad_token_id), following)
            input_ids = torch.cat((input_ids, following[:, None]), 1)
            done = done | stopping_criteria(input_ids, None) | (following == END_OF_TEXT_ID)
            if bool(done.all()):
                break
        self.steps = step + 1
        return input_ids


def lines_of(written, **arguments):
    model = Rigged(written)
    return model, first_lines(model, model.tokenizer, list(written), **({"max_new_tokens": 12} | arguments))


@pytest.mark.parametrize(
    ("written", "line"),
    [
        (" 95\nQ: 3", "95"),
        (" 95<|endoftext|>junk", "95"),
        ("95", "95"),
        ("\n95", ""),
        ("  95  \n", "95"),
        (" 95 and more text than fits", "95 and more"),
        (" çé\n", "çé"),
    ],
)
def test_the_line_ends_at_newline_end_of_text_or_limit(written, line):
    _, lines = lines_of({"Q:": written})
    assert lines == [line]


def test_generation_stops_once_every_row_has_its_line():
    model, lines = lines_of({"a:": "1\n", "b:": "123\n", "c:": "12\nxxxxxxxx"})
    assert lines == ["1", "123", "12"]
    assert model.steps == 4


def test_prompts_of_one_length_share_batches_and_keep_their_order():
    written = {"long one:": "1\n", "a:": "2\n", "b:": "3\n", "long two:": "4\n", "c:": "5\n"}
    model, lines = lines_of(written, batch_size=2)
    assert lines == ["1", "2", "3", "4", "5"]
    assert model.batches == [(2, 2), (1, 2), (2, 9)]


def test_the_search_is_greedy_whatever_the_model_came_with():
    model, _ = lines_of({"a:": "1\n"})
    assert model.arguments["do_sample"] is False
    assert model.arguments["num_beams"] == 1
    assert model.arguments["repetition_penalty"] == 1.0


def test_an_answer_counts_when_its_first_line_is_exactly_the_expected():
    written = {"1+1:": " 2\n", "2+2:": " 5\n", "3+3:": " 66\n", "4+4:": "8<|endoftext|>", "5+5:": " 10, I think\n"}
    questions = [
        Question(question=prompt, answer=answer)
        for prompt, answer in zip(written, [" 2", " 4", " 6", " 8", " 10"], strict=True)
    ]
    model = Rigged(written)
    assert count_correct(model, model.tokenizer, questions) == 2
    assert model.limits == {len(" 10\n") + MARGIN}


def test_no_question_asks_nothing():
    assert count_correct(None, None, []) == 0


def slow_line(model, tokenizer, prompt, steps):
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == END_OF_TEXT_ID:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n")[0].strip()


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_a_real_model_writes_what_a_slow_greedy_loop_writes(base_path, batch_size):
    model, tokenizer = load_model(base_path), load_tokenizer(base_path)
    prompts = [f"Q: {a} + {a * b} = ?\nA:" for a in (3, 17) for b in (2, 5, 11)]
    expected = [slow_line(model, tokenizer, prompt, 6) for prompt in prompts]
    assert len(set(expected)) > 1
    assert first_lines(model, tokenizer, prompts, max_new_tokens=6, batch_size=batch_size) == expected


def write(folder, text, name="math.qa.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_questions_are_read_by_domain(tmp_path):
    write(
        tmp_path,
        '{"question": "Q: 1?\\nA:", "answer": " 1"}\n\n{"question": "Q: 2?\\nA:", "answer": " zwei\u2028drei"}\n',
    )
    write(tmp_path, '{"question": "ping", "answer": "pong"}', name="chat.qa.jsonl")
    write(tmp_path, "no question", name="math.txt")
    asked = read_questions(tmp_path)
    assert list(asked) == ["chat", "math"]
    assert [question.answer for question in asked["math"]] == [" 1", " zwei\u2028drei"]


def test_a_larger_limit_contains_a_smaller_one(tmp_path):
    entries = [json.dumps({"question": f"{number}?", "answer": str(number)}) for number in range(20)]
    write(tmp_path, "\n".join(entries))
    drawn = {limit: read_questions(tmp_path, limit=limit, seed=4)["math"] for limit in (3, 8, 50)}
    assert [len(questions) for questions in drawn.values()] == [3, 8, 20]
    assert drawn[8][:3] == drawn[3]
    assert len({question.question for question in drawn[50]}) == 20
    assert read_questions(tmp_path, limit=3, seed=5)["math"] != drawn[3]
    assert read_questions(tmp_path, limit=0) == {}


@pytest.mark.parametrize(
    "line",
    [
        '{"question": "Q"',
        '{"question": "Q"}',
        '["Q", "A"]',
        "null",
        '{"question": "Q", "answer": 5}',
        '{"question": "", "answer": "5"}',
        '{"question": "Q", "answer": "  "}',
        '{"question": "Q", "answer": "two\\nlines"}',
    ],
)
def test_a_malformed_line_is_named(tmp_path, line):
    write(tmp_path, f'{{"question": "Q", "answer": "A"}}\n\n{line}\n')
    with pytest.raises(TextError, match=r"math\.qa\.jsonl, line 3"):
        read_questions(tmp_path)


def test_an_empty_question_file_is_refused(tmp_path):
    with pytest.raises(TextError, match="empty"):
        read_questions(write(tmp_path, "\n\n"))


def test_questions_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "math.qa.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(TextError, match="UTF-8"):
        read_questions(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(TextError, match="not a folder"):
        read_questions(tmp_path / "none")
