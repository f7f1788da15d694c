"""A thousand requests, many of which go wrong in every way there is: nothing leaks, nothing hangs."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from coterie.errors import ReadError
from coterie.run.engine import Runtime

from .conftest import listening
from .test_server import chat, forget_experts

REQUESTS = 1000


@pytest.mark.long
def test_a_thousand_requests_with_faults_leave_nothing_behind(runtime: Runtime, monkeypatch: pytest.MonkeyPatch):
    draw, lock = random.Random(0), threading.Lock()
    submit = runtime.residency._reader.submit

    def faulty(record: Any, place: Any, **more: Any) -> Any:
        with lock:
            fails = draw.random() < 0.01
        if fails:
            raise ReadError("a fault that was made up")
        return submit(record, place, **more)

    with listening(runtime, queue=2) as client:
        expected = chat(client, max_tokens=4).json()["choices"]
        threads = threading.active_count()
        monkeypatch.setattr(runtime.residency._reader, "submit", faulty)

        def ask(number: int) -> str:
            kind = random.Random(number).choice(["whole", "stream", "leave", "bad"])
            try:
                if kind == "leave":
                    body = {"prompt": f"{number}" + "x" * 300, "max_tokens": 100, "stream": number % 2 == 0}
                    client.post("/v1/completions", json=body, timeout=0.02)
                    return "kept"
                if kind == "bad":
                    return str(chat(client, temperature=-1).status_code)
                messages = [{"role": "user", "content": f"{number} is new, so that nothing of it is known"}]
                response = chat(client, max_tokens=2, stream=kind == "stream", messages=messages)
            except httpx.TimeoutException:
                return "left"
            if response.status_code == 200 and kind == "stream":
                return "200" if response.text.endswith("data: [DONE]\n\n") else "503"
            return str(response.status_code)

        with ThreadPoolExecutor(4) as pool:
            outcomes = list(pool.map(ask, range(REQUESTS)))
        counts = {outcome: outcomes.count(outcome) for outcome in set(outcomes)}
        assert counts.keys() <= {"200", "400", "429", "503", "left", "kept"}
        assert min(counts.get(outcome, 0) for outcome in ("200", "400", "429", "503", "left")) > 3, counts
        monkeypatch.undo()
        assert client.worker._thread.is_alive()
        for _ in range(1000):
            if not client.worker._jobs:
                break
            threading.Event().wait(0.01)
        assert not client.worker._jobs
        residency = runtime.residency
        assert not residency._num_pinned
        assert len(residency._entries) + len(residency._free) == runtime.budget.num_slots
        assert chat(client, max_tokens=4).json()["choices"] == expected
        forget_experts(runtime)
        assert chat(client, max_tokens=4).json()["choices"] == expected
        assert threading.active_count() <= threads + 8  # threads that read prompts are kept for the next ones
