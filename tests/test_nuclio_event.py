"""The tracker's handler with events as Nuclio's Python wrapper builds them."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import msgpack
import pytest
from nuclio_sdk import Event, Response
from nuclio_sdk.event import EventDeserializerKinds
from PIL import Image

import main
from testbed.functions import Function
from tests.malformed_requests import TRACKER_FORM

JSON = "application/json"


def receive(body: bytes, content_type: str = JSON, method: str = "POST", path: str = "/") -> Event:
    """Return the event that Nuclio's wrapper passes to a handler for an HTTP request.

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


def ask(function: Function, event: Event) -> tuple[int, dict[str, Any]]:
    """Return the status and the JSON of the handler's response."""
    response = main.handler(function.context, event)
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
def test_track_starts_and_continues_under_any_content_type(
    embedded_function: Function, content_type: str
) -> None:
    """Nuclio decodes JSON for one content type only; for others the handler gets bytes."""
    status, started = ask(embedded_function, receive(request_body(), content_type))
    assert status == 200
    assert len(started["states"]) == 1

    status, answer = ask(
        embedded_function,
        receive(request_body(shapes=[None], states=started["states"]), content_type),
    )

    assert status == 200
    (shape,) = answer["shapes"]
    assert shape["type"] == "rectangle"
    assert len(shape["points"]) == 4
    assert len(answer["states"]) == 1


@pytest.mark.parametrize("content_type", [JSON, "text/plain", ""])
def test_malformed_body_is_a_bad_request(embedded_function: Function, content_type: str) -> None:
    """Also where Nuclio fails to decode it: 400 and a reason, no traceback."""
    bodies = [body for body, *_ in TRACKER_FORM.values() if isinstance(body, bytes)]
    for body in bodies:
        status, answer = ask(embedded_function, receive(body, content_type))

        assert status == 400
        assert answer.keys() == {"error"}
        assert "Traceback" not in answer["error"]
    assert len(bodies) > 9


@pytest.mark.parametrize("path", ["/", "/healthz"])
def test_get_reports_the_health(embedded_function: Function, path: str) -> None:
    """GET reaches the handler with an empty body; the deploy scripts use it."""
    event = receive(b"", "", "GET", path)

    assert ask(embedded_function, event) == (200, {"status": "ok"})


def test_other_method_is_refused(embedded_function: Function) -> None:
    """Nuclio passes every method to the handler."""
    status, answer = ask(embedded_function, receive(request_body(), JSON, "PUT"))

    assert status == 405
    assert "PUT" in answer["error"]
