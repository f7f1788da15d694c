"""Probabilities of tokens, against a forward pass over the whole text."""

import pytest
import torch

from .conftest import NAME
from .test_server import MESSAGES, chat, error, events


@pytest.fixture(scope="module")
def expected(runtime):
    """Return the tokens of an answer, and the logarithms of all probabilities in their places."""
    from coterie.run.engine import Sampling

    ids_1S = runtime.ids(MESSAGES)
    tokens = runtime.generate_ids(ids_1S, max_tokens=12, sampling=Sampling(temperature=0))
    with torch.no_grad():
        logits_SV = runtime.model(torch.cat([ids_1S, torch.tensor([tokens])], 1)).logits[0]
    return tokens, logits_SV[ids_1S.shape[1] - 1 : -1].double().log_softmax(-1)


def test_probabilities_are_the_model_s_whatever_the_temperature(client, runtime, expected):
    tokens, logprobs_NV = expected
    for temperature in ({"temperature": 0}, {"temperature": 1.7, "top_k": 1}):
        content = chat(client, max_tokens=12, logprobs=True, top_logprobs=3, **temperature).json()
        scored = content["choices"][0]["logprobs"]["content"]
        assert [each["token"] for each in scored] == [runtime.tokenizer.decode([token]) for token in tokens]
        for each, token, logprob_V in zip(scored, tokens, logprobs_NV, strict=True):
            assert each["logprob"] == pytest.approx(float(logprob_V[token]), abs=1e-4)
            best = logprob_V.topk(3)
            assert [other["logprob"] for other in each["top_logprobs"]] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert [other["token"] for other in each["top_logprobs"]] == [
                runtime.tokenizer.decode([other]) for other in best.indices.tolist()
            ]
            assert each["bytes"] in (None, list(each["token"].encode()))


def test_a_stream_tells_the_same_tokens(client):
    ask = {"max_tokens": 12, "logprobs": True, "top_logprobs": 1}
    whole = chat(client, **ask).json()["choices"][0]["logprobs"]["content"]
    pieces = [piece["choices"][0]["logprobs"] for piece in events(chat(client, **ask, stream=True))[:-1]]
    assert [token for piece in pieces if piece for token in piece["content"]] == whole
    assert (
        chat(client, max_tokens=1, logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    )


def test_completions_have_them_in_columns(client, runtime):
    body = {"model": NAME, "prompt": "one, two", "max_tokens": 8, "temperature": 0, "logprobs": 2}
    runtime.forget()
    columns = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert {len(column) for column in columns.values()} == {8}
    assert columns["text_offset"] == [len("".join(columns["tokens"][:place])) for place in range(8)]
    for token, logprob, top in zip(
        *(columns[name] for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert max(top.values()) == logprob
        assert "\ufffd" in token or top[token] == logprob
    runtime.forget()  # for the same bits
    pieces = events(client.post("/v1/completions", json=body | {"stream": True}))[:-1]
    for name, column in columns.items():
        parts = [piece["choices"][0]["logprobs"] for piece in pieces]
        assert [each for part in parts if part for each in part[name]] == column


def test_tokens_of_a_stop_string_are_not_told(client):
    text = chat(client, max_tokens=20).json()["choices"][0]["message"]["content"]
    choice = chat(client, max_tokens=20, stop=text[5:7], logprobs=True).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    told = "".join(each["token"] for each in choice["logprobs"]["content"])
    assert "\ufffd" in told or told == choice["message"]["content"]


def test_likely_tokens_take_the_word(client):
    assert error(chat(client, top_logprobs=2), 400)["param"] == "top_logprobs"
    assert error(chat(client, logprobs=True, top_logprobs=21), 400)["param"] == "top_logprobs"
    assert error(client.post("/v1/completions", json={"prompt": "x", "logprobs": True}), 400)["param"] == "logprobs"
