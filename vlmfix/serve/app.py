"""The routes: OpenAI's chat completions and models, and `/health` and `/metrics` for whoever looks after the server."""

from __future__ import annotations

import asyncio
import secrets
import traceback
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

import vlmfix
from vlmfix.serve.methods import Offer
from vlmfix.serve.wire import Asked, Refused, choice, chunk, completion, event, read_request, usage
from vlmfix.serve.worker import Ticket, Worker

MAX_BODY = 64_000_000
"""Bytes of a request."""
LOOK_S = 0.25
"""How often it is looked whether a client that waits is still there."""


def build(worker: Worker, offer: Offer, *, api_key: str | None = None, max_body: int = MAX_BODY) -> FastAPI:
    """The server's application. With an `api_key`, requests to `/v1` must carry it."""

    @asynccontextmanager
    async def closing(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    app = FastAPI(title="vlmfix", version=vlmfix.__version__, docs_url=None, redoc_url=None, lifespan=closing)
    served: Counter[tuple[str, int]] = Counter()

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if api_key is not None and not secrets.compare_digest(given, api_key.encode()):
            raise Refused("the API key is missing or wrong", 401, "authentication_error")

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        served[request.url.path, error.status] += 1
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(HTTPException)
    async def not_found(_: Request, error: HTTPException) -> Response:
        sentence = f"{error.detail}; there is POST /v1/chat/completions, and GET /v1/models, /health and /metrics"
        return JSONResponse(Refused(sentence).body(), error.status_code)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(_metrics(worker, served), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request)
        about = {"object": "model", "created": 0, "owned_by": "vlmfix"}
        return {"object": "list", "data": [{"id": name, **about} for name in offer.models]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        check_key(request)
        offer.spec_of(name)
        return {"id": name, "object": "model", "created": 0, "owned_by": "vlmfix"}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        check_key(request)
        body = await _body(request, max_body)
        try:
            asked = await asyncio.to_thread(read_request, body)
            spec = await asyncio.to_thread(offer.spec_of, asked.model)
            ticket = Ticket(asked, spec, asyncio.get_running_loop())
            worker.submit(ticket)
            if asked.stream:
                events = _stream(ticket, await _first(request, ticket))
                response: Response = StreamingResponse(events, media_type="text/event-stream")
            else:
                response = JSONResponse(completion(asked, *await _all(request, ticket)))
        except Refused:
            raise
        except (ValueError, TypeError) as error:
            raise Refused(str(error)) from None
        except Exception as error:
            traceback.print_exception(error)
            raise Refused("an error of the server; see its log", 500, "server_error") from None
        served[request.url.path, 200] += 1
        return response

    return app


async def _body(request: Request, limit: int) -> bytes:
    """The body, up to a limit. A page in a browser can send text to any address, but not JSON: so that is asked for."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("expected a body of content-type application/json", 415)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise Refused(f"the body is larger than {limit:,} bytes", 413)
    return bytes(body)


async def _first(request: Request, ticket: Ticket) -> Any:
    """The first event of a ticket, or its error; a client that leaves meanwhile is waited for no longer."""
    while True:
        try:
            told = await asyncio.wait_for(ticket.events.get(), LOOK_S)
        except asyncio.TimeoutError:
            if await request.is_disconnected():
                ticket.abandoned = True
                raise Refused("the client has left", 499) from None
            continue
        except asyncio.CancelledError:
            ticket.abandoned = True
            raise
        if isinstance(told, Exception):
            raise told
        return told


async def _all(request: Request, ticket: Ticket) -> Any:
    """The answers, and the number of prompt tokens."""
    return await _first(request, ticket)  # nothing comes before them where nothing is streamed


async def _stream(ticket: Ticket, first: Any) -> AsyncIterator[str]:
    """Server-sent events, from the first that the worker told to the last."""
    asked: Asked = ticket.asked
    told, finished = first, False
    try:
        for index in range(asked.n):
            yield chunk(asked, [choice(index, {"role": "assistant", "content": ""})])
        while not finished:
            if isinstance(told, Exception):  # after the answer began
                body = told.body() if isinstance(told, Refused) else Refused(str(told)).body()
                yield event(body)
                return
            head, rest = told
            if isinstance(head, int):
                yield chunk(asked, [choice(head, {"content": rest})])
                told = await ticket.events.get()
                continue
            finished = True
            for index, answer in enumerate(head):
                yield chunk(asked, [choice(index, {}, answer.finish, answer.logprobs)], vlmfix=answer.facts)
            if asked.include_usage:
                yield chunk(asked, [], usage=usage(head, rest))
        yield "data: [DONE]\n\n"
    finally:
        ticket.abandoned = not finished  # the client has left


def _metrics(worker: Worker, served: Counter[tuple[str, int]]) -> str:
    """Prometheus' text form."""
    lines = ["# TYPE vlmfix_requests_total counter"]
    for (path, status), n in sorted(served.items()):
        if path.startswith("/v1/"):
            lines.append(f'vlmfix_requests_total{{status="{status}"}} {n}')
    for name in ("answers", "new_tokens", "batches", "errors"):
        lines += [f"# TYPE vlmfix_{name}_total counter", f"vlmfix_{name}_total {worker.counts[name]}"]
    lines += ["# TYPE vlmfix_waiting gauge", f"vlmfix_waiting {worker.n_waiting}"]
    return "\n".join(lines) + "\n"
