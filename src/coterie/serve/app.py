"""The endpoints: what comes in over HTTP, and what goes out.

Pages of other sites, in a browser on this machine, get nothing done here: bodies must say that they are JSON, which a
page may not without leave, and no leave is given; and without a key, requests must name this machine itself, whatever
other name leads to it.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from coterie.run.engine import Runtime
from coterie.serve.address import LOOPBACK
from coterie.serve.answers import Answers
from coterie.serve.refusals import Refusal, refusal_of
from coterie.serve.requests import ChatRequest, CompletionRequest, read_request
from coterie.serve.status import page, status
from coterie.serve.tools import ToolForm, derive_tool_form
from coterie.serve.worker import Event, Job, Over, Worker, tell

#: Bytes of a request at most.
MOST_BYTES = 2**20

#: Seconds of silence after which a stream says that it is still there.
_SILENCE = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """What the endpoints stand on.

    Attributes:
        runtime: the model.
        worker: generates with it.
        name: what clients call the model.
        api_key: what they have to know, if anything.
        form: how the model calls functions, if that is known.
        started: when it began, in seconds.
    """

    runtime: Runtime
    worker: Worker
    name: str
    api_key: str | None
    form: ToolForm | None
    started: int


def make_app(runtime: Runtime, worker: Worker, *, name: str, api_key: str | None = None) -> FastAPI:
    """Return the application.

    Args:
        runtime: the model.
        worker: generates with it.
        name: what clients call the model.
        api_key: what they have to know; without it only names of this machine are answered to.
    """
    service = Service(
        runtime=runtime, worker=worker, name=name, api_key=api_key, form=derive_tool_form(runtime.tokenizer),
        started=int(time.time()),
    )  # fmt: skip
    worker.metrics.watch(runtime)
    # Threads use the tokenizer side by side from now on; the first call may still change its settings.
    runtime.ids("a", template=False)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    guarded = [Depends(_guard)]
    app.add_api_route("/", _page, methods=["GET"])
    app.add_api_route("/status", _status, methods=["GET"], dependencies=guarded)
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_api_route("/metrics", _metrics, methods=["GET"], dependencies=guarded)
    app.add_api_route("/v1/models", _models, methods=["GET"], dependencies=guarded)
    app.add_api_route("/v1/models/{name:path}", _model, methods=["GET"], dependencies=guarded)
    app.add_api_route("/v1/chat/completions", _chat, methods=["POST"], dependencies=guarded)
    app.add_api_route("/v1/completions", _completions, methods=["POST"], dependencies=guarded)
    app.add_exception_handler(Refusal, _refuse)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(ClientDisconnect, _refuse)
    return app


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _guard(request: Request) -> None:
    """Let those through who may ask."""
    key = _service(request).api_key
    if key is None:
        if _host_of(request) not in LOOPBACK:
            raise Refusal(
                403, "without --api-key the server answers to the names of its own machine alone", code="host"
            )
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise Refusal(
            401, "no API key, or not the one of this server; send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


def _host_of(request: Request) -> str | None:
    """Return the name by which the server is asked, without the port; None where that is no name."""
    match = re.fullmatch(r"\[([0-9a-f:]+)\](?::\d+)?|([\w.-]+)(?::\d+)?", request.headers.get("host", "").lower())
    return None if match is None else match[1] or match[2]


async def _refuse(request: Request, error: Exception) -> Response:
    refusal = refusal_of(error)
    return JSONResponse(refusal.to_json(), refusal.status, headers=refusal.headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {404: "there is nothing here", 405: "this is asked for in another way"}
    refusal = Refusal(error.status_code, messages.get(error.status_code, str(error.detail)), headers=error.headers)
    return await _refuse(request, refusal)


async def _health(request: Request) -> Response:
    """Say whether it works: with 503 where it does not."""
    service = _service(request)
    worker = service.worker
    content = {"status": worker.state, "running": worker.num_running, "waiting": worker.num_waiting}
    return JSONResponse(content, 200 if worker.state == "ready" else 503)


async def _page(request: Request) -> Response:
    text, headers = page()
    return HTMLResponse(text, headers=headers)


async def _status(request: Request) -> Response:
    service = _service(request)
    return JSONResponse(status(service.runtime, service.worker, name=service.name, started=service.started))


async def _metrics(request: Request) -> Response:
    content = await asyncio.to_thread(_service(request).worker.metrics.written)
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_description(_service(request))]})


async def _model(request: Request, name: str) -> Response:
    _check_model(_service(request), name)
    return JSONResponse(_description(_service(request)))


def _description(service: Service) -> dict[str, Any]:
    return {
        "id": service.name, "object": "model", "created": service.started, "owned_by": "coterie",
        "max_model_len": service.runtime.context,
    }  # fmt: skip


def _check_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.name:
        raise Refusal(
            404, f"this server has one model, {service.name}, and not the one that was asked for",
            code="model_not_found", param="model",
        )  # fmt: skip


async def _chat(request: Request) -> Response:
    return await _post(request, ChatRequest)


async def _completions(request: Request) -> Response:
    return await _post(request, CompletionRequest)


async def _post(request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
    try:
        return await _answer(request, read_request(kind, await _body(request)))
    except ClientDisconnect:
        raise
    except Refusal as refusal:
        if refusal.status < 500:
            outcome = "rejected" if refusal.status == 429 else "refused"
            _service(request).worker.metrics.requests.labels(outcome).inc()
        raise
    except Exception as error:  # the server would close the connection, and log what may be in the error's text
        tell(error)
        raise refusal_of(error) from None


async def _body(request: Request) -> bytes:
    """Return the body of a request, which is JSON and not too large."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "send JSON, with 'Content-Type: application/json'")
    too_large = Refusal(413, f"the request is larger than {MOST_BYTES:,} bytes", headers={"Connection": "close"})
    size = request.headers.get("content-length", "0")
    if size.isdigit() and int(size[:20]) > MOST_BYTES:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise too_large
    return bytes(body)


async def _answer(request: Request, asked: ChatRequest | CompletionRequest) -> Response:
    """Admit a request, line it up, and answer it, whole or as a stream."""
    service, events = _service(request), asyncio.Queue[Event]()
    _check_model(service, asked.model)
    loop = asyncio.get_running_loop()

    def emit(event: Event) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, event)

    job = service.worker.admit(emit)
    watch = asyncio.create_task(_watch(request, job))
    try:
        task = await asyncio.to_thread(asked.prepare, service.runtime, service.form)
        answers = Answers(
            model=service.name, is_chat=isinstance(asked, ChatRequest), prompt_tokens=task.prompt_tokens,
            count=task.count, per_prompt=task.num_answers, is_scored=task.top is not None,
        )  # fmt: skip
        job.begin(task)
        if asked.stream:
            pieces = _stream(job, watch, events, answers, include_usage=asked.include_usage)
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        while not isinstance(event := await events.get(), Over):
            answers.take(event)
    except BaseException as error:
        job.cancel(error if isinstance(error, Refusal) else None)
        watch.cancel()
        raise
    watch.cancel()
    if event.error is not None:
        raise refusal_of(event.error)
    return JSONResponse(answers.whole())


async def _watch(request: Request, job: Job) -> None:
    """Call a job off when its client goes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()


async def _stream(
    job: Job, watch: asyncio.Task[None], events: asyncio.Queue[Event], answers: Answers, *, include_usage: bool
) -> AsyncIterator[str]:
    """Yield server-sent events: the pieces of all answers; an error where one ends them, and else the usual end."""
    try:
        for piece in answers.beginning():
            yield _sent(piece)
        while True:
            try:
                event = await asyncio.wait_for(events.get(), _SILENCE)
            except TimeoutError:
                yield ": still here\n\n"
                continue
            if isinstance(event, Over):
                break
            answers.take(event)
            yield _sent(answers.piece(event))
        if event.error is not None:
            yield _sent(refusal_of(event.error).to_json())
            return
        if include_usage:
            yield _sent(answers.ending())
        yield "data: [DONE]\n\n"
    finally:
        watch.cancel()
        job.cancel()


def _sent(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
