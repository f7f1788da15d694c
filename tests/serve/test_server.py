"""The server over real sockets, of a real model whose experts are read as they are needed."""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from coterie.errors import InputError
from coterie.run import weight_file
from coterie.run.engine import Runtime, Sampling
from coterie.serve.address import check_address, listen
from coterie.serve.app import MOST_BYTES

from .conftest import NAME, Gate, listening

JSON = {"content-type": "application/json"}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say anything."}]


def chat(client: httpx.Client, **more: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"model": NAME, "messages": MESSAGES, "temperature": 0} | more)


def events(response: httpx.Response) -> list[Any]:
    """Return what a stream of server-sent events holds."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    content = response.json()
    assert content.keys() == {"error"}
    assert content["error"].keys() == {"message", "type", "param", "code"}
    return content["error"]


def test_a_conversation_goes_on_as_the_runtime_would(client, runtime):
    runtime.forget()
    content = chat(client, max_tokens=12).json()
    expected = runtime.generate(MESSAGES, max_tokens=12, sampling=Sampling(temperature=0))
    [choice] = content["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert (content["object"], content["model"]) == ("chat.completion", NAME)
    assert choice["finish_reason"] == "length"
    prompt_tokens = runtime.ids(MESSAGES).shape[1]
    assert content["usage"] == {
        "prompt_tokens": prompt_tokens, "completion_tokens": 12, "total_tokens": prompt_tokens + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip


def test_a_second_turn_is_computed_from_where_the_first_one_ended(client, runtime):
    runtime.forget()
    first = chat(client, max_tokens=12).json()
    told = first["choices"][0]["message"]
    messages = [*MESSAGES, told, {"role": "user", "content": "And then?"}]
    second = chat(client, messages=messages, max_tokens=12).json()
    known = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    prompt_tokens = first["usage"]["prompt_tokens"]
    assert prompt_tokens <= known < second["usage"]["prompt_tokens"]
    runtime.forget()
    assert chat(client, messages=messages, max_tokens=12).json()["choices"] == second["choices"]
    # Of several answers to one prompt, the first one says what was there beforehand.
    runtime.forget()
    twice = chat(client, max_tokens=3, n=2, stream=True, stream_options={"include_usage": True})
    assert events(twice)[-2]["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    again = chat(client, max_tokens=3, n=2).json()["usage"]
    assert again["prompt_tokens_details"] == {"cached_tokens": prompt_tokens - 1}


def test_a_stream_is_the_whole_answer_in_pieces(client):
    whole = chat(client, max_tokens=12).json()
    pieces = events(chat(client, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert pieces.pop() == "[DONE]"
    last = pieces.pop()
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len({piece["id"] for piece in pieces}) == 1
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    choices = [choice for piece in pieces for choice in piece["choices"]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert len(choices) > 4
    assert (
        "".join(choice["delta"].get("content", "") for choice in choices) == (whole["choices"][0]["message"]["content"])
    )
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]


def test_a_text_goes_on_without_the_template(client, runtime):
    body = {"model": NAME, "prompt": "one, two,", "temperature": 0, "max_tokens": 9}
    whole = client.post("/v1/completions", json=body).json()
    expected = runtime.generate("one, two,", template=False, max_tokens=9, sampling=Sampling(temperature=0))
    assert (whole["choices"][0]["text"], whole["object"]) == (expected.text, "text_completion")
    pieces = events(client.post("/v1/completions", json=body | {"stream": True}))[:-1]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected.text
    ids = runtime.tokenizer("one, two,").input_ids
    assert client.post("/v1/completions", json=body | {"prompt": ids}).json()["choices"] == whole["choices"]


def test_the_same_seed_draws_the_same_and_answers_of_one_request_differ(client):
    ask = {"temperature": 1.5, "max_tokens": 16, "seed": 3, "n": 3}
    first, second = (chat(client, **ask).json()["choices"] for _ in range(2))
    assert first == second
    assert [choice["index"] for choice in first] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in first}) == 3
    pieces = events(chat(client, **ask, stream=True))[:-1]
    for number in range(3):
        text = "".join(
            choice["delta"].get("content", "") for piece in pieces for choice in piece["choices"]
            if choice["index"] == number
        )  # fmt: skip
        assert text == first[number]["message"]["content"]


def test_several_prompts_are_answered_in_their_order(client):
    body = {"model": NAME, "temperature": 0, "max_tokens": 5}
    alone = [client.post("/v1/completions", json=body | {"prompt": text}).json() for text in ("left", "right")]
    both = client.post("/v1/completions", json=body | {"prompt": ["left", "right"]}).json()
    assert [choice["text"] for choice in both["choices"]] == [each["choices"][0]["text"] for each in alone]
    assert both["usage"]["total_tokens"] == sum(each["usage"]["total_tokens"] for each in alone)


def test_an_answer_ends_before_a_stop_string_and_saves_the_rest(client):
    text = chat(client, max_tokens=40).json()["choices"][0]["message"]["content"]
    stop = text[4:6]
    content = chat(client, max_tokens=40, stop=[stop, "never comes"]).json()
    [choice] = content["choices"]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert content["usage"]["completion_tokens"] < 40


def test_the_model_s_own_end_is_a_stop(client, runtime, monkeypatch):
    tokens = runtime.generate_ids(runtime.ids(MESSAGES), max_tokens=9, sampling=Sampling(temperature=0))
    first = tokens.index(tokens[5])
    monkeypatch.setattr(runtime.model.generation_config, "eos_token_id", [tokens[5]])
    content = chat(client, max_tokens=40).json()
    assert content["choices"][0]["finish_reason"] == "stop"
    assert content["usage"]["completion_tokens"] == first + 1
    assert content["choices"][0]["message"]["content"] == runtime.tokenizer.decode(tokens[:first])


def test_there_is_one_model(client):
    content = client.get("/v1/models").json()
    assert [each["id"] for each in content["data"]] == [NAME]
    assert client.get(f"/v1/models/{NAME}").json() == content["data"][0]
    assert error(client.get("/v1/models/some/other"), 404)["code"] == "model_not_found"
    assert error(chat(client, model="other"), 404)["param"] == "model"


def test_health_says_that_it_is_ready(client):
    response = client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ready", "running": 0, "waiting": 0})


@pytest.mark.parametrize(
    ("more", "param", "says"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages", "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages", "text"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": -1}, "temperature", "greater"),
        ({"top_p": 1.5}, "top_p", "less"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"n": 17}, "n", "less"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": ["x"] * 5}, "stop", "at most 4"),
        ({"frequency_penalty": 1}, "frequency_penalty", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"temprature": 1}, "temprature", "unknown parameter"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "600"),
    ],
)
def test_a_bad_request_is_refused_with_what_is_wrong(client, more, param, says):
    said = error(chat(client, **more), 400)
    assert (said["param"], said["type"]) == (param, "invalid_request_error")
    assert says in said["message"] or param == "messages"


@pytest.mark.parametrize("prompt", [[], [[]], [3, -1], [3, 10**6], "x" * 600, [3] * 600, ["a"] * 17, 5, ""])
def test_prompts_that_are_none_are_refused(client, prompt):
    assert error(client.post("/v1/completions", json={"prompt": prompt}), 400)


def test_messages_take_a_chat_template(client, runtime, monkeypatch):
    monkeypatch.setattr(runtime.tokenizer, "chat_template", None)
    said = error(chat(client), 400)["message"]
    assert "/v1/completions" in said
    assert str(runtime.path) not in said


def test_what_asks_for_nothing_is_let_through(client):
    assert chat(
        client, max_tokens=1, frequency_penalty=0, user="u", response_format={"type": "text"}, tools=None
    ).is_success


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", JSON, 400),
        (b"[" * 100_000, JSON, 400),
        (b'{"messages": "\xff"}', JSON, 400),
        (b"", {"content-type": "application/json; charset=utf-8"}, 400),
        (b'{"prompt": "x", "messages": [{"role": "user", "content": "\\ud800"}]}', JSON, 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "\\ud800": 1}', JSON, 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": NaN}', JSON, 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": 1e999}', JSON, 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "' + b"y" * 9999 + b'": 1}', JSON, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b" " * (MOST_BYTES + 1), JSON, 413),
    ],
)
def test_a_body_that_is_no_request_is_refused(client, content, headers, status):
    error(client.post("/v1/chat/completions", content=content, headers=headers), status)


def test_a_body_without_a_length_is_cut_off_too(client):
    parts = (b" " * 2**16 for _ in range(17))
    error(client.post("/v1/completions", content=parts, headers=JSON), 413)


def test_other_paths_and_methods_are_refused_in_the_same_form(client):
    error(client.get("/v1/nothing"), 404)
    error(client.get("/v1/completions"), 405)


def test_without_a_key_only_this_machine_s_names_are_answered_to(client):
    for host in ("evil.example", "127.0.0.1.evil.example", "[", "[::1", ""):
        assert error(client.get("/v1/models", headers={"host": host}), 403)["code"] == "host"
    assert client.get("/v1/models", headers={"host": "[::1]:8000"}).is_success
    assert client.get("/v1/models", headers={"host": "localhost:1"}).is_success


def test_with_a_key_it_has_to_be_sent(runtime):
    with listening(runtime, api_key="s3cret") as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            assert error(client.get("/v1/models", headers=headers), 401)["code"] == "invalid_api_key"
            assert error(client.post("/v1/completions", json={"prompt": "x"}, headers=headers), 401)
        assert client.get("/v1/models", headers={"authorization": "Bearer s3cret", "host": "a.example"}).is_success
        assert client.get("/health").is_success


@pytest.mark.parametrize(
    ("host", "port", "key", "says"),
    [
        ("0.0.0.0", 8000, None, "--api-key"), ("::", 8000, None, "--api-key"), ("::1", 70000, None, "--port"),
        ("localhost", 8000, " ", "--api-key"),
    ],
)  # fmt: skip
def test_an_address_that_others_reach_takes_a_key(host, port, key, says):
    check_address("0.0.0.0", 8000, "key")
    with pytest.raises(InputError, match=says):
        check_address(host, port, key)


def test_pieces_of_a_stream_do_not_wait_for_each_other():
    with listen("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP  # or asyncio leaves Nagle's algorithm on
        listening.listen()
        with pytest.raises(InputError, match=r"cannot listen at --host 127\.0\.0\.1 --port"):
            listen("127.0.0.1", listening.getsockname()[1])
    with pytest.raises(InputError, match="--host nowhere"):
        listen("nowhere.invalid", 0)


@contextmanager
def asked(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[None]:
    """Send a request, and go away with the end of the block without having read an answer."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(content)}", "", ""]
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall("\r\n".join(lines).encode() + content)
        yield


class Caller(threading.Thread):
    """A request in a thread of its own."""

    def __init__(self, client: httpx.Client, **more: Any) -> None:
        super().__init__()
        self.response: httpx.Response | None = None
        self._client, self._more = client, more
        self.start()

    def run(self) -> None:
        self.response = chat(self._client, max_tokens=3, **self._more)


def test_a_full_queue_is_said_at_once(client, gate: Gate):
    gate.is_open.clear()
    callers = [Caller(client, stream=number % 2 == 0) for number in range(3)]  # one runs, two wait
    gate.wait_until(lambda: client.worker.num_running and client.worker.num_waiting == 2)
    assert client.get("/health").json() == {"status": "ready", "running": 1, "waiting": 2}
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        response = chat(client)
        seconds.append(time.perf_counter() - begun)
        assert error(response, 429)["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
    assert min(seconds) < 0.05  # on a busy machine some take longer
    gate.is_open.set()
    for caller in callers:
        caller.join()
        assert caller.response.is_success
    assert chat(client, max_tokens=1).is_success


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_while_running_is_called_off_before_the_next_layer(client, gate: Gate, stream):
    gate.is_open.clear()
    body = {"messages": MESSAGES, "max_tokens": 400, "stream": stream}
    with asked(client, "/v1/chat/completions", body):
        gate.wait_until(lambda: gate.layers > 0)
        [job] = client.worker._jobs
        assert not job.cancelled.is_set()
    gate.wait_until(job.cancelled.is_set)
    before = gate.layers
    gate.is_open.set()
    gate.wait_until(lambda: not client.worker._jobs)
    assert gate.layers == before
    assert chat(client, max_tokens=1).is_success


def test_who_goes_away_while_waiting_makes_room(client, gate: Gate):
    gate.is_open.clear()
    first = Caller(client)
    gate.wait_until(lambda: client.worker.num_running)
    with asked(client, "/v1/completions", {"prompt": "x"}):
        gate.wait_until(lambda: client.worker.num_waiting == 1)
    gate.wait_until(lambda: client.worker.num_waiting == 0)
    gate.is_open.set()
    first.join()
    assert first.response.is_success


def break_reads(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> None:
    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(weight_file.os, "preadv", fail)


def forget_experts(runtime: Runtime) -> None:
    """Let everything that is not in use go, so that it has to be read again."""
    residency = runtime.residency
    with residency._changed:
        for entry in list(residency._entries.values()):
            residency._drop(entry)


@pytest.mark.parametrize("stream", [False, True])
def test_a_disk_error_ends_the_request_that_met_it_and_no_other(client, runtime, stream, caplog):
    expected = chat(client, max_tokens=6).json()["choices"]
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.DEBUG, "coterie"):
        forget_experts(runtime)
        break_reads(patch, runtime)
        response = chat(client, max_tokens=6, stream=stream)
        said = events(response)[-1]["error"] if stream else error(response, 503)
        assert (said["type"], said["code"]) == ("server_error", "read_error")
        assert os.sep not in said["message"]
    assert MESSAGES[1]["content"] not in caplog.text
    assert chat(client, max_tokens=6).json()["choices"] == expected


def test_a_server_whose_requests_all_fail_is_not_well_until_one_passes(client, runtime):
    with pytest.MonkeyPatch.context() as patch:
        forget_experts(runtime)
        break_reads(patch, runtime)
        for _ in range(3):
            error(chat(client, max_tokens=2), 503)
        assert error_free(client.get("/health")) == (503, "degraded")
    assert chat(client, max_tokens=2).is_success
    assert error_free(client.get("/health")) == (200, "ready")


def error_free(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["status"]


def test_a_mistake_of_ours_is_a_500_that_tells_nothing_and_is_logged_without_its_text(client, monkeypatch, caplog):
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError(MESSAGES[1]["content"])

    with monkeypatch.context() as patch, caplog.at_level(logging.DEBUG):
        patch.setattr(Runtime, "generate_ids", fail)
        assert error(chat(client), 500)["code"] == "internal_error"
        patch.setattr("coterie.serve.app.read_request", fail)
        assert error(chat(client), 500)["code"] == "internal_error"
    assert caplog.text.count("failed with ZeroDivisionError") == 2
    assert MESSAGES[1]["content"] not in caplog.text
    assert chat(client, max_tokens=1).is_success


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_of_the_server_ends_what_runs_and_what_waits(runtime, gate: Gate, stream):
    gate.is_open.clear()
    with listening(runtime) as client:
        callers = [Caller(client, stream=stream) for _ in range(2)]
        gate.wait_until(lambda: len(client.worker._waiting) == 1 and client.worker.num_running)
        client.server.should_exit = True
        gate.wait_until(lambda: client.worker.state == "closing")
        gate.is_open.set()
        for caller in callers:
            caller.join()
            said = events(caller.response)[-1]["error"] if stream else error(caller.response, 503)
            assert said["code"] == "cancelled"
