"""Tracking through a running function: its answers are checked, and failures are told apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from PIL import Image

from clips import tracking_client
from clips.tracking_client import RemoteTrackingClient
from errors import BadRequestError, TrackerError
from object_requests import Continue, Start
from shapes import Shape, ShapeType
from state_token import StateToken
from testbed.redis_server import free_port
from tests.function_stub import FunctionStub, started_at
from tests.stalls import unanswered_url

FRAME = Image.new("RGB", (8, 8))
SQUARE = Shape(ShapeType.POLYGON, [0.0, 0.0, 4.0, 0.0, 4.0, 4.0])
TOKEN = f"{'t' * 22}.{'s' * 22}"


@pytest.fixture
def function() -> Iterator[FunctionStub]:
    """A function that answers each object where it was drawn."""
    with FunctionStub() as function:
        yield function


def track(url: str, pauses: list[float] | None = None) -> list[Any]:
    """Start an object and continue another one, without waiting between repeats."""
    pauses = [] if pauses is None else pauses
    items: list[Start | Continue] = [Start(SQUARE), Continue(StateToken.parse(TOKEN))]
    with closing(RemoteTrackingClient(url, pause=pauses.append)) as client:
        return list(client.track(FRAME, items))


def test_objects_travel_as_in_cvats_protocol(function: FunctionStub) -> None:
    """A shape starts an object, a state continues one."""
    started, continued = track(function.url)
    (body,) = function.bodies

    assert body["states"] == [None, TOKEN]
    assert body["shapes"] == [{"type": "polygon", "points": list(SQUARE.points)}, None]
    assert (started.shape, started.lost) == (SQUARE, False)
    assert (continued.shape, continued.lost) == (None, True)


# ---------------------------------------------------------------------- malformed answers


@pytest.mark.parametrize(
    ("states", "shapes"), [(1, 1), (0, 0), (3, 3), (2, 1), (1, 2), (2, 3)], ids=str
)
def test_an_answer_of_the_wrong_length_is_refused(
    function: FunctionStub, states: int, shapes: int
) -> None:
    """The message has both numbers: the shapes would go to the wrong objects."""
    shape = {"type": "polygon", "points": list(SQUARE.points)}
    function.answer = lambda _: (200, {"states": [TOKEN] * states, "shapes": [shape] * shapes})

    with pytest.raises(
        BadRequestError, match=f"{states} states and {shapes} shapes .* 2 objects were asked for"
    ):
        track(function.url)


@pytest.mark.parametrize(
    "answer",
    [
        "<html>",
        [],
        {},
        {"states": TOKEN, "shapes": "ab"},
        {"states": [TOKEN, TOKEN], "shapes": [1, None]},
        {"states": [TOKEN, TOKEN], "shapes": [{"type": "line", "points": []}, None]},
        {"states": [TOKEN, TOKEN], "shapes": [{"type": "polygon", "points": "1"}, None]},
    ],
    ids=range(7),
)
def test_an_answer_of_another_form_is_refused(function: FunctionStub, answer: Any) -> None:
    """The message names the URL."""
    function.answer = lambda _: (200, answer)

    with pytest.raises(BadRequestError, match=f"{function.url} does not answer as a tracker"):
        track(function.url)


# ---------------------------------------------------------------------- proxies


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_proxy_is_not_asked_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, function: FunctionStub, host: str
) -> None:
    """It could not reach what runs here; requests to other hosts go through it."""
    with FunctionStub() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        track(f"http://{host}:{function.port}")
        seen_before = list(proxy.paths)
        track("http://function.example/track")

        assert seen_before == []
        assert proxy.paths == ["http://function.example/track"]
        assert len(function.bodies) == 1


# ---------------------------------------------------------------------- failures and repeats


def test_a_busy_function_is_asked_again_with_growing_pauses(function: FunctionStub) -> None:
    """A 503 says that nothing is lost."""
    answers = iter([(503, {"error": "store away"})] * 3)
    function.answer = lambda body: next(answers, (200, started_at(body)))
    pauses: list[float] = []

    assert len(track(function.url, pauses)) == 2
    assert pauses == [1, 3, 9]


def test_a_function_that_stays_busy_is_given_up_with_its_reason(function: FunctionStub) -> None:
    """After four tries."""
    function.answer = lambda _: (503, {"error": "store away"})

    with pytest.raises(TrackerError, match="answered 503: store away"):
        track(function.url)
    assert len(function.bodies) == 4


def test_a_refused_request_is_not_repeated(function: FunctionStub) -> None:
    """It would be refused again."""
    function.answer = lambda _: (410, {"error": "the state expired"})

    with pytest.raises(BadRequestError, match="answered 410: the state expired"):
        track(function.url)
    assert len(function.bodies) == 1


def test_a_refused_connection_is_tried_again() -> None:
    """The function may be restarting."""
    pauses: list[float] = []

    with pytest.raises(TrackerError, match="cannot be reached"):
        track(f"http://127.0.0.1:{free_port()}", pauses)
    assert pauses == [1, 3, 9]


def test_a_host_that_does_not_answer_is_given_up_after_one_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that hangs is no sign of a restart."""
    monkeypatch.setattr(tracking_client, "CONNECT_TIMEOUT_S", 0.05)
    pauses: list[float] = []
    with (
        unanswered_url() as url,
        pytest.raises(TrackerError, match=r"takes no connection within 0\.05 s"),
    ):
        track(url, pauses)

    assert pauses == []


def test_connecting_may_take_seconds_and_computing_minutes() -> None:
    """One limit for both would be wrong for one of them."""
    with closing(RemoteTrackingClient("http://127.0.0.1:1")) as client:
        timeout = client._client.timeout

    assert (timeout.connect, timeout.read) == (10, 600)


@pytest.mark.parametrize("url", ["127.0.0.1:8070", "ftp://127.0.0.1", "http://127.0.0.1:port"])
def test_a_malformed_url_is_refused_without_repeating(url: str) -> None:
    """Waiting would not make it right."""
    pauses: list[float] = []

    with pytest.raises(BadRequestError, match=rf"{url} .*: start it with http:// or https://"):
        track(url, pauses)
    assert pauses == []
