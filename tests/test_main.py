from __future__ import annotations

import ast
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nuclio_sdk import Context, Logger
from nuclio_sdk.logger import HumanReadableFormatter

import local_server
import main
from errors import TrackerError
from testbed.drawn_frames import base64_text, jpeg_frames
from testbed.functions import Function
from testbed.redis_server import RedisServer
from tests.malformed_requests import BOX, IMAGE, MASK, TRACKER, tracker_body

SECOND_IMAGE = base64_text(jpeg_frames(2)[1])


@pytest.fixture(scope="module")
def function(micro_function: Function) -> Function:
    """The tracker with a very small model on a real Redis server."""
    return micro_function


@pytest.fixture(scope="module")
def start(
    start_function: Callable[[dict[str, str]], Function], micro: dict[str, str]
) -> Callable[[dict[str, str]], Function]:
    """Start the tracker with this model and further variables."""
    return lambda environment: start_function(micro | environment)


@pytest.fixture(autouse=True)
def log(function: Function) -> Iterator[io.StringIO]:
    """What the function logs during the test."""
    text = io.StringIO()
    function.context.logger.set_handler("default", text, HumanReadableFormatter())
    yield text
    function.context.logger.set_handler("default", io.StringIO(), HumanReadableFormatter())


@pytest.fixture(scope="module", autouse=True)
def empty_server(redis_server: RedisServer) -> None:
    """Remove the keys of other tests, which might expire between two digests."""
    client = redis_server.client()
    client.flushall()
    client.close()


def digest(server: RedisServer) -> tuple[int, str]:
    """Return the number of keys of a server, and a hash of all keys and values."""
    client = server.client()
    digest = hashlib.sha256()
    for key in sorted(client.keys("*")):
        digest.update(repr((key, client.get(key))).encode())
    count = int(str(client.dbsize()))
    client.close()
    return count, digest.hexdigest()


@pytest.mark.parametrize(("sent", "error", "reason"), TRACKER.values(), ids=TRACKER)
def test_malformed_request_is_refused_and_changes_nothing(
    function: Function, redis_server: RedisServer, log: io.StringIO,
    sent: Any, error: type[TrackerError], reason: str,
) -> None:  # fmt: skip
    """The caller gets status and reason, the log has one line, and no stored key has changed."""
    before = digest(redis_server)
    status, answer = function.call(sent)

    assert (status, list(answer)) == (error.status, ["error"])
    assert re.search(reason, answer["error"])
    assert digest(redis_server) == before
    (line,) = log.getvalue().splitlines()
    assert f"[warning] refused: {{'status': {status}, 'reason': " in line


@pytest.mark.parametrize("kind", ["dict", "bytes", "bytearray"])
def test_request_is_answered_under_any_content_type(function: Function, kind: str) -> None:
    """Nuclio decodes JSON for one content type only; for others the handler gets bytes."""
    request = tracker_body(MASK, BOX)
    text = json.dumps(request).encode()
    sent = {"dict": request, "bytes": text, "bytearray": bytearray(text)}[kind]
    status, answer = function.call(sent, content_type="application/json; charset=utf-8")

    assert status == 200
    assert answer["shapes"] == [MASK, BOX]
    assert len(answer["states"]) == 2


def test_old_cvat_gets_bare_boxes_back(function: Function) -> None:
    """CVAT before 2.40 sends and expects a rectangle as a list of four numbers."""
    started = function.track(IMAGE, [BOX], [])
    answer = function.track(SECOND_IMAGE, [BOX], started["states"])
    (box,) = answer["shapes"]

    assert started["shapes"] == [BOX]
    assert len(box) == 4
    assert all(isinstance(edge, int | float) for edge in box)


def test_get_reports_the_health(function: Function) -> None:
    """GET is answered if the model is loaded and the store answers."""
    assert function.call(b"", "GET") == (200, {"status": "ok"})
    assert function.call(b"", "get") == (200, {"status": "ok"})


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(function: Function, method: str) -> None:
    """Nuclio passes every method to the handler."""
    status, answer = function.call(tracker_body(MASK), method)

    assert status == 405
    assert answer["error"] == f"{method} is not served: POST tracks, GET reports the health"


def test_request_logs_one_line_with_what_it_did(function: Function, log: io.StringIO) -> None:
    """The line has counts, bytes and milliseconds, but no names or pixels of the annotator."""
    states = function.track(IMAGE, [MASK], [])["states"]
    log.truncate(0)
    log.seek(0)
    unseen = base64_text(jpeg_frames(2, seed=1)[1])  # a cached frame would not be resized
    function.track(unseen, [None, MASK], states)
    (line,) = log.getvalue().splitlines()
    fields = ast.literal_eval(line.partition("tracked: ")[2])

    assert (fields["started"], fields["continued"]) == (1, 1)
    assert fields["lost"] in {0, 1}
    assert fields["bytes_written"] > 2 * 16 * 8 * 8 * 2  # two frame memories
    assert set(fields["times_ms"]) == {"decode", "resize", "encode", "model", "store", "shapes"}
    assert all(value >= 0 for value in fields["times_ms"].values())
    assert "blob" not in line
    assert IMAGE[:40] not in line


def test_bug_is_logged_and_its_text_stays_inside(
    function: Function, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller gets a plain 500, the log the traceback."""

    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(function.context.user_data.service.tracker, "run", fail)
    status, answer = function.call(tracker_body(MASK))

    assert status == 500
    assert answer == {"error": "internal error; the function's log has the reason"}
    assert "Traceback" in log.getvalue()
    assert "RuntimeError: secret detail" in log.getvalue()


STARTS: dict[str, tuple[dict[str, str], str]] = {
    "unknown model": (
        {"SAM2_CONFIG": "", "SAM2_CHECKPOINT": "", "SAM2_MODEL_ID": "nobody/none"},
        r"SAM2_MODEL_ID='nobody/none' is not known: expected one of micro, ",
    ),
    "missing checkpoint": ({"SAM2_CHECKPOINT": "/none.pt"}, "/none.pt does not exist"),
    "missing config": ({"SAM2_CONFIG": "none.yaml"}, "none.yaml does not exist"),
    "checkpoint of another config": (
        {"SAM2_CONFIG": "configs/sam2.1/sam2.1_hiera_s.yaml"},
        "micro-0.pt does not hold weights for ",
    ),
    "config that is none": ({"SAM2_CONFIG": str(Path(__file__))}, "is not a SAM 2 config"),
    "no such device": ({"SAM2_DEVICE": "cuda:99"}, "SAM2_DEVICE='cuda:99': PyTorch .* sees "),
    "wrong value": ({"SAM2_IMAGE_SIZE": "100"}, "SAM2_IMAGE_SIZE='100' is not allowed"),
    "no Redis": (
        {"CVAT_FUNCTIONS_REDIS_HOST": "127.0.0.1", "CVAT_FUNCTIONS_REDIS_PORT": "1"},
        r"the state store failed \(ConnectionError\)",
    ),
    "unknown Redis host": (
        {"CVAT_FUNCTIONS_REDIS_HOST": "no-such-host.invalid"},
        r"the state store failed \(ConnectionError\)",
    ),
}


@pytest.mark.parametrize(("environment", "reason"), STARTS.values(), ids=STARTS)
def test_failed_start_ends_with_one_line(
    start: Callable[[dict[str, str]], Function],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    reason: str,
) -> None:
    """The process exits, and the log says why without a traceback."""
    monkeypatch.setattr(main, "STORE_WAIT_S", 0.0)
    with pytest.raises(SystemExit, match=r"^1$"):
        start(environment)
    (line,) = capsys.readouterr().out.splitlines()

    assert "[error] cannot start: {'reason': " in line
    assert re.search(reason, ast.literal_eval(line.partition("cannot start: ")[2])["reason"])


def test_second_worker_without_redis_does_not_start(
    start: Callable[[dict[str, str]], Function], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tracks would be unknown to the first worker."""
    text = io.StringIO()
    logger = Logger(level="INFO")
    logger.set_handler("default", text, HumanReadableFormatter())
    monkeypatch.setattr(local_server, "create_context", lambda: Context(logger=logger, worker_id=1))
    with pytest.raises(SystemExit, match=r"^1$"):
        start({})

    assert "CVAT_FUNCTIONS_REDIS_HOST is not set and this is not the only worker" in text.getvalue()


def test_password_is_never_logged(
    start: Callable[[dict[str, str]], Function],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither a wrong password nor the right one, even when the server fails later."""
    monkeypatch.setattr(main, "STORE_WAIT_S", 0.0)
    server = RedisServer(tmp_path)
    client = server.client()
    client.config_set("requirepass", "hush-right")
    client.close()
    password = "CVAT_FUNCTIONS_REDIS_PASSWORD"
    with pytest.raises(SystemExit):
        start(server.environment | {password: "hush-wrong"})
    started = start(server.environment | {password: "hush-right"})
    server.stop()
    status, answer = started.call(tracker_body(MASK))
    output = "".join(capsys.readouterr())

    assert status == 503
    assert "AuthenticationError" in output
    assert "ready" in output
    assert "refused: {'status': 503" in output
    assert "hush" not in output + json.dumps(answer)


def test_embedded_store_warns_and_tracks(
    start: Callable[[dict[str, str]], Function], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a Redis host the function works, and warns; the ready line describes the set-up."""
    started = start({})
    states = started.track(IMAGE, [MASK], [])["states"]
    warning, ready, _ = capsys.readouterr().out.splitlines()
    fields = ast.literal_eval(ready.partition("ready: ")[2])

    assert "[warning] tracks are stored in this process and end with it" in warning
    assert (fields["store"], fields["device"], fields["image_size"]) == ("embedded", "cpu", "128")
    assert {"model", "dtype", "config", "threads"} <= set(fields)
    assert set(fields["versions"]) == {"sam2", "torch", "redis"}
    assert len(started.track(SECOND_IMAGE, [None], states)["states"]) == 1
