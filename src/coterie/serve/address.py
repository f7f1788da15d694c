"""The address that a server listens at, and who reaches it."""

from __future__ import annotations

import socket

from coterie.errors import InputError

HOST, PORT = "127.0.0.1", 8000

#: Names of this machine.
LOOPBACK = ("127.0.0.1", "::1", "localhost")


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


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address; the server listens at it later.

    Raises:
        InputError: the address is none of this machine, or taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends every piece at once, instead of waiting 40 ms for more, only where a socket says that it is TCP.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, TypeError, ValueError) as error:  # a name may be none in many ways
        listening.close()
        raise InputError(f"cannot listen at --host {host[:80]} --port {port}: {error}") from error
    return listening
