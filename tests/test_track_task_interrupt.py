"""Ctrl-C ends waiting at once, whatever is waited for, and what was tracked is written."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import track_task
from clips.tracking_client import RemoteTrackingClient
from cvat_task.interrupts import Interrupts
from testbed.cvat_server import PASSWORD, USER, Call, Refusal, Task
from tests.function_stub import FunctionStub, Json
from tests.stalls import Hold, press_ctrl_c
from tests.task_harness import (
    POLYGON,
    MovingTrackingClient,
    TaskHarness,
    frames_of,
    harness,
    harness_for,
    shape,
    visible,
)

__all__ = ["harness", "harness_for"]  # fixtures

FOUND = {"type": "polygon", "points": POLYGON}


def find_everywhere(body: Json) -> tuple[int, Any]:
    """Answer a tracker request: every object stays where it is."""
    states = [f"{'t' * 22}.{'s' * 22}"] * len(body["states"])
    return 200, {"states": states, "shapes": [FOUND] * len(states)}


@pytest.fixture
def hold() -> Hold:
    """What stops a server's or a function's answers."""
    return Hold()


# ---------------------------------------------------------------------- the CVAT server stalls


def test_a_process_does_not_wait_for_a_chunk(harness: TaskHarness, tmp_path: Path) -> None:
    """It writes the frames before and exits while the server still holds the chunk."""
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    hold = threading.Event()
    with FunctionStub(find_everywhere) as function:
        command = [sys.executable, "track_task.py", "--server", harness.server.url, "--job", "6"]
        command += ["--auth", f"{USER}:{PASSWORD}", "--url", function.url]
        root = Path(track_task.__file__).parent
        log = (tmp_path / "log").open("w")
        process = subprocess.Popen(command, cwd=root, stdout=log, stderr=log)

        def stall(call: Call) -> None:
            if call.query.get("index") == "2":
                all_before.wait()
                process.send_signal(signal.SIGINT)
                hold.wait()

        all_before = threading.Event()

        def answer(body: Json) -> tuple[int, Any]:
            if len(function.bodies) == 8:
                all_before.set()
            return find_everywhere(body)

        function.answer = answer
        harness.server.before = stall
        try:
            code = process.wait(timeout=120)
            was_held = not hold.is_set()
        finally:
            process.kill()
            hold.set()
            log.close()

    assert was_held
    assert code == 130, (tmp_path / "log").read_text()
    assert "interrupted: what was tracked is written" in (tmp_path / "log").read_text()
    (track,) = harness.server.tracks(6)
    frames = visible(track)
    # Ctrl-C may come before the answer to the eighth frame.
    assert frames in [dict.fromkeys(range(n), True) | {n: False} for n in (7, 8)]


def test_a_repeat_goes_on_after_a_chunk_that_did_not_come(
    harness_for: Callable[[Task], TaskHarness], hold: Hold
) -> None:
    """Nothing is tracked twice but the frame it starts from."""
    harness = harness_for(Task(frames_of(12), chunk_size=6))
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    waiting = threading.Event()

    def stall(call: Call) -> None:
        if call.query.get("index") == "1":
            waiting.wait()
            hold.interrupt_and_wait()

    def last_of_chunk(frame: int) -> None:
        if frame == 5:
            waiting.set()

    harness.server.before = stall
    code = harness.track(client=MovingTrackingClient(on_frame=last_of_chunk))
    was_held = hold.end()
    harness.server.before = lambda _: None
    (track,) = harness.server.tracks(6)
    client = MovingTrackingClient()
    again = harness.track(client=client)

    assert was_held
    assert code == 130
    assert visible(track) == dict.fromkeys(range(6), True) | {6: False}
    assert again == 0
    assert client.seen == list(range(5, 12))
    assert visible(harness.server.tracks(6)[0]) == dict.fromkeys(range(12), True)


@pytest.mark.parametrize(
    "path",
    ["/api/auth/login", "/api/jobs/6", "/api/jobs/6/data/meta", "/api/jobs/6/annotations"],
)
def test_planning_does_not_wait_for_the_server(
    harness: TaskHarness, hold: Hold, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    """There is nothing to lose yet."""
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    before = harness.server.annotations(6)

    def stall(call: Call) -> None:
        if call.path == path:
            hold.interrupt_and_wait()

    harness.server.before = stall
    code = harness.track()

    assert hold.end()
    assert code == 130
    assert "interrupted" in capsys.readouterr().err
    assert harness.server.annotations(6) == before


@pytest.mark.parametrize("action", ["create", "delete"])
def test_a_write_is_finished_first(harness: TaskHarness, action: str) -> None:
    """Both of its parts, though one Ctrl-C comes in between."""
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))

    def interrupt(call: Call) -> None:
        if call.is_(action):
            press_ctrl_c()
            harness.server.before = lambda _: None

    harness.server.before = interrupt
    client = MovingTrackingClient()
    code = harness.track("--batch", "4", client=client)

    assert code == 130
    assert client.seen == list(range(5))
    assert visible(harness.server.tracks(6)[0]) == dict.fromkeys(range(5), True) | {5: False}
    assert harness.server.shapes(6) == []


@pytest.mark.parametrize("moment", ["planning", "writing"])
def test_pauses_before_a_repeat_end_at_once(
    harness: TaskHarness, hold: Hold, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The server fails, so there is no use in trying to write."""
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    before = harness.server.annotations(6)

    def fail(call: Call) -> None:
        if call.method == ("GET" if moment == "planning" else "PATCH"):
            raise Refusal(500, "fails")

    monkeypatch.setattr("cvat_task.interrupts.sleep", lambda _: hold.interrupt_and_wait())
    harness.server.before = fail
    code = harness.track("--batch", "4")

    assert hold.end()
    assert code == 130
    assert harness.server.annotations(6) == before


def test_a_second_ctrl_c_does_not_wait_for_a_write(
    harness: TaskHarness,
    hold: Hold,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A repeat finds out what was written."""
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    handled = threading.Event()
    handle = Interrupts._handle

    def note(self: Interrupts, *arguments: object) -> None:
        handled.set()
        handle(self, *arguments)

    monkeypatch.setattr(Interrupts, "_handle", note)

    def stall(call: Call) -> None:
        if call.is_("create"):
            press_ctrl_c()
            handled.wait()  # else the system would make one signal of both
            hold.interrupt_and_wait()

    harness.server.before = stall
    code = harness.track("--batch", "4")
    assert hold.end()
    harness.server.before = lambda _: None
    again = harness.track("--batch", "4")

    assert (code, again) == (130, 0)
    assert "goes on after the last batch" in capsys.readouterr().err
    assert visible(harness.server.tracks(6)[0]) == dict.fromkeys(range(12), True)


# ---------------------------------------------------------------------- a running function stalls


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_running_function_is_not_waited_for(
    harness: TaskHarness, hold: Hold, *, is_busy: bool
) -> None:
    """Neither for its answer nor for the pause before a repeat; what was found is written."""
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    function = FunctionStub()

    def stall_at_sixth(body: Json) -> tuple[int, Any]:
        if len(function.bodies) < 6:
            return find_everywhere(body)
        if not is_busy:
            hold.interrupt_and_wait()
        return 503, {"error": "busy"}

    function.answer = stall_at_sixth
    with (
        function,
        closing(
            RemoteTrackingClient(function.url, pause=lambda _: hold.interrupt_and_wait())
        ) as client,
    ):
        code = harness.track(client=client)
        was_held = hold.end()

    assert was_held
    assert code == 130
    assert visible(harness.server.tracks(6)[0]) == dict.fromkeys(range(5), True) | {5: False}
