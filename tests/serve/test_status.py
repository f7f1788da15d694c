"""The status page without a browser, and the numbers behind it."""

import re

from coterie.run.engine import Runtime

from .conftest import NAME, listening
from .test_server import chat, error


def test_the_numbers_are_those_of_the_runtime(runtime: Runtime):
    with listening(runtime, queue=3) as client:
        runtime.forget()
        usage = chat(client, max_tokens=4).json()["usage"]
        content = client.get("/status").json()
        counters = runtime.residency.counters
        assert (content["model"], content["state"]) == (NAME, "ready")
        assert content["queue"] == {"running": 0, "waiting": 0, "limit": 3}
        assert content["requests"] == {"done": 1, "failed": 0, "cancelled": 0, "rejected": 0, "refused": 0}
        reused = usage["prompt_tokens_details"]["cached_tokens"]
        assert content["tokens"] == {"generated": 4, "prompt": usage["prompt_tokens"], "reused": reused}
        assert content["experts"]["hits"] == counters.hits
        assert content["experts"]["read_bytes"] == counters.num_bytes
        layers = {each["layer"]: each["in_memory"] for each in content["layers"]}
        assert layers == runtime.residency.in_memory()
        assert sum(map(len, layers.values())) == content["experts"]["slots"] < content["experts"]["count"]
        assert sum(each["count"] for each in content["layers"]) == len(runtime.residency.records)


def test_the_page_is_whole_and_lets_nothing_else_run(runtime: Runtime):
    with listening(runtime, api_key="s3cret") as client:
        response = client.get("/")
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert not re.findall(r"(?:src|href)=\"(?!data:)|https?://|@import|url\(", response.text)
        policy = response.headers["content-security-policy"]
        [nonce] = set(re.findall(r'nonce="([^"]+)"', response.text))
        assert f"script-src 'nonce-{nonce}'" in policy
        assert "default-src 'none'" in policy
        assert nonce not in client.get("/").text
        assert NAME not in response.text
        error(client.get("/status"), 401)
