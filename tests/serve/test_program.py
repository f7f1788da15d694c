"""The program as it is started, asked by OpenAI's own client and by curl."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

KEY = "k-123"
MESSAGES: list[Any] = [{"role": "user", "content": "Say anything."}]


@pytest.fixture(scope="module")
def program(model: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the program, and return it and its address."""
    command = [
        sys.executable, "-m", "coterie.cli.main", "serve", model, "--port", "0", "--host", "0.0.0.0",
        "--memory", "2GiB", "--context", "512",
    ]  # fmt: skip
    environment = os.environ | {"COTERIE_API_KEY": KEY}
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert started.stderr is not None
    lines = []
    for line in started.stderr:
        lines.append(line)
        if match := re.search(r"listening at http://0\.0\.0\.0:(\d+)", line):
            break
    else:
        pytest.fail("".join(lines))
    yield started, f"http://127.0.0.1:{match[1]}"
    if started.poll() is None:
        started.kill()
    started.wait()
    started.stderr.close()


@pytest.fixture
def client(program: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{program[1]}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def test_openai_s_client_gets_answers(client, model):
    [listed] = client.models.list().data
    assert listed.id == model.name
    ask = {"model": listed.id, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    assert len(whole.choices[0].logprobs.content) == 12
    pieces = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert said == whole.choices[0].message.content
    usage = pieces[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1  # of the first request
    text = client.completions.create(model=listed.id, prompt="one, two,", max_tokens=4, n=2, seed=1)
    assert [choice.index for choice in text.choices] == [0, 1]


def test_openai_s_client_understands_refusals(client, program, model):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=model.name, messages=MESSAGES, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_gets_a_stream(program):
    body = json.dumps({"messages": MESSAGES, "max_tokens": 5, "stream": True})
    headers = ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    command = ["curl", "-sSN", "--noproxy", "*", f"{program[1]}/v1/chat/completions", *headers, "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert json.loads(lines[0].removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_the_program_ends_when_it_is_interrupted_and_says_nothing_of_prompts(client, program, model):
    started, _ = program
    stream = client.chat.completions.create(model=model.name, messages=MESSAGES, max_tokens=500, stream=True, n=16)
    next(iter(stream))
    started.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError, match="the server ends"):
        list(stream)
    assert started.wait(30) == 130
    said = started.stderr.read()
    assert "Traceback" not in said
    assert MESSAGES[0]["content"] not in said
