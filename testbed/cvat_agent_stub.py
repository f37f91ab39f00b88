"""Serve the part of CVAT's HTTP API that cvat-cli's agents use: functions, queues, video tasks."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from testbed.redis_server import free_port

TOKEN = "secret"
CATEGORY = "interactive"
DATE = "2026-01-01T00:00:00Z"
QUEUE = "/api/functions/queues/function:{function:int}"


class RequestFailedError(Exception):
    """An agent reported that a request failed; the message is the agent's."""


@dataclass(eq=False)
class QueuedRequest:
    """A request for a function's agents; `agent` is the id of the agent that acquired it."""

    function: int
    params: dict[str, Any]
    answer: Future[dict[str, Any]] = field(default_factory=Future)
    agent: str | None = None


class CvatStub:
    """A CVAT server with video tasks and functions; all requests are of the interactive category.

    Args:
        tasks: Encoded frames by task id.

    Attributes:
        functions: The registered functions, by id.
        asked: Method and route of every call that was served.
    """

    def __init__(self, tasks: Mapping[int, Sequence[bytes]]) -> None:
        self.functions: dict[int, dict[str, Any]] = {}
        self.asked: set[tuple[str, str]] = set()
        self.routes = [
            self._route("GET", "/api/server/about", self._about),
            self._route("POST", "/api/functions", self._create_function),
            self._route("GET", "/api/functions/{function:int}", self._function),
            self._route("GET", f"{QUEUE}/watch", self._watch),
            self._route("POST", f"{QUEUE}/requests/acquire", self._acquire),
            self._route("POST", f"{QUEUE}/requests/{{queued:int}}/complete", self._complete),
            self._route("POST", f"{QUEUE}/requests/{{queued:int}}/fail", self._fail),
            self._route("GET", "/api/tasks/{task:int}", self._task),
            self._route("GET", "/api/tasks/{task:int}/data/meta", self._meta),
            self._route("GET", "/api/tasks/{task:int}/data", self._data),
            self._route("GET", "/api/labels", self._labels),
        ]
        self._tasks = tasks
        self._queue: list[QueuedRequest] = []
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        config = uvicorn.Config(
            Starlette(routes=self.routes), port=port, log_level="warning", ws="none"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def close(self) -> None:
        """Stop serving."""
        self._server.should_exit = True
        self._thread.join()

    def register(self, function: dict[str, Any]) -> int:
        """Add a function and return its id."""
        id_ = len(self.functions) + 1
        self.functions[id_] = function | {"id": id_}
        return id_

    def submit(self, function: int, **params: Any) -> Future[dict[str, Any]]:
        """Queue a request as CVAT does for an annotator, and return the agent's answer."""
        queued = QueuedRequest(function, params)
        self._queue.append(queued)
        return queued.answer

    def _route(
        self, method: str, path: str, answer: Callable[[Request], Awaitable[Response]]
    ) -> Route:
        async def endpoint(request: Request) -> Response:
            if request.headers.get("authorization") != f"Bearer {TOKEN}":
                return JSONResponse({"detail": "unknown access token"}, 401)
            self.asked.add((method, path))
            return await answer(request)

        return Route(path, endpoint, methods=[method])

    async def _about(self, _: Request) -> Response:
        texts = dict.fromkeys(["name", "description", "logo_url", "subtitle"], "CVAT")
        return JSONResponse(texts | {"version": "2.80.0"})

    async def _create_function(self, request: Request) -> Response:
        function = await request.json()
        if function["kind"] == "interactor":
            defaults = {"min_neg_points": -1, "startswith_box": False}
            function = defaults | {"startswith_box_optional": False} | function
        id_ = self.register(function)
        return JSONResponse(self.functions[id_], 201)

    async def _function(self, request: Request) -> Response:
        return JSONResponse(self.functions[request.path_params["function"]])

    async def _watch(self, _: Request) -> Response:
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        """Send an event when requests were queued, at first for those queued before."""
        event = json.dumps({"request_category": CATEGORY})
        announced = 0
        while not self._server.should_exit:
            if len(self._queue) > announced:
                announced = len(self._queue)
                yield f"event: newrequest\ndata: {event}\n\n"
            await asyncio.sleep(0.005)

    async def _acquire(self, request: Request) -> Response:
        body = await request.json()
        function = request.path_params["function"]
        waiting = (
            id_
            for id_, queued in enumerate(self._queue)
            if (queued.function, queued.agent) == (function, None)
        )
        id_ = next(waiting, None) if body["request_category"] == CATEGORY else None
        if id_ is None:
            return JSONResponse({"ar_assignment": None})
        self._queue[id_].agent = body["agent_id"]
        return JSONResponse(
            {"ar_assignment": {"ar_id": str(id_), "ar_params": self._queue[id_].params}}
        )

    async def _complete(self, request: Request) -> Response:
        queued, body = await self._finished(request)
        queued.answer.set_result(body)
        return JSONResponse({})

    async def _fail(self, request: Request) -> Response:
        queued, body = await self._finished(request)
        queued.answer.set_exception(RequestFailedError(body["exc_info"]))
        return JSONResponse({})

    async def _finished(self, request: Request) -> tuple[QueuedRequest, dict[str, Any]]:
        queued, body = self._queue[request.path_params["queued"]], await request.json()
        assert body.pop("agent_id") == queued.agent, "finished by an agent that did not acquire it"
        return queued, body

    async def _task(self, request: Request) -> Response:
        task = request.path_params["task"]
        return JSONResponse(
            {
                "id": task,
                "size": len(self._tasks[task]),
                "mode": "interpolation",
                "data_chunk_size": 36,
                "data_original_chunk_type": "video",
                "updated_date": DATE,
                "organization": None,
                "jobs": {"completed": 0, "validation": 0},
                "labels": {},
            }
        )

    async def _meta(self, _: Request) -> Response:
        frame = {"name": "clip.mp4", "width": 0, "height": 0, "related_files": 0}
        return JSONResponse({"frames": [frame], "deleted_frames": [], "chunks_updated_date": DATE})

    async def _data(self, request: Request) -> Response:
        query = request.query_params
        assert (query["type"], query["quality"]) == ("frame", "original")
        frames = self._tasks[request.path_params["task"]]
        return Response(frames[int(query["number"])], media_type="image/png")

    async def _labels(self, _: Request) -> Response:
        return JSONResponse({"count": 0, "next": None, "previous": None, "results": []})
