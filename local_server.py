"""Serve a function over plain HTTP, for try-outs, tests, benchmarks and containers without Nuclio.

As in one Nuclio worker, one thread starts the function and serves one request at a time. Events,
context and responses are those of `nuclio_sdk`.
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

# The module that Nuclio imports, by the function's name.
ENTRY_POINTS = {"tracker": "main", "interactor": "interaction.main"}

# Request bodies in memory at a time, of up to 256 MB each. A body that does not arrive in time is
# dropped, so that a stalled caller does not block the others.
CONCURRENT_BODIES = 4
BODY_TIMEOUT_S = 60.0


def create_context() -> Context:
    """Return a Nuclio context of worker 0 that logs to standard output."""
    logger = Logger(level="INFO")
    logger.set_handler("default", sys.stdout, HumanReadableFormatter())
    return Context(logger=logger, worker_id=0)


def create_app(
    context: Context, handler: Callable[[Context, Event], Response], worker: Executor
) -> Starlette:
    """Return the HTTP application of a function.

    Args:
        context: Initialised by the function's `init_context`.
        handler: The function's handler.
        worker: A single thread for `handler`, the thread that ran `init_context`: OpenMP starts a
            team of threads for each thread that computes, and two teams on the same cores halve
            the network's speed.
    """
    reading = asyncio.Semaphore(CONCURRENT_BODIES)
    limit = context.user_data.service.limits.body_bytes

    async def serve(request: Request) -> HttpResponse:
        async with reading:
            try:
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    body = await _read_body(request, limit)
            except (TimeoutError, ClientDisconnect):
                reason = f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
                return JSONResponse({"error": reason}, 400, {"Connection": "close"})
            except TooLargeError as err:
                return JSONResponse({"error": str(err)}, err.status, {"Connection": "close"})
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(worker, handle, request, body)

    async def health(request: Request) -> HttpResponse:
        return await run_in_threadpool(handle, request, b"")  # beside the worker: not queued

    def handle(request: Request, body: bytes) -> HttpResponse:
        return _answer(handler(context, _event(request, body)))

    async def refuse(request: Request, err: Exception) -> HttpResponse:
        usage = "POST / calls the function, GET /healthz reports the health"
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
    """Read the body; stop as soon as it exceeds the limit.

    Raises:
        TooLargeError: The body, or the length that the request announces, exceeds the limit.
    """
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
    """Build the event as Nuclio does: it decodes JSON only for exactly this content type."""
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
    """Start the function, then open the port and serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8070)
    parser.add_argument("--function", choices=ENTRY_POINTS, default="tracker")
    options = parser.parse_args(arguments)
    function = importlib.import_module(ENTRY_POINTS[options.function])
    context = create_context()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the start-up at once
    with ThreadPoolExecutor(1) as worker:
        worker.submit(function.init_context, context).result()
        print(f"serving on http://{options.host}:{options.port}", flush=True)
        app = create_app(context, function.handler, worker)
        uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
