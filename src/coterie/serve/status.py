"""What a server does at this moment: as JSON, and as a page that shows it and asks for it again and again.

The page is one file with all that it needs, and holds nothing by itself: what it shows it asks the server for, with the
key where there is one.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

import psutil

from coterie.model.stream.memory import peak_bytes
from coterie.run.engine import Runtime
from coterie.serve.metrics import OUTCOMES
from coterie.serve.worker import Worker

_PAGE = Path(__file__).with_name("status.html")


def status(runtime: Runtime, worker: Worker, *, name: str, started: float) -> dict[str, Any]:
    """Return what a server does.

    Args:
        runtime: the model.
        worker: generates with it.
        name: what clients call the model.
        started: when the server began, in seconds since the epoch.
    """
    now, budget, counters = time.time(), runtime.budget, runtime.residency.counters
    experts: dict[int, int] = {}
    for layer, _ in runtime.residency.records:
        experts[layer] = experts.get(layer, 0) + 1
    in_memory = runtime.residency.in_memory()
    sample = worker.metrics.registry.get_sample_value
    return {
        "model": name, "state": worker.state, "time": now, "uptime": now - started,
        "queue": {"running": worker.num_running, "waiting": worker.num_waiting, "limit": worker.queue},
        "requests": {outcome: sample("coterie_requests_total", {"outcome": outcome}) for outcome in OUTCOMES},
        "tokens": {
            "generated": sample("coterie_generated_tokens_total"), "prompt": sample("coterie_prompt_tokens_total"),
            "reused": sample("coterie_prompt_tokens_reused_total"),
        },
        "kv": {"tokens": sample("coterie_kv_tokens"), "limit": runtime.batch * runtime.context, "bytes": budget.cache},
        "memory": {"budget": budget.limit, "used": psutil.Process().memory_info().rss, "peak": peak_bytes()},
        "experts": {
            "hits": counters.hits, "misses": counters.misses, "evictions": counters.evictions,
            "read_bytes": counters.num_bytes, "wait_seconds": counters.wait_seconds,
            "slots": budget.num_slots, "count": sum(experts.values()),
        },
        "layers": [
            {"layer": layer, "count": count, "in_memory": in_memory[layer]} for layer, count in sorted(experts.items())
        ],
    }  # fmt: skip


def page() -> tuple[str, dict[str, str]]:
    """Return the page and the headers that let nothing but the page itself run or be loaded."""
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    text = _PAGE.read_text(encoding="utf-8").replace("{{ nonce }}", nonce)
    return text, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
