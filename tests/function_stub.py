"""An HTTP server in the place of a running function: it answers what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from state_token import StateToken, new_id

Json = dict[str, Any]


def started_at(body: Json) -> Json:
    """Return an answer in the function's form: each object where it was drawn, or lost."""
    tokens = [str(StateToken(new_id(), new_id())) for _ in body["states"]]
    return {"states": tokens, "shapes": body["shapes"]}


class FunctionStub:
    """The server; use it as a context.

    Attributes:
        url: Where it takes requests.
        bodies: The JSON of all requests, in order.
        paths: Their paths; of a request to a proxy the whole URL.
        answer: Makes of a request's JSON the status and the JSON to answer.
    """

    def __init__(self, answer: Callable[[Json], tuple[int, Any]] | None = None) -> None:
        self.answer = answer or (lambda body: (200, started_at(body)))
        self.bodies: list[Json] = []
        self.paths: list[str] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.bodies.append(body)
                stub.paths.append(self.path)
                status, answer = stub.answer(body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Stay quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # client has gone
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
