"""The server: a model loaded, an address listened at, and an end that leaves nothing behind."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from typing import Any

import uvicorn

from coterie.errors import InputError
from coterie.run.engine import LANES, Runtime, default_memory
from coterie.run.prepare import CONTEXT
from coterie.serve.app import LOOPBACK, make_app
from coterie.serve.worker import Worker

log = logging.getLogger(__name__)

HOST, PORT = "127.0.0.1", 8000

#: Requests that wait at most.
QUEUE = 8

#: Seconds that clients have to take what was made for them when the server ends.
_PATIENCE = 5


class Server(uvicorn.Server):
    """A server of HTTP, which ends generations before it waits for their clients."""

    def __init__(self, app: Any, worker: Worker, *, host: str = HOST, port: int = PORT) -> None:
        """Take an application; `run` listens until a signal comes, or `should_exit` is set.

        Args:
            app: answers requests.
            worker: what generates for it, which is closed at the end.
            host: the address.
            port: 0 for any that is free.
        """
        config = uvicorn.Config(
            app, host=host, port=port, lifespan="off", ws="none", log_level="critical", access_log=False,
            server_header=False, timeout_graceful_shutdown=_PATIENCE,
        )  # fmt: skip
        super().__init__(config)
        self._worker = worker

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        for server in self.servers:
            for each in server.sockets:
                host, port = each.getsockname()[:2]
                log.info("listening at http://%s:%d", f"[{host}]" if ":" in host else host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what is generated, and then connections."""
        await asyncio.to_thread(self._worker.close)
        await super().shutdown(sockets)


def serve(
    model: str | Path,
    *,
    memory: int | str | None = None,
    host: str = HOST,
    port: int = PORT,
    api_key: str | None = None,
    queue: int = QUEUE,
    context: int = CONTEXT,
    policy: str = "decay",
    lanes: int = LANES,
    lookahead: int = 0,
) -> None:
    """Answer requests of OpenAI's API with a model, within a budget of memory, until a signal comes.

    Args:
        model: a model folder, a GGUF file, a hub id, or a result of Coterie.
        memory: bytes, or an amount like "6GiB", that this process may take; three quarters of what is free when None.
        host: the address to listen at.
        port: the port.
        api_key: what clients have to send; needed where others than this machine reach the address.
        queue: requests that wait at most; more are refused.
        context: tokens of prompt and answer together, at most.
        policy: which experts stay in memory, see `coterie.run.engine.Runtime`.
        lanes: threads that read.
        lookahead: experts that are guessed and read ahead, see `coterie.run.engine.Runtime`.

    Raises:
        InputError: an address that others reach and no key, one that is taken, or a number out of range.
        NotEnoughMemory, ArchitectureMismatch, CorruptCheckpoint: see `coterie.run.engine.Runtime`.
    """
    check_address(host, port, api_key)
    if queue < 0:
        raise InputError(f"--queue {queue} must be 0 or more")
    listening = _listen(host, port)  # before minutes of loading
    try:
        limit = default_memory() if memory is None else memory
        with Runtime(model, memory=limit, context=context, policy=policy, lanes=lanes, lookahead=lookahead) as runtime:
            worker = Worker(runtime, queue=queue)
            try:
                app = make_app(runtime, worker, name=name_of(model), api_key=api_key)
                Server(app, worker, host=host, port=port).run(sockets=[listening])
            finally:
                worker.close()
    finally:
        listening.close()


def check_address(host: str, port: int, api_key: str | None) -> None:
    """Raise InputError for an address that others reach without a key, and for what is none."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port} must be between 0 and 65535")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise InputError("--api-key must be printable ASCII, with no space at its ends")
    if api_key is None and host not in LOOPBACK:
        raise InputError(
            f"--host {host} may be reached from other machines: give an --api-key that clients have to send, or listen "
            f"at {HOST}"
        )


def name_of(model: str | Path) -> str:
    """Return what clients call a model: the name of its folder or file, or its hub id."""
    path = Path(model)
    return path.resolve().name.removesuffix(".gguf") if path.exists() else str(model)


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, so that whoever asks too early waits instead of being sent away."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, TypeError, ValueError) as error:  # a name may be none in many ways
        listening.close()
        raise InputError(f"cannot listen at --host {host[:80]} --port {port}: {error}") from error
    return listening
