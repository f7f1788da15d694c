"""The numbers of a server, beside what the runtime itself counts."""

from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from .conftest import Gate, listening
from .test_server import asked, chat


def numbers(client: httpx.Client) -> dict[str, float]:
    """Return all samples by name, with labels as Prometheus writes them."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


@pytest.fixture
def client(runtime: Any):
    with listening(runtime, queue=0) as client:
        yield client


def test_what_is_counted_is_what_happened(client, runtime, gate: Gate):
    counters, before = runtime.residency.counters, numbers(client)
    assert before["coterie_requests_total{outcome=done}"] == 0
    usage = [chat(client, max_tokens=tokens, n=n).json()["usage"] for tokens, n in ((5, 1), (3, 2))]
    after, now = numbers(client), runtime.residency.counters
    assert after["coterie_requests_total{outcome=done}"] == 2
    assert after["coterie_generated_tokens_total"] == sum(each["completion_tokens"] for each in usage) == 11
    # A prompt with two answers counts twice.
    assert after["coterie_prompt_tokens_total"] == usage[0]["prompt_tokens"] + 2 * usage[1]["prompt_tokens"]
    assert after["coterie_time_to_first_token_seconds_count"] == 2
    assert after["coterie_inter_token_seconds_count"] == 4 + 2 * 2
    assert after["coterie_request_seconds_count"] == 2
    for name, counter in (("hits", "hits"), ("misses", "misses"), ("read_bytes", "num_bytes"), ("waits", "waits")):
        name = f"coterie_expert_{name}_total"
        assert after[name] == getattr(now, counter)
        assert after[name] - before[name] == getattr(now, counter) - getattr(counters, counter) > 0


def test_tokens_that_were_known_are_counted(client, runtime):
    runtime.forget()
    usage = [chat(client, max_tokens=3).json()["usage"] for _ in range(2)]
    after = numbers(client)
    assert after["coterie_prompt_tokens_total"] == sum(each["prompt_tokens"] for each in usage)
    assert after["coterie_prompt_tokens_reused_total"] == usage[0]["prompt_tokens"] - 1
    assert [each["prompt_tokens_details"]["cached_tokens"] for each in usage] == [0, usage[0]["prompt_tokens"] - 1]


def test_what_is_held_is_said(client, runtime, gate: Gate):
    samples, budget = numbers(client), runtime.budget
    assert samples["coterie_memory_budget_bytes"] == budget.limit
    parts = [value for name, value in samples.items() if name.startswith("coterie_memory_plan_bytes")]
    assert sum(parts) == budget.fixed + budget.num_slots * budget.slot
    assert 0 < samples["coterie_memory_used_bytes"] <= samples["coterie_memory_peak_bytes"]
    layers = [value for name, value in samples.items() if name.startswith("coterie_experts_in_memory")]
    assert len(layers) == 3
    assert sum(layers) == len(runtime.residency._entries)
    assert (samples["coterie_queue_limit"], samples["coterie_kv_tokens_limit"]) == (0, 512)
    assert (samples["coterie_requests_running"], samples["coterie_kv_tokens"]) == (0, 0)


def test_what_is_refused_is_no_failure_and_was_not_called_off(client):
    for more in ({"temperature": -1}, {"messages": [{"role": "user", "content": "x" * 600}]}, {"model": "other"}):
        assert chat(client, **more).status_code >= 400
    samples = numbers(client)
    requests = {name[31:-1]: value for name, value in samples.items() if name.startswith("coterie_requests_total{")}
    assert requests == {"done": 0, "failed": 0, "cancelled": 0, "rejected": 0, "refused": 3}
    assert samples["coterie_request_seconds_count"] == 0


def test_what_is_rejected_and_called_off_is_counted(client, gate: Gate):
    gate.is_open.clear()
    with asked(client, "/v1/completions", {"prompt": "x"}):
        gate.wait_until(lambda: gate.layers > 0)
        [job] = client.worker._jobs
        samples = numbers(client)
        assert (samples["coterie_requests_running"], samples["coterie_queue_waiting"]) == (1, 0)
        assert samples["coterie_kv_tokens"] == 1
        assert chat(client).status_code == 429
    gate.wait_until(job.cancelled.is_set)
    gate.is_open.set()
    gate.wait_until(lambda: not client.worker._jobs)
    gate.wait_until(lambda: numbers(client)["coterie_requests_total{outcome=cancelled}"] == 1)
    samples = numbers(client)
    assert samples["coterie_requests_total{outcome=rejected}"] == 1
    assert samples["coterie_requests_total{outcome=failed}"] == 0
