"""Run `track_task.py` in tests: a served task, the command, and a client that moves objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tenacity import wait_none

import track_task
from clips.tracking_client import TrackingClient
from cvat_task import connection
from object_requests import Continue, Start
from shapes import Shape, ShapeType
from state_token import StateToken, new_id
from testbed.cvat_server import PASSWORD, USER, CvatServer, Picture, Task
from tracker import TrackedObject

SIZE_HW = (60, 80)
POLYGON = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]
MASK = [0, 100, 40, 10, 49, 19]


def frames_of(count: int) -> list[Picture]:
    """Return frames whose red value tells their number."""
    return [np.full((*SIZE_HW, 3), (5 * number, 9, 9), np.uint8) for number in range(count)]


class MovingTrackingClient:
    """Moves every object a pixel to the right per frame.

    Args:
        lost: Whether an object of a type is lost on a frame.
        on_frame: Called with each frame's number before it is tracked.

    Attributes:
        seen: Numbers of the frames, in order.
        starts: Frame and points of each object that was started.
    """

    def __init__(
        self,
        lost: Callable[[ShapeType, int], bool] = lambda _type, _frame: False,
        on_frame: Callable[[int], None] = lambda _frame: None,
    ) -> None:
        self._lost = lost
        self._on_frame = on_frame
        self._starts: dict[StateToken, tuple[Shape, int]] = {}
        self.seen: list[int] = []
        self.starts: list[tuple[int, list[float]]] = []

    def close(self) -> None:
        """Do nothing."""

    def track(self, frame: Image.Image, items: Sequence[Start | Continue]) -> list[TrackedObject]:
        """See `TrackingClient.track`."""
        pixel = frame.getpixel((0, 0))
        assert isinstance(pixel, tuple)
        number = round(pixel[0] / 5)
        self._on_frame(number)
        self.seen.append(number)
        answers = []
        for item in items:
            token = StateToken(new_id(), new_id())
            if isinstance(item, Start):
                self.starts.append((number, list(item.shape.points)))
                self._starts[token] = item.shape, number
                answers.append(TrackedObject(token, item.shape, lost=False))
                continue
            shape, start = self._starts[token] = self._starts[item.token]
            if self._lost(shape.type, number):
                answers.append(TrackedObject(token, None, lost=True))
            else:
                moved = moved_by(shape.type, shape.points, number - start)
                answers.append(TrackedObject(token, Shape(shape.type, moved), lost=False))
        return answers


def moved_by(shape_type: str, points: Sequence[float], distance: int) -> list[float]:
    """Return a shape's points, moved to the right."""
    points = list(points)
    first, columns = (len(points) - 4, 2) if shape_type == "mask" else (0, 2)
    for index in range(first, len(points), columns):
        points[index] += distance
    return points


class TaskHarness:
    """A server and the command, with another client in place of the model."""

    def __init__(self, server: CvatServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = server
        self._monkeypatch = monkeypatch

    def track(self, *options: str, client: TrackingClient | None = None, job: int = 6) -> int:
        """Run the command and return its exit code."""
        self._monkeypatch.setattr(
            track_task,
            "open_tracking_client",
            lambda *_: MovingTrackingClient() if client is None else client,
        )
        what = [] if "--task" in options else ["--job", str(job)]
        login = ["--server", self.server.url, "--auth", f"{USER}:{PASSWORD}"]
        return track_task.main([*login, *what, *options])


@pytest.fixture
def harness_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[Task], TaskHarness]]:
    """Serve tasks; journals are in a folder of the test, and repeats do not wait."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("CVAT_ACCESS_TOKEN", raising=False)
    monkeypatch.setattr(connection, "RETRY_WAIT", wait_none())
    with ExitStack() as servers:
        yield lambda task: TaskHarness(servers.enter_context(CvatServer(task)), monkeypatch)


@pytest.fixture
def harness(harness_for: Callable[[Task], TaskHarness]) -> TaskHarness:
    """A task of one job of 12 frames in chunks of 4."""
    return harness_for(Task(frames_of(12)))


def shape(
    shape_type: str, points: Sequence[float], frame: int = 0, **fields: Any
) -> dict[str, Any]:
    """Return a shape as an annotator draws it."""
    defaults = {"label_id": 6, "attributes": [{"spec_id": 1, "value": "big"}]}
    return {"type": shape_type, "frame": frame, "points": list(points), **defaults, **fields}


def keyframe(shape_type: str, frame: int, points: Sequence[float], **fields: Any) -> dict[str, Any]:
    """Return a keyframe of a track."""
    return {"type": shape_type, "frame": frame, "points": list(points), **fields}


def visible(track: dict[str, Any]) -> dict[int, bool]:
    """Return for each keyframe of a track, by frame, whether the object is visible."""
    return {key["frame"]: not key["outside"] for key in track["shapes"]}


def without_ids(value: Any) -> Any:
    """Return JSON without ids, lists in a canonical order."""
    if isinstance(value, dict):
        return {name: without_ids(obj) for name, obj in value.items() if name != "id"}
    if isinstance(value, list):
        return sorted((without_ids(obj) for obj in value), key=repr)
    return value
