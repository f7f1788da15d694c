"""What the last bits of a result depend on beside model, text, settings and seed, and how a run keeps to it.

Sums are taken in another order with another number of threads, on another device, and perhaps with another version of
torch. So a run records all three. One that goes on does so with the threads that it began with, whatever is set now.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

log = logging.getLogger(__name__)

#: The most threads that a record may ask for.
_MOST = 4096


def numerics(device: str | torch.device) -> dict[str, str | int]:
    """Return what this process computes with: version of torch, device, and threads of the CPU."""
    kind = torch.device(device)
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else kind.type
    return {"torch": torch.__version__, "device": name, "threads": torch.get_num_threads()}


@contextmanager
def as_begun(begun: Mapping[str, object] | None, device: str, *, what: str) -> Iterator[dict[str, str | int]]:
    """Within the block, compute as a run that goes on began; warn where that cannot be.

    Args:
        begun: what `numerics` said then; None for a run that begins.
        device: where it computes.
        what: what goes on, for messages.

    Yields:
        What the run is computed with from its beginning.
    """
    now = numerics(device)
    if begun is None:
        yield now
        return
    for name in ("torch", "device"):
        if begun.get(name) != now[name]:
            log.warning(
                "%s was begun with %s %s and goes on with %s: bytes may differ from those of a run without a break",
                what, name, begun.get(name), now[name],
            )  # fmt: skip
    threads = begun.get("threads")
    if threads == now["threads"] or not isinstance(threads, int) or not 1 <= threads <= _MOST:
        yield now
        return
    log.info("%s was begun with %d threads and goes on with as many (now set: %d)", what, threads, now["threads"])
    torch.set_num_threads(threads)
    try:
        yield now | {"threads": threads}
    finally:
        torch.set_num_threads(int(now["threads"]))
