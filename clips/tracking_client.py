"""Track objects on single frames, in this process or through a running function.

`track_video.py` and `track_task.py` use it. Both ways give the same shapes: frames travel as PNG,
without loss. A running function answers what CVAT's protocol has and no more: no masks behind
polygons, rectangles and ellipses, and no scores.
"""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import httpx
from PIL import Image
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from errors import BadRequestError, TrackerError
from object_requests import Continue, Start
from settings import Settings
from shapes import Shape, ShapeType
from state_store import MemoryStateStore
from state_token import StateToken
from tracker import Frame, TrackedObject, build_tracker

# A busy or restarting function answers 503 or nothing. A repeat is safe: it changes no state.
ATTEMPTS = 4
RETRY_WAIT = wait_exponential(multiplier=1, exp_base=3)  # 1, 3 and 9 seconds
CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 600.0  # many objects on one frame take minutes on a CPU
LOCAL_ADDRESSES = ("all://localhost", "all://127.0.0.1", "all://[::1]")  # as httpx writes patterns


class FunctionUnavailableError(TrackerError):
    """The running function cannot be reached or is busy; the tokens it answered stay valid."""

    status = 503


class TrackingClient(Protocol):
    """Starts and continues objects on a frame."""

    def track(self, frame: Image.Image, items: Sequence[Start | Continue]) -> list[TrackedObject]:
        """Return one answer per item, in order.

        Args:
            frame: RGB.
            items: What to start and what to continue.

        Raises:
            TrackerError: As `Tracker.run` does.
        """

    def close(self) -> None:
        """Release the model or the connection."""


def open_tracking_client(url: str | None, env: Mapping[str, str]) -> TrackingClient:
    """Return the client that a command line asks for.

    Args:
        url: A running function, or None to track in this process.
        env: Settings of the client in this process, e.g. `os.environ`.

    Raises:
        SettingsError: See `Settings.from_env` and `model_loader.load_model`.
    """
    return RemoteTrackingClient(url) if url else LocalTrackingClient(Settings.from_env(env))


class LocalTrackingClient:
    """Tracks in this process; the tracks end with it.

    Args:
        settings: Model, device and so on; a Redis host and a time limit in it are not used.
    """

    def __init__(self, settings: Settings) -> None:
        store = MemoryStateStore(
            state_ttl_s=settings.state_ttl_s, retry_window_s=settings.retry_window_s
        )
        self._store = store
        self._tracker = build_tracker(replace(settings, request_limit_s=math.inf), store)

    def close(self) -> None:
        """Forget all tracks."""
        self._store.close()

    def track(self, frame: Image.Image, items: Sequence[Start | Continue]) -> list[TrackedObject]:
        """See `TrackingClient.track`."""
        return self._tracker.run(Frame.from_image(frame), items, keep_masks=True)


class RemoteTrackingClient:
    """Tracks through a running function.

    Args:
        url: Where it takes requests, e.g. `http://127.0.0.1:8070`.
        pause: Waits some seconds before a request is repeated.
    """

    def __init__(self, url: str, *, pause: Callable[[float], None] = time.sleep) -> None:
        self._url = url
        self._client = httpx.Client(
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            mounts=dict.fromkeys(LOCAL_ADDRESSES),  # None: without the environment's proxy
        )
        self._retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_attempt(ATTEMPTS),
            wait=RETRY_WAIT,
            sleep=pause,
            reraise=True,
        )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def track(self, frame: Image.Image, items: Sequence[Start | Continue]) -> list[TrackedObject]:
        """See `TrackingClient.track`; masks and scores stay with the function.

        Raises:
            FunctionUnavailableError: The function cannot be reached, or stays busy.
            BadRequestError: The function's own reason, or it does not answer as a tracker does.
        """
        file = io.BytesIO()
        frame.save(file, "PNG", compress_level=1)
        shapes: list[dict[str, Any] | None] = []
        states: list[str | None] = []
        for item in items:
            match item:
                case Start(shape):
                    shapes.append({"type": str(shape.type), "points": list(shape.points)})
                    states.append(None)
                case Continue(token):
                    shapes.append(None)
                    states.append(str(token))
        image = base64.b64encode(file.getvalue()).decode()
        response = self._retrying(self._post, {"image": image, "shapes": shapes, "states": states})
        return self._read(response, len(items))

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        try:
            response = self._client.post(self._url, json=body)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as err:
            raise BadRequestError(
                f"{self._url} is not a URL ({err}): start it with http:// or https://"
            ) from err
        except httpx.ConnectTimeout as err:
            raise FunctionUnavailableError(
                f"{self._url} takes no connection within {CONNECT_TIMEOUT_S:g} s: check the "
                "address, and that the function runs"
            ) from err
        except httpx.TransportError as err:
            raise FunctionUnavailableError(f"{self._url} cannot be reached: {err}") from err
        if response.is_success:
            return response
        message = f"the function answered {response.status_code}: {_reason(response)}"
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            raise FunctionUnavailableError(message)
        raise BadRequestError(message)

    def _read(self, response: httpx.Response, count: int) -> list[TrackedObject]:
        """Read the answer to a request for `count` objects."""
        try:
            answer = response.json()
            states, shapes = _list(answer["states"]), _list(answer["shapes"])
            if not len(states) == len(shapes) == count:
                raise BadRequestError(
                    f"{self._url} answered {len(states)} states and {len(shapes)} shapes where "
                    f"{count} objects were asked for: it does not fit this version"
                )
            return [_tracked_object(*pair) for pair in zip(states, shapes, strict=True)]
        except (ValueError, KeyError, TypeError) as err:
            raise BadRequestError(
                f"{self._url} does not answer as a tracker does ({err!r}): check the URL"
            ) from err


def _may_pass(err: BaseException) -> bool:
    """Tell whether a repeat may succeed: a host that takes no connection has not just restarted."""
    is_unavailable = isinstance(err, FunctionUnavailableError)
    return is_unavailable and not isinstance(err.__cause__, httpx.ConnectTimeout)


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("states and shapes must be lists")
    return value


def _tracked_object(state: str, shape: dict[str, Any] | None) -> TrackedObject:
    token = StateToken.parse(state)
    if shape is None:
        return TrackedObject(token, None, lost=True)
    points = shape["points"]
    if not all(isinstance(value, int | float) for value in points):
        raise TypeError("points must be numbers")
    return TrackedObject(token, Shape(ShapeType(shape["type"]), points), bool(shape.get("outside")))


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
