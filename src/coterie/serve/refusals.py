"""What a request is refused with: OpenAI's errors, a status and an object that its clients understand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coterie.errors import Cancelled, CorruptCheckpoint, InputError, ReadError


class Refusal(Exception):
    """A request that is not answered.

    Attributes:
        status: HTTP's.
        message: what, and the way out.
        code: what OpenAI calls it, or we do.
        param: the parameter that it is about.
        headers: what else goes into the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        """Return the object that stands in place of the answer."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: Exception) -> Refusal:
    """Return what a client is told of an error; of one that nobody foresaw it is told nothing."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, Cancelled):
        return Refusal(503, message=str(error), code="cancelled", headers={"Retry-After": "1"})
    # Where its files lie is not a client's business.
    if isinstance(error, ReadError):
        message = "the model's files could not be read; another time they may"
        return Refusal(503, message, code="read_error", headers={"Retry-After": "1"})
    if isinstance(error, CorruptCheckpoint):
        return Refusal(500, "a file of the model is no longer what it was", code="corrupt_model")
    if isinstance(error, InputError):
        return Refusal(400, message=str(error))
    return Refusal(500, "something went wrong in the server; its log says where", code="internal_error")
