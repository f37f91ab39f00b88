from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.testclient import TestClient

import local_server
from shapes import encode_cvat_rle
from testbed.drawn_frames import SIZE_HW, base64_text, blob_mask, jpeg_frames
from testbed.redis_server import RedisServer, free_port

FRAMES = [base64_text(data) for data in jpeg_frames(3)]
MASK = {"type": "mask", "points": encode_cvat_rle(blob_mask())}
BODY_LIMIT = 8 << 20
JSON = "application/json"
USAGE = "POST / calls the function, GET /healthz reports the health"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Start a Redis server that a test may stop temporarily."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def server(
    store: RedisServer, micro: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[int, Path]]:
    """Run `python local_server.py` with a very small model; return its port and its log."""
    limits = {"SAM2_MAX_BODY_MB": str(BODY_LIMIT >> 20), "CVAT_FUNCTIONS_REDIS_TIMEOUT": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(micro | store.environment | limits, log) as port:
        yield port, log


@contextmanager
def serving(environment: Mapping[str, str], log: Path) -> Iterator[int]:
    """Run a server within the context; return its port when it is open."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "local_server.py", "--port", str(port)],
            cwd=Path(local_server.__file__).parent,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        while not listens(port):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def listens(port: int) -> bool:
    """Tell whether a port is open."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def http(server: tuple[int, Path]) -> Iterator[httpx.Client]:
    """Return a client of the server."""
    with httpx.Client(base_url=f"http://127.0.0.1:{server[0]}", timeout=60) as client:
        yield client


def track(http: httpx.Client, frame: int, shapes: list[Any], states: list[str]) -> httpx.Response:
    """Make one tracker call as CVAT makes it."""
    return http.post("/", json={"image": FRAMES[frame], "shapes": shapes, "states": states})


def exchange(port: int, head: bytes, chunks: int = 0) -> tuple[bytes, int]:
    """Send a request by hand; return the answer and how many chunks of 1 MiB were taken."""
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head)
        try:
            while sent < chunks:
                connection.sendall(chunk)
                sent += 1
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before everything was sent
        answer = b""
        try:
            while data := connection.recv(65536):
                answer += data
        except ConnectionResetError:
            pass  # the server closed with unread bytes of ours after its answer
    return answer, sent


@pytest.mark.parametrize("content_type", [JSON, f"{JSON}; charset=utf-8", "text/plain", ""])
def test_post_tracks_under_any_content_type(http: httpx.Client, content_type: str) -> None:
    """As in Nuclio, the body is read as JSON under any content type."""
    content = json.dumps({"image": FRAMES[0], "shapes": [MASK], "states": []})
    started = http.post("/", content=content, headers={"Content-Type": content_type})
    answer = track(http, 1, [None], started.json()["states"])

    assert started.status_code == answer.status_code == 200
    assert answer.headers["content-type"] == JSON
    assert started.json()["shapes"] == [MASK]
    assert len(answer.json()["states"]) == len(answer.json()["shapes"]) == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "reason"),
    [
        ("GET", "/elsewhere", 404, "nothing is served at /elsewhere: "),
        ("POST", "/elsewhere", 404, "nothing is served at /elsewhere: "),
        ("POST", "/healthz/x", 404, "nothing is served at /healthz/x: "),
        ("GET", "/", 405, "GET is not served here: "),
        ("DELETE", "/", 405, "DELETE is not served here: "),
        ("POST", "/healthz", 405, "POST is not served here: "),
    ],
)
def test_other_paths_and_methods_are_refused(
    http: httpx.Client, method: str, path: str, status: int, reason: str
) -> None:
    """The error says what is served, as JSON like every other error."""
    answer = http.request(method, path)

    assert answer.status_code == status
    assert answer.json() == {"error": f"{reason}{USAGE}"}


def test_errors_of_the_function_are_passed_on(http: httpx.Client) -> None:
    """With status and message of the handler's answer."""
    malformed = http.post("/", content=b"{", headers={"Content-Type": JSON})
    not_an_image = http.post("/", json={"image": "AAAA", "shapes": [MASK]})

    assert (malformed.status_code, malformed.json()) == (400, {"error": "body is not JSON"})
    assert not_an_image.status_code == 422
    assert not_an_image.headers["content-type"] == JSON


def test_health_reports_the_store_and_tokens_outlive_an_outage(
    http: httpx.Client, store: RedisServer
) -> None:
    """200 while the store answers, 503 with the reason otherwise; later it works again."""
    states = track(http, 0, [MASK], []).json()["states"]
    healthy = http.get("/healthz")
    client = store.client()
    saved = {key: client.get(key) for key in client.keys("*")}
    client.close()
    store.stop()
    away, failed = http.get("/healthz"), track(http, 1, [None], states)
    store.start()
    client = store.client()
    for key, value in saved.items():  # as a server that writes to disk
        client.set(key, value or b"")
    client.close()
    back, answer = http.get("/healthz"), track(http, 1, [None], states)

    assert (healthy.status_code, healthy.json()) == (200, {"status": "ok"})
    assert (away.status_code, failed.status_code) == (503, 503)
    assert "the state store failed (ConnectionError)" in away.json()["error"]
    assert "nothing is lost, repeat the request" in failed.json()["error"]
    assert (back.status_code, answer.status_code) == (200, 200)


def test_announced_size_above_the_limit_is_refused_at_once(server: tuple[int, Path]) -> None:
    """A body of 300 MB is refused by its header, before it is sent."""
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 300000000\r\n\r\n{"
    answer, _ = exchange(server[0], head)

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'{"error":"body has more than the 8388608 bytes that are allowed"}' in answer


def test_endless_chunks_are_refused_at_the_limit(server: tuple[int, Path]) -> None:
    """Without a length the bytes are counted as they arrive."""
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer, sent = exchange(server[0], head, chunks=10)
    _, taken = exchange(server[0], head, chunks=300)

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body has more than the 8388608 bytes" in answer
    assert sent == 10
    assert taken < 300


def test_body_within_the_limit_is_read(http: httpx.Client) -> None:
    """A large body reaches the handler, in chunks as well."""
    body = json.dumps({"image": "A" * (6 << 20), "shapes": [MASK]}).encode()
    whole = http.post("/", content=body, headers={"Content-Type": JSON})
    chunked = http.post("/", content=iter([body[:999], body[999:]]))

    assert whole.status_code == chunked.status_code == 422
    assert whole.json() == chunked.json()


def test_server_logs_requests_and_no_tracebacks(
    http: httpx.Client, server: tuple[int, Path]
) -> None:
    """After the tests above the log has its usual lines and no traceback."""
    track(http, 0, [MASK], [])
    log = server[1].read_text()

    assert log.splitlines()[0].find("[info] ready: ") > 0
    assert "[info] tracked: " in log
    assert "Traceback" not in log


@pytest.fixture
def start_here(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Prepare a start of the server in this process with a function's variables."""

    def prepare(environment: dict[str, str]) -> None:
        for name in os.environ:
            if name.startswith(("SAM2_", "CVAT_")):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest needs its own handler

    return prepare


def test_interactor_is_served_on_request(
    micro: dict[str, str],
    start_here: Callable[[dict[str, str]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`--function interactor` serves the other function."""
    responses = []

    def serve(app: Starlette, **_: object) -> None:
        body = {"image": FRAMES[0], "pos_points": [[60, 90]], "neg_points": []}
        with TestClient(app) as client:
            responses.append(client.post("/", json=body))
            responses.append(client.post("/", json=body | {"pos_points": []}))
            responses.append(client.get("/healthz"))

    start_here(micro)
    monkeypatch.setattr(uvicorn, "run", serve)
    local_server.main(["--function", "interactor"])
    answer, refusal, health = responses

    assert answer.status_code == health.status_code == 200
    assert np.array(answer.json()["mask"]).shape == SIZE_HW
    assert refusal.status_code == 400
    assert "[info] segmented: " in capsys.readouterr().out


def test_failed_start_ends_the_process(
    micro: dict[str, str],
    start_here: Callable[[dict[str, str]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With exit status 1 and one line that says why; the port never opens."""
    start_here(micro | {"SAM2_DEVICE": "gpu"})
    with pytest.raises(SystemExit, match=r"^1$"):
        local_server.main([])
    output = capsys.readouterr()

    assert "SAM2_DEVICE='gpu' is not allowed: expected auto, cpu, cuda" in output.out
    assert len(output.out.splitlines()) == 1
    assert output.err == ""
