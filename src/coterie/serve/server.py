"""The server of HTTP, which ends what is generated before it ends itself."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import uvicorn

from coterie.serve.worker import Worker

log = logging.getLogger(__name__)

#: Seconds that clients have to take what was made for them when the server ends.
_PATIENCE = 5


class Server(uvicorn.Server):
    """A server of HTTP, which ends generations before it waits for their clients."""

    def __init__(self, app: Any, worker: Worker, *, host: str, port: int) -> None:
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
