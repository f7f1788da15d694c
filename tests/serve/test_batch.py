"""Requests that wait are answered together, each as it would be alone."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from coterie.run.engine import Runtime
from coterie.serve.worker import companions

from .conftest import Gate, listening
from .test_server import asked, break_reads, chat, error, events, forget_experts

TEXTS = ("Say anything.", "Say anything at all, please.", "Count.", "Say anything.")


@pytest.fixture(scope="module")
def runtime(model: Path) -> Iterator[Runtime]:
    with Runtime(model, memory="4GiB", context=256, most_experts=14, batch=4, dtype=torch.float32) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def client(runtime: Runtime) -> Iterator[httpx.Client]:
    with listening(runtime, queue=5) as client:
        yield client


class Caller(threading.Thread):
    """A request in a thread of its own."""

    def __init__(self, client: httpx.Client, gate: Gate, text: str, **more: Any) -> None:
        super().__init__()
        self.response: httpx.Response | None = None
        self._client, self._more = client, {"messages": [{"role": "user", "content": text}]} | more
        before = len(client.worker._waiting) + client.worker.num_running
        self.start()
        gate.wait_until(lambda: len(client.worker._waiting) + client.worker.num_running > before)

    def run(self) -> None:
        self.response = chat(self._client, **self._more)


def text_of(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["message"]["content"])


def test_answers_to_one_request_are_made_at_once_and_are_those_of_one_after_the_other(client, runtime, model):
    ask = {"temperature": 1.5, "max_tokens": 12, "seed": 3, "n": 6}
    with Runtime(model, memory="4GiB", context=256, dtype=torch.float32) as single, listening(single) as other:
        expected = chat(other, **ask).json()
    whole = chat(client, **ask).json()
    assert whole["choices"] == expected["choices"]
    assert whole["usage"] == expected["usage"]
    pieces = events(chat(client, **ask, stream=True))[:-1]
    for number, choice in enumerate(expected["choices"]):
        said = [each["delta"].get("content", "") for piece in pieces for each in piece["choices"]
                if each["index"] == number]  # fmt: skip
        assert "".join(said) == choice["message"]["content"]


def test_requests_that_wait_run_together_and_each_is_over_when_it_is(client, runtime, gate: Gate):
    expected = [text_of(chat(client, messages=[{"role": "user", "content": text}], max_tokens=8)) for text in TEXTS]
    gate.is_open.clear()
    first = Caller(client, gate, "Hello.", max_tokens=1)
    callers = [Caller(client, gate, text, max_tokens=8, stream=number == 1) for number, text in enumerate(TEXTS[:3])]
    long = Caller(client, gate, TEXTS[3], max_tokens=200)
    taken = []
    generate = runtime.generate_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "generate_batch", lambda wanted: taken.append(len(wanted)) or generate(wanted))
        gate.is_open.set()
        for number, caller in enumerate(callers):
            caller.join()
            assert long.is_alive()
            if number == 1:
                pieces = events(caller.response)[:-1]
                assert "".join(each["choices"][0]["delta"].get("content", "") for each in pieces) == expected[1]
            else:
                assert text_of(caller.response) == expected[number]
        assert client.get("/health").json()["running"] == 1
        first.join()
        long.join()
    assert text_of(long.response).startswith(expected[3])
    assert taken == [4]
    assert client.get("/health").json() == {"status": "ready", "running": 0, "waiting": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_leaves_the_others_of_a_batch(client, gate: Gate, stream):
    expected = text_of(chat(client, messages=[{"role": "user", "content": "Count."}], max_tokens=20))
    gate.is_open.clear()
    first = Caller(client, gate, "Hello.", max_tokens=1)
    other = Caller(client, gate, "Count.", max_tokens=20)
    body = {"messages": [{"role": "user", "content": "Say anything."}], "max_tokens": 200, "stream": stream}
    with asked(client, "/v1/chat/completions", body):
        gate.wait_until(lambda: len(client.worker._waiting) == 2)
        going = client.worker._waiting[-1]
        gate.is_open.set()
        first.join()
        gate.wait_until(lambda: going in client.worker._running)
    gate.wait_until(lambda: going not in client.worker._jobs)
    other.join()
    assert text_of(other.response) == expected
    assert not client.worker._jobs


def test_a_disk_error_ends_a_batch_and_the_next_one_passes(client, runtime, gate: Gate):
    expected = text_of(chat(client, messages=[{"role": "user", "content": "Count."}], max_tokens=5))
    gate.is_open.clear()
    first = Caller(client, gate, "Hello.", max_tokens=1)
    callers = [Caller(client, gate, "Count.", max_tokens=5) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        forget_experts(runtime)
        break_reads(patch, runtime)
        gate.is_open.set()
        for caller in (first, *callers):
            caller.join()
            assert error(caller.response, 503)["code"] == "read_error"
    assert text_of(chat(client, messages=[{"role": "user", "content": "Count."}], max_tokens=5)) == expected


def job(ids: list[int], answers: int = 1) -> Any:
    return SimpleNamespace(task=SimpleNamespace(prompts=[torch.tensor([ids])], count=answers))


def test_the_oldest_goes_and_with_it_those_that_begin_like_it_and_then_the_next_oldest():
    first = job([1, 2, 3, 4])
    old, like, wide, liker = job([9]), job([1, 2, 9]), job([1, 2, 3, 4], answers=3), job([1, 2, 3])
    waiting = [old, like, wide, liker]
    assert companions(first, waiting, 4) == [wide]
    assert companions(first, waiting, 3) == [liker, like]
    assert companions(first, waiting, 2) == [liker]
    assert companions(first, waiting, 7) == [wide, liker, like, old]
    assert companions(job([7], answers=3), [old, like], 2) == []
