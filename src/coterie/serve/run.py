"""The call: a model loaded, an address listened at, and an end that leaves nothing behind.

    coterie serve MODEL --memory 6GiB

What a server takes beside the rest is an extra, and imported when one is asked for.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from coterie.errors import InputError
from coterie.route.policy import RoutePolicy
from coterie.run.engine import LANES, Runtime, default_memory
from coterie.run.prepare import CONTEXT
from coterie.run.session_store import SIZE
from coterie.serve.address import HOST, PORT, check_address, listen

#: Requests that wait at most.
QUEUE = 8

#: What comes with the extra.
_EXTRA = ("fastapi", "prometheus_client", "pydantic", "uvicorn")


def serve(
    model: str | Path,
    *,
    memory: int | str | None = None,
    host: str = HOST,
    port: int = PORT,
    api_key: str | None = None,
    queue: int = QUEUE,
    context: int = CONTEXT,
    policy: str = "follow",
    lanes: int = LANES,
    lookahead: int = 0,
    batch: int = 1,
    draft: str = "off",
    route: RoutePolicy | str | Path | None = None,
    only_misses: bool = False,
    kv: str = "auto",
    sessions: str | Path | None = None,
    sessions_size: int | str = SIZE,
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
        batch: answers that are made at once, at most; memory is taken for so many.
        draft: who guesses tokens of an answer that is alone, see `coterie.run.engine.Runtime`.
        route: how many experts a token gets, see `coterie.run.engine.Runtime`.
        only_misses: leave out only experts that are not in memory.
        kv: how keys and values are kept, see `coterie.run.engine.Runtime`.
        sessions: folder of keys and values for another time, see `coterie.run.engine.Runtime`.
        sessions_size: bytes that it may take.

    Raises:
        InputError: an address that others reach and no key, one that is taken, a number out of range, or the extra
            [serve] is not installed.
        NotEnoughMemory, ArchitectureMismatch, CorruptCheckpoint: see `coterie.run.engine.Runtime`.
    """
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise InputError(f"a server takes {', '.join(missing)}: pip install 'coterie[serve]'")
    from coterie.serve.app import make_app
    from coterie.serve.server import Server
    from coterie.serve.worker import Worker

    check_address(host, port, api_key)
    if queue < 0:
        raise InputError(f"--queue {queue} must be 0 or more")
    listening = listen(host, port)  # before minutes of loading
    try:
        limit = default_memory() if memory is None else memory
        with Runtime(
            model, memory=limit, context=context, policy=policy, lanes=lanes, lookahead=lookahead, batch=batch,
            draft=draft, route=route, only_misses=only_misses, kv=kv, sessions=sessions, sessions_size=sessions_size,
        ) as runtime:  # fmt: skip
            worker = Worker(runtime, queue=queue)
            try:
                app = make_app(runtime, worker, name=name_of(model), api_key=api_key)
                Server(app, worker, host=host, port=port).run(sockets=[listening])
            finally:
                worker.close()
    finally:
        listening.close()


def name_of(model: str | Path) -> str:
    """Return what clients call a model: the name of its folder or file, or its hub id."""
    path = Path(model)
    return path.resolve().name.removesuffix(".gguf") if path.exists() else str(model)
