"""Owns tracking on a frame at hand, in this process or by a running function; one interface.

The command line doors use it. Both give the same shapes: frames travel as PNG, unchanged. A running
function answers what CVAT's protocol has and no more: no masks behind polygons, rectangles and
ellipses, and no scores.
"""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import httpx
from PIL import Image

from errors import BadRequestError, StateStoreUnavailableError, TrackerError
from object_requests import Continue, Start
from settings import Settings
from shapes import Shape, ShapeType
from state_store import MemoryStateStore
from state_token import StateToken
from tracker import Frame, TrackedObject, build_tracker

# A busy or restarting function answers 503 or nothing; a repeat loses and changes nothing.
RETRY_PAUSES_S = (1.0, 3.0, 9.0)
REQUEST_TIMEOUT_S = 600.0


class TrackingClient(Protocol):
    """Starts and continues objects on one frame."""

    def track(self, frame: Image.Image, items: Sequence[Start | Continue]) -> list[TrackedObject]:
        """Return one answer per item, in order.

        Args:
            frame: RGB.
            items: What to start and what to continue.

        Raises:
            TrackerError: As `Tracker.run` does.
        """

    def close(self) -> None:
        """Let go of what it holds."""


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
    """Tracks in this process; states live and end with it.

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
    """Tracks by a running function.

    Args:
        url: Where it takes requests, e.g. `http://127.0.0.1:8070`.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = httpx.Client(timeout=REQUEST_TIMEOUT_S)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def track(self, frame: Image.Image, items: Sequence[Start | Continue]) -> list[TrackedObject]:
        """See `TrackingClient.track`; masks and scores stay with the function.

        Raises:
            TrackerError: The function's own reason, or that it cannot be reached.
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
        response = self._post({"image": image, "shapes": shapes, "states": states})
        try:
            answer = response.json()
            pairs = zip(answer["states"], answer["shapes"], strict=True)
            return [_tracked(state, shape) for state, shape in pairs]
        except (ValueError, KeyError, TypeError) as err:
            raise BadRequestError(f"{self._url} does not answer as this function does") from err

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        for pause_s in (*RETRY_PAUSES_S, None):
            try:
                response = self._client.post(self._url, json=body)
            except httpx.UnsupportedProtocol as err:
                raise BadRequestError(f"{self._url}: {err}") from err
            except httpx.TransportError as err:
                reason: TrackerError = StateStoreUnavailableError(f"{self._url}: {err}")
            else:
                if response.is_success:
                    return response
                reason = _refusal(response)
                if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    raise reason
            if pause_s is None:
                raise reason
            time.sleep(pause_s)
        raise AssertionError("unreachable")


def _tracked(state: str, shape: dict[str, Any] | None) -> TrackedObject:
    if shape is None:
        return TrackedObject(StateToken.parse(state), None, lost=True)
    found = Shape(ShapeType(shape["type"]), shape["points"])
    return TrackedObject(StateToken.parse(state), found, lost=bool(shape.get("outside")))


def _refusal(response: httpx.Response) -> TrackerError:
    try:
        reason = str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        reason = response.text[:200]
    return BadRequestError(f"the function answered {response.status_code}: {reason}")
