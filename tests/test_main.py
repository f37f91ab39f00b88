from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nuclio_sdk import Context, Logger
from nuclio_sdk.logger import HumanReadableFormatter

import local_server
import main
from shapes import encode_cvat_rle
from state_token import StateToken, new_id
from testbed.drawn_frames import base64_text, blob_mask, jpeg_frames
from testbed.functions import Function
from testbed.redis_server import RedisServer
from tests.test_protocol import png_header

FRAMES = [base64_text(data) for data in jpeg_frames(2)]
IMAGE = FRAMES[0]
MASK = {"type": "mask", "points": encode_cvat_rle(blob_mask())}
BOX = [220, 40, 271, 101]
UNKNOWN = str(StateToken(new_id(), new_id()))


@pytest.fixture(autouse=True)
def log(function: Function) -> Iterator[io.StringIO]:
    """What the function logs during the test."""
    text = io.StringIO()
    function.context.logger.set_handler("default", text, HumanReadableFormatter())
    yield text
    function.context.logger.set_handler("default", io.StringIO(), HumanReadableFormatter())


def body(*shapes: Any, **changes: Any) -> dict[str, Any]:
    """Return a request that is fine but for its changes."""
    return {"image": IMAGE, "shapes": list(shapes), "states": []} | changes


def shape(name: str, points: Any) -> dict[str, Any]:
    """Return a request to start one shape."""
    return body({"type": name, "points": points})


def image(data: bytes | str) -> dict[str, Any]:
    """Return a request whose image is something else."""
    return body(MASK, image=data if isinstance(data, str) else base64.b64encode(data).decode())


MALFORMED: dict[str, tuple[Any, int, str]] = {
    "empty bytes": (b"", 400, "^body is not JSON"),
    "cut off JSON": (json.dumps(body(MASK))[:-9].encode(), 400, "^body is not JSON"),
    "binary": (b"\x80\x04\x95\xff", 400, "^body is not JSON"),
    "deep": (b"[" * 100_000, 400, "^body is not JSON"),
    "text": ("image", 400, "not str"),
    "number": (7, 400, "not int"),
    "list": ([body(MASK)], 400, "not list"),
    "null": (b"null", 400, "not NoneType"),
    "empty object": ({}, 400, "nothing to track"),
    "nothing to do": (body(), 400, "nothing to track"),
    "shapes is an object": (body(shapes={}), 400, "^shapes must be a list, not dict"),
    "states is a text": (body(MASK, states=UNKNOWN), 400, "^states must be a list, not str"),
    "no image": ({"shapes": [MASK]}, 400, "^image is missing"),
    "image is null": (body(MASK, image=None), 400, "^image is missing"),
    "image is no base64": (image("%%%"), 400, "^image is not base64"),
    "image with its header": (image(f"data:image/jpeg;base64,{IMAGE}"), 400, "not base64"),
    "image is text": (image(b"not a picture"), 422, "^image cannot be decoded"),
    "image is empty PNG": (image(png_header(9, 9)[:20]), 422, "^image cannot be decoded"),
    "image is cut off": (image(IMAGE[: len(IMAGE) // 8 * 4]), 422, "^image cannot be decoded"),
    "image is SVG": (image(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), 422, "expected one of"),
    "image is a bomb": (image(png_header(30_000, 30_000)), 413, "^image has 30000 x 30000 pix"),
    "too many objects": (body(*[BOX] * 257), 413, "^257 objects in one request: at most 256"),
    "too many states": (body(states=[UNKNOWN] * 257), 413, "^257 objects in one request"),
    "too many points": (shape("polygon", [0] * 40_001), 413, "polygon has 40001 numbers: at most"),
    "too many runs": (shape("mask", [0] * 2_000_005), 413, "mask has 2000005 numbers: at most"),
    "neither": (body(None), 400, r"^shapes\[0\] and states\[0\] are both missing"),
    "neither at the end": (body(MASK, None), 400, r"^shapes\[1\] and states\[1\] are both"),
    "shape is a number": (body(MASK, 5), 400, r"^shapes\[1\]: a shape must be an object, not int"),
    "no type": (body({"points": BOX}), 400, r"^shapes\[0\]: type must be one of mask, polygon"),
    "unknown type": (shape("cuboid", BOX), 400, r"^shapes\[0\]: type must be one of .*'cuboid'"),
    "no points": (body({"type": "mask"}), 400, r"^shapes\[0\]: points must be a flat list"),
    "points is a text": (shape("polygon", "1,2,3"), 400, "points must be a flat list"),
    "points are texts": (shape("polygon", ["1"] * 6), 400, r"^shapes\[0\]: polygon points must"),
    "points are pairs": (shape("polygon", [[1, 2], [3, 4], [5, 6]]), 400, "must be a flat list"),
    "points are true": (shape("rectangle", [True] * 4), 400, "must be a flat list of numbers"),
    "points are null": (shape("ellipse", [None] * 4), 400, "must be a flat list of numbers"),
    "NaN": (shape("polygon", [math.nan] * 6), 400, "points hold NaN, infinity"),
    "NaN in JSON": (json.dumps(body([1, 2, math.nan, 4])).encode(), 400, r"^shapes\[0\]: .* NaN"),
    "infinity": (shape("rectangle", [0, 0, math.inf, 9]), 400, "points hold NaN, infinity"),
    "huge numbers": (shape("polygon", [1e308, -1e308] * 3), 400, "number beyond 1e9"),
    "endless number": (shape("polygon", [10**400] * 6), 400, "flat list of num|beyond 1e9"),
    "odd polygon": (shape("polygon", [1, 2, 3, 4, 5, 6, 7]), 400, "polygon has 7 numbers"),
    "two corners": (shape("polygon", [1, 2, 3, 4]), 400, "polygon has 4 numbers"),
    "flat polygon": (shape("polygon", [1, 1, 9, 9, 5, 5]), 400, "polygon covers no pixel"),
    "polygon elsewhere": (shape("polygon", [900, 0, 950, 0, 950, 9]), 400, "covers no pixel of "),
    "bare box of three": (body([1, 2, 3]), 400, r"^shapes\[0\]: rectangle has 3 numbers"),
    "empty bare box": (body([]), 400, r"^shapes\[0\]: rectangle points|rectangle has 0 numbers"),
    "box without area": (body([9, 9, 9, 20]), 400, "rectangle has no area in the 320 x 180"),
    "box elsewhere": (shape("rectangle", [-9, -9, -1, -1]), 400, "rectangle has no area"),
    "inverted ellipse": (shape("ellipse", [50, 50, 40, 60]), 400, "ellipse needs its right-most"),
    "short mask": (shape("mask", [0, 0, 1, 1]), 400, "mask has 4 numbers"),
    "wrong run sum": (shape("mask", [0, 3, 0, 0, 1, 1]), 400, "mask runs add up to 3, its box"),
    "negative run": (shape("mask", [-1, 5, 0, 0, 1, 1]), 400, "negative or not whole"),
    "half a run": (shape("mask", [0.5, 3.5, 0, 0, 1, 1]), 400, "negative or not whole"),
    "empty mask": (shape("mask", [4, 0, 0, 1, 1]), 400, "mask covers no pixel"),
    "mask outside": (shape("mask", [0, 4, 319, 0, 320, 1]), 400, "does not lie in the 320 x 180"),
    "thin mask": (shape("mask", [0, 99, 9, 9, 9, 107]), 400, r"^shapes\[0\]: mask is too small"),
    "thin polygon": (shape("polygon", [9, 9, 10, 9, 10, 90, 9, 90]), 400, "polygon is too small"),
    "thin ellipse": (shape("ellipse", [9.5, 90, 10.1, 50]), 400, "ellipse is too small"),
    "speck": (shape("rectangle", [9, 9, 11, 10]), 400, r"^shapes\[0\]: rectangle is too sm"),
    "token is a number": (body(states=[7]), 400, r"^states\[0\]: it is no state token"),
    "token is an object": (body(states=[{}]), 400, r"^states\[0\]: it is no state token"),
    "token of another": (body(states=["{'frame': 1}"]), 400, r"^states\[0\]: it is no state"),
    "unknown token": (body(states=[UNKNOWN]), 410, r"^states\[0\] expired or is unknown: start"),
    "one bad of two": (body(MASK, BOX, [1]), 400, r"^shapes\[2\]: rectangle has 1 numbers"),
    "one unknown of two": (body(MASK, None, states=[None, UNKNOWN]), 410, r"^states\[1\] expired"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def empty_server(redis_server: RedisServer) -> None:
    """Without other tests' keys, none of which may expire between two looks."""
    client = redis_server.client()
    client.flushall()
    client.close()


def digest(server: RedisServer) -> tuple[int, str]:
    """Return how many keys a server has, and a hash of them all."""
    client = server.client()
    found = hashlib.sha256()
    for key in sorted(client.keys("*")):
        found.update(repr((key, client.get(key))).encode())
    count = int(str(client.dbsize()))
    client.close()
    return count, found.hexdigest()


@pytest.mark.parametrize(("sent", "status", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_request_is_refused_and_changes_nothing(
    function: Function, redis_server: RedisServer, log: io.StringIO,
    sent: Any, status: int, reason: str,
) -> None:  # fmt: skip
    """The status and the reason are the caller's; the store is as it was; the log knows why."""
    before = digest(redis_server)
    found, answer = function.call(sent)

    assert (found, list(answer)) == (status, ["error"])
    assert re.search(reason, answer["error"])
    assert digest(redis_server) == before
    assert f"[warning] refused: {{'status': {status}, 'reason': " in log.getvalue()
    assert len(log.getvalue().splitlines()) == 1


def test_table_is_long_enough() -> None:
    """At least forty kinds of malformed requests are told apart."""
    assert len(MALFORMED) >= 40


@pytest.mark.parametrize("kind", ["dict", "bytes", "bytearray"])
def test_request_is_answered_under_any_content_type(function: Function, kind: str) -> None:
    """Nuclio decodes a body under one content type only; the others bring the JSON as bytes."""
    request = body(MASK, BOX)
    text = json.dumps(request).encode()
    sent = {"dict": request, "bytes": text, "bytearray": bytearray(text)}[kind]
    status, answer = function.call(sent, content_type="application/json; charset=utf-8")

    assert status == 200
    assert answer["shapes"] == [MASK, BOX]
    assert len(answer["states"]) == 2


def test_old_cvat_gets_bare_boxes_back(function: Function) -> None:
    """Before 2.40 a rectangle is a list of four numbers, in both directions."""
    started = function.track(IMAGE, [BOX], [])
    answer = function.track(FRAMES[1], [BOX], started["states"])
    (box,) = answer["shapes"]

    assert started["shapes"] == [BOX]
    assert len(box) == 4
    assert all(isinstance(edge, int | float) for edge in box)


def test_get_tells_the_health(function: Function) -> None:
    """GET answers that the model is loaded and the store is there."""
    assert function.call(b"", "GET") == (200, {"status": "ok"})
    assert function.call(b"", "get") == (200, {"status": "ok"})


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(function: Function, method: str) -> None:
    """Nuclio passes every method on to the handler."""
    status, answer = function.call(body(MASK), method)

    assert status == 405
    assert answer["error"] == f"{method} is not served: POST tracks, GET tells the health"


def test_request_logs_one_line_with_what_it_did(function: Function, log: io.StringIO) -> None:
    """Counts, bytes and milliseconds, for whoever looks after the function."""
    states = function.track(IMAGE, [MASK], [])["states"]
    log.truncate(0)
    log.seek(0)
    unseen = base64_text(jpeg_frames(2, seed=1)[1])  # a frame still at hand would not be resized
    function.track(unseen, [None, MASK], states)
    (line,) = log.getvalue().splitlines()
    fields = ast.literal_eval(line.partition("tracked: ")[2])

    assert (fields["started"], fields["continued"]) == (1, 1)
    assert fields["lost"] in {0, 1}
    assert fields["bytes_written"] > 2 * 64 * 8 * 8 * 2  # two frame memories
    assert set(fields["times_ms"]) == {"decode", "resize", "encode", "model", "store", "shapes"}
    assert all(value >= 0 for value in fields["times_ms"].values())
    assert "blob" not in line
    assert IMAGE[:40] not in line


def test_bug_is_logged_and_its_text_stays_inside(
    function: Function, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain 500 for the caller, the traceback for the log."""

    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(function.context.user_data.service.tracker, "run", fail)
    status, answer = function.call(body(MASK))

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
        "tiny.pt does not hold weights for ",
    ),
    "config that is none": ({"SAM2_CONFIG": str(Path(__file__))}, "is not a SAM 2 config"),
    "no such device": ({"SAM2_DEVICE": "cuda:99"}, "SAM2_DEVICE='cuda:99': PyTorch .* sees "),
    "wrong value": ({"SAM2_IMAGE_SIZE": "100"}, "SAM2_IMAGE_SIZE='100' is not allowed"),
    "no Redis": (
        {"CVAT_FUNCTIONS_REDIS_HOST": "127.0.0.1", "CVAT_FUNCTIONS_REDIS_PORT": "1"},
        r"the state store failed \(ConnectionError\)",
    ),
}


@pytest.mark.parametrize(("environment", "reason"), STARTS.values(), ids=STARTS)
def test_failed_start_ends_with_one_clear_line(
    start_function: Callable[[dict[str, str]], Function],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    reason: str,
) -> None:
    """The process must not run, and the log says why without a traceback."""
    monkeypatch.setattr(main, "STORE_PATIENCE_S", 0.0)
    with pytest.raises(SystemExit, match=r"^1$"):
        start_function(environment)
    (line,) = capsys.readouterr().out.splitlines()

    assert "[error] cannot start: {'reason': " in line
    assert re.search(reason, ast.literal_eval(line.partition("cannot start: ")[2])["reason"])


def test_second_worker_without_redis_does_not_start(
    start_function: Callable[[dict[str, str]], Function], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tracks would be unknown to the first one."""
    text = io.StringIO()
    logger = Logger(level="INFO")
    logger.set_handler("default", text, HumanReadableFormatter())
    monkeypatch.setattr(local_server, "create_context", lambda: Context(logger=logger, worker_id=1))
    with pytest.raises(SystemExit, match=r"^1$"):
        start_function({})

    assert "CVAT_FUNCTIONS_REDIS_HOST is not set and this is not the only worker" in text.getvalue()


def test_password_is_never_logged(
    start_function: Callable[[dict[str, str]], Function],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither when it is right nor when it is wrong nor when the server fails later."""
    monkeypatch.setattr(main, "STORE_PATIENCE_S", 0.0)
    server = RedisServer(tmp_path)
    client = server.client()
    client.config_set("requirepass", "hush-right")
    client.close()
    password = "CVAT_FUNCTIONS_REDIS_PASSWORD"
    with pytest.raises(SystemExit):
        start_function(server.environment | {password: "hush-wrong"})
    started = start_function(server.environment | {password: "hush-right"})
    server.stop()
    status, answer = started.call(body(MASK))
    output = "".join(capsys.readouterr())

    assert status == 503
    assert "AuthenticationError" in output
    assert "ready" in output
    assert "refused: {'status': 503" in output
    assert "hush" not in output + json.dumps(answer)


def test_embedded_store_says_what_it_means(
    start_function: Callable[[dict[str, str]], Function], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a host it works, and warns; the ready line names all that support asks for."""
    started = start_function({})
    states = started.track(IMAGE, [MASK], [])["states"]
    warning, ready, _ = capsys.readouterr().out.splitlines()
    fields = ast.literal_eval(ready.partition("ready: ")[2])

    assert "[warning] tracks live in this process and end with it" in warning
    assert (fields["store"], fields["device"], fields["image_size"]) == ("embedded", "cpu", "128")
    assert {"model", "dtype", "config", "threads"} <= set(fields)
    assert set(fields["versions"]) == {"sam2", "torch", "redis"}
    assert len(started.track(FRAMES[1], [None], states)["states"]) == 1
