from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from nuclio_sdk import Context, Event, Response
from nuclio_sdk.event import EventDeserializerKinds
from nuclio_sdk.logger import HumanReadableFormatter, Logger
from PIL import Image

import main
from testbed.random_weights import write_checkpoint

MICRO = Path(main.__file__).parent / "weights" / "micro" / "config.yaml"
JSON = "application/json"


@pytest.fixture(scope="module")
def log() -> io.StringIO:
    """What the function logs."""
    return io.StringIO()


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory, log: io.StringIO) -> Iterator[Context]:
    """Start the function as Nuclio does: a very small model with seeded weights, no Redis."""
    checkpoint = write_checkpoint(str(MICRO), tmp_path_factory.mktemp("weights") / "micro.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAM2_CONFIG", str(MICRO))
        patch.setenv("SAM2_CHECKPOINT", str(checkpoint))
        patch.setenv("SAM2_DEVICE", "cpu")
        patch.delenv("CVAT_FUNCTIONS_REDIS_HOST", raising=False)
        logger = Logger(level="DEBUG")
        logger.set_handler("default", log, HumanReadableFormatter())
        started = Context(logger=logger, worker_id=0)
        main.init_context(started)
        yield started


def receive(body: bytes, content_type: str = JSON, method: str = "POST", path: str = "/") -> Event:
    """Return the event that the wrapper gives to a handler for an HTTP request.

    Source: pkg/processor/runtime/rpc/encoder/encode_msgpack.go and
    pkg/processor/runtime/python/py/_nuclio_wrapper.py of Nuclio: strings are decoded, bodies not.
    """
    fields = {
        "body": body,
        "content_type": content_type,
        "trigger": {"kind": "http", "name": "http"},
        "fields": {},
        "headers": {"Content-Type": content_type},
        "id": "5e0c1a4e-5d7e-4b8e-9a53-3b7b1f6a5a10",
        "method": method,
        "path": path,
        "size": len(body),
        "timestamp": 1_700_000_000,
        "url": "http://function:8080" + path,
        "shard_id": 0,
        "num_shards": 0,
        "type": "",
        "type_version": "",
        "version": "",
    }
    wire = msgpack.packb(fields, use_bin_type=True)
    event = Event.deserialize(msgpack.unpackb(wire, raw=False), kind=EventDeserializerKinds.msgpack)
    assert isinstance(event, Event)
    return event


def ask(context: Context, event: Event) -> tuple[int, dict[str, Any]]:
    """Return the handler's status and JSON, after a look at the response's own form."""
    response = main.handler(context, event)
    assert isinstance(response, Response)
    assert response.content_type == JSON
    answer = json.loads(response.body)
    assert isinstance(answer, dict)
    return response.status_code, answer


def request_body(**changes: object) -> bytes:
    """Return the start of a track on a small picture with a bright square."""
    picture = Image.new("L", (64, 64), 40)
    picture.paste(220, (16, 16, 48, 48))
    png = io.BytesIO()
    picture.save(png, "PNG")
    fields: dict[str, object] = {
        "image": base64.b64encode(png.getvalue()).decode(),
        "shapes": [{"type": "rectangle", "points": [16, 16, 48, 48]}],
        "states": [],
    }
    return json.dumps(fields | changes).encode()


@pytest.mark.parametrize(
    "content_type", [JSON, "application/json; charset=utf-8", "text/plain", "", "image/png"]
)
def test_track_starts_and_goes_on_under_any_content_type(
    context: Context, content_type: str
) -> None:
    """Nuclio decodes a body under one content type only; the others bring the JSON as bytes."""
    status, started = ask(context, receive(request_body(), content_type))
    assert status == 200
    assert len(started["states"]) == 1

    status, answer = ask(
        context, receive(request_body(shapes=[None], states=started["states"]), content_type)
    )

    assert status == 200
    (shape,) = answer["shapes"]
    assert shape["type"] == "rectangle"
    assert len(shape["points"]) == 4
    assert len(answer["states"]) == 1


@pytest.mark.parametrize("content_type", [JSON, "text/plain", ""])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"image": "',
        b"\x80\x04\x95\xff",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"null",
        b"7",
        b'"a string"',
        b"[]",
        b"{}",
    ],
    ids=lambda body: repr(body[:12]),
)
def test_broken_body_is_a_bad_request(context: Context, content_type: str, body: bytes) -> None:
    """Cut off, binary, empty, too deep, or JSON of another kind: 400 and a reason, no traceback."""
    status, answer = ask(context, receive(body, content_type))

    assert status == 400
    assert answer.keys() == {"error"}
    assert "Traceback" not in answer["error"]


def test_image_that_is_none_is_told_so(context: Context) -> None:
    """422 is the status that says the frame itself is the trouble."""
    image = base64.b64encode(b"not a picture").decode()

    status, answer = ask(context, receive(request_body(image=image)))

    assert status == 422
    assert "image" in answer["error"]


def test_token_of_nobody_is_gone(context: Context) -> None:
    """A state that expired or never was is told apart from a malformed request."""
    _, started = ask(context, receive(request_body()))
    token = str(started["states"][0])
    unknown = ("BBBB" if token.startswith("AAAA") else "AAAA") + token[4:]

    status, answer = ask(context, receive(request_body(shapes=[None], states=[unknown])))

    assert status == 410
    assert "states[0]" in answer["error"]


@pytest.mark.parametrize("path", ["/", "/healthz"])
def test_get_tells_the_health(context: Context, path: str) -> None:
    """GET reaches the handler with an empty body; the deploy scripts ask it."""
    assert ask(context, receive(b"", "", "GET", path)) == (200, {"status": "ok"})


@pytest.mark.parametrize("method", ["PUT", "DELETE", "HEAD", "OPTIONS"])
def test_other_methods_are_refused(context: Context, method: str) -> None:
    """Nuclio passes every method on."""
    status, answer = ask(context, receive(request_body(), JSON, method))

    assert status == 405
    assert method in answer["error"]


def test_bug_is_logged_and_its_traceback_stays_inside(
    context: Context, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nuclio would send the traceback of an exception to the caller."""

    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(context.user_data.service.tracker, "run", fail)

    status, answer = ask(context, receive(request_body()))

    assert status == 500
    assert "secret" not in json.dumps(answer)
    assert "secret detail" in log.getvalue()


def test_refusal_is_logged(context: Context, log: io.StringIO) -> None:
    """CVAT shows an annotator the status only: the log is where the reason is found."""
    log.truncate(0)

    ask(context, receive(b"{}"))

    assert "nothing to track" in log.getvalue()
