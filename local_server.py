"""A function over plain HTTP, for trying out, tests, benchmarks and containers without Nuclio.

Owns the HTTP server only: events, context and answers are those of `nuclio_sdk`, and one thread
starts the function and serves one request after the other, as in one Nuclio worker.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn
from nuclio_sdk import Context, Event, Logger, Response
from nuclio_sdk.logger import HumanReadableFormatter
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from errors import MethodNotAllowedError, NotFoundError, TooLargeError, TrackerError

# The module that Nuclio would import, by the function's name.
DOORS = {"tracker": "main", "interactor": "interaction.main"}

# Bodies held in memory while one of them is served: they may have 256 MB each. A caller who stops
# in the middle of one must not keep its place.
BODIES_AT_A_TIME = 4
BODY_PATIENCE_S = 60.0


def create_context() -> Context:
    """Return a Nuclio context of worker 0 that logs to standard output."""
    logger = Logger(level="INFO")
    logger.set_handler("default", sys.stdout, HumanReadableFormatter())
    return Context(logger=logger, worker_id=0)


def create_app(
    context: Context, handler: Callable[[Context, Event], Response], worker: Executor
) -> Starlette:
    """Return the HTTP application around a function.

    Args:
        context: Initialised.
        handler: Answers an event.
        worker: The one thread that calls `handler`, and that initialised the context: OpenMP gives
            each thread that computes a team of its own, and two teams on the same cores halve the
            network's speed.
    """
    reading = asyncio.Semaphore(BODIES_AT_A_TIME)
    limit = context.user_data.service.limits.body_bytes

    async def serve(request: Request) -> HttpResponse:
        async with reading:
            try:
                async with asyncio.timeout(BODY_PATIENCE_S):
                    body = await _read_body(request, limit)
            except (TimeoutError, ClientDisconnect):
                reason = f"the body did not arrive within {BODY_PATIENCE_S:g} s"
                return JSONResponse({"error": reason}, 400, {"Connection": "close"})
            except TooLargeError as err:
                return JSONResponse({"error": str(err)}, err.status, {"Connection": "close"})
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(worker, handle, request, body)

    async def health(request: Request) -> HttpResponse:
        return await run_in_threadpool(handle, request, b"")  # computes nothing, waits for no one

    def handle(request: Request, body: bytes) -> HttpResponse:
        return _answer(handler(context, _event(request, body)))

    async def refuse(request: Request, err: Exception) -> HttpResponse:
        usage = "POST / calls the function, GET /healthz tells the health"
        known: TrackerError = NotFoundError(f"nothing is served at {request.url.path}: {usage}")
        headers = None
        if isinstance(err, HTTPException) and err.status_code == MethodNotAllowedError.status:
            known = MethodNotAllowedError(f"{request.method} is not served here: {usage}")
            headers = err.headers
        return JSONResponse({"error": str(known)}, known.status, headers)

    @asynccontextmanager
    async def until_stopped(_: Starlette) -> AsyncIterator[None]:
        yield
        with suppress(SystemExit):  # uvicorn ends the process
            context.platform._on_signal("termination")  # noqa: SLF001  # as Nuclio's wrapper does

    return Starlette(
        lifespan=until_stopped,
        routes=[
            Route("/", serve, methods=["POST"]),
            Route("/healthz", health, methods=["GET"]),
        ],
        exception_handlers={404: refuse, 405: refuse},
    )


async def _read_body(request: Request, limit: int) -> bytes:
    """Read the body, and stop as soon as it is known to exceed the limit."""
    announced = request.headers.get("content-length", "0")
    size = int(announced) if announced.isdecimal() else 0
    chunks = []
    received = 0
    if size <= limit:
        async for chunk in request.stream():
            received += len(chunk)
            if received > limit:
                break
            chunks.append(chunk)
    if max(size, received) > limit:
        raise TooLargeError(f"body has more than the {limit} bytes that are allowed")
    return b"".join(chunks)


def _event(request: Request, body: bytes) -> Event:
    """Build the event as Nuclio does: JSON is decoded only under exactly this content type."""
    content_type = request.headers.get("content-type", "")
    decoded: Any = body
    if content_type == "application/json":
        try:
            decoded = json.loads(body)
        except (ValueError, RecursionError):
            decoded = body
    return Event(
        body=decoded,
        content_type=content_type,
        method=request.method,
        path=request.url.path,
        headers=dict(request.headers),
    )


def _answer(response: Response) -> HttpResponse:
    return HttpResponse(
        response.body,
        response.status_code,
        headers=response.headers,
        media_type=response.content_type,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until stopped. The port opens when the function has started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8070)
    parser.add_argument("--function", choices=DOORS, default="tracker")
    options = parser.parse_args(arguments)
    door = importlib.import_module(DOORS[options.function])
    context = create_context()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C does not wait for the start
    with ThreadPoolExecutor(1) as worker:
        worker.submit(door.init_context, context).result()
        print(f"serving on http://{options.host}:{options.port}", flush=True)
        app = create_app(context, door.handler, worker)
        uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
