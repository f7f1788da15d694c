"""A real server in a thread, of a tiny model, and a client that speaks HTTP with it."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")

from coterie.run.engine import Runtime
from coterie.run.leases import Leases
from coterie.serve.address import listen
from coterie.serve.app import make_app
from coterie.serve.server import Server
from coterie.serve.worker import Worker

NAME = "tiny-model"


class Gate:
    """Stops a runtime within a layer, on demand, where it asks for its experts.

    Attributes:
        layers: how many have begun.
        is_open: whether layers go on.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.layers = 0
        self.is_open = threading.Event()
        self.is_open.set()
        self._acquire = runtime.residency.acquire

    def acquire(self, layer: int, experts: Sequence[int]) -> Leases:
        self.layers += 1
        assert self.is_open.wait(20)
        return self._acquire(layer, experts)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it does not come"
            time.sleep(0.002)


@pytest.fixture(scope="session")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3_moe", num_hidden_layers=3)


@pytest.fixture(scope="session")
def runtime(model: Path) -> Iterator[Runtime]:
    """A runtime with room for some of the experts, so that others are read all the time."""
    with Runtime(model, memory="4GiB", context=512, most_experts=14) as runtime:
        yield runtime


@contextmanager
def listening(runtime: Runtime, *, queue: int = 2, **options: Any) -> Iterator[httpx.Client]:
    worker = Worker(runtime, queue=queue)
    server = Server(make_app(runtime, worker, name=NAME, **options), worker, host="127.0.0.1", port=0)
    address = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([address],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        with httpx.Client(
            base_url=f"http://127.0.0.1:{address.getsockname()[1]}", timeout=30, trust_env=False
        ) as client:
            client.worker = worker  # type: ignore[attr-defined]
            client.server = server  # type: ignore[attr-defined]
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
        address.close()
        assert not thread.is_alive()
        assert not worker._thread.is_alive()


@pytest.fixture
def gate(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(runtime)
    monkeypatch.setattr(runtime.residency, "acquire", gate.acquire)
    yield gate
    gate.is_open.set()


@pytest.fixture(scope="module")
def client(runtime: Runtime) -> Iterator[httpx.Client]:
    with listening(runtime) as client:
        yield client
