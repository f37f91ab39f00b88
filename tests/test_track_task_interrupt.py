"""Ctrl-C ends waiting at once, whatever is waited for, and what was tracked is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
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
from tests.task_desk import (
    POLYGON,
    Desk,
    MovingTrackingClient,
    desk,
    desk_with,
    frames_of,
    shape,
    visible,
)

__all__ = ["desk", "desk_with"]  # fixtures

FOUND = {"type": "polygon", "points": POLYGON}


def find_everywhere(body: Json) -> tuple[int, Any]:
    """Answer a tracker request: every object stays where it is."""
    states = [f"{'t' * 22}.{'s' * 22}"] * len(body["states"])
    return 200, {"states": states, "shapes": [FOUND] * len(states)}


def press_ctrl_c() -> None:
    """Interrupt the main thread, once it waits for something.

    Python would see a signal that comes right before a system call only after that.
    """
    main_thread = threading.main_thread()
    stat = Path(f"/proc/self/task/{main_thread.native_id}/stat")
    asleep = 0
    while asleep < 2 and threading.current_thread() is not main_thread:
        asleep = asleep + 1 if stat.read_text().rpartition(")")[2].split()[0] == "S" else 0
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


class Hold:
    """Stops a server's thread in the middle of an answer until the test ends."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def interrupt_and_wait(self) -> None:
        """Press Ctrl-C, and do not answer."""
        press_ctrl_c()
        self._event.wait()

    def end(self) -> bool:
        """Let the thread go on, and tell whether it was still held."""
        was_held = not self._event.is_set()
        self._event.set()
        return was_held


@pytest.fixture
def hold() -> Hold:
    """What holds the answers of a test."""
    return Hold()


# ---------------------------------------------------------------------- the CVAT server stalls


def test_a_process_does_not_wait_for_a_chunk(desk: Desk, tmp_path: Path) -> None:
    """It writes the frames before and exits while the server still holds the chunk."""
    desk.server.add(6, "shapes", **shape("polygon", POLYGON))
    hold = threading.Event()
    with FunctionStub(find_everywhere) as function:
        command = [sys.executable, "track_task.py", "--server", desk.server.url, "--job", "6"]
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
        desk.server.before = stall
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
    (track,) = desk.server.tracks(6)
    frames = visible(track)
    # Ctrl-C may come before the answer to the eighth frame.
    assert frames in [dict.fromkeys(range(n), True) | {n: False} for n in (7, 8)]


def test_a_repeat_goes_on_after_a_chunk_that_did_not_come(
    desk_with: Callable[[Task], Desk], hold: Hold
) -> None:
    """Nothing is tracked twice but the frame it starts from."""
    desk = desk_with(Task(frames_of(12), chunk_size=6))
    desk.server.add(6, "shapes", **shape("polygon", POLYGON))
    waiting = threading.Event()

    def stall(call: Call) -> None:
        if call.query.get("index") == "1":
            waiting.wait()
            hold.interrupt_and_wait()

    def last_of_chunk(frame: int) -> None:
        if frame == 5:
            waiting.set()

    desk.server.before = stall
    code = desk.track(client=MovingTrackingClient(on_frame=last_of_chunk))
    was_held = hold.end()
    desk.server.before = lambda _: None
    (track,) = desk.server.tracks(6)
    client = MovingTrackingClient()
    again = desk.track(client=client)

    assert was_held
    assert code == 130
    assert visible(track) == dict.fromkeys(range(6), True) | {6: False}
    assert again == 0
    assert client.seen == list(range(5, 12))
    assert visible(desk.server.tracks(6)[0]) == dict.fromkeys(range(12), True)


@pytest.mark.parametrize(
    "path",
    ["/api/auth/login", "/api/jobs/6", "/api/jobs/6/data/meta", "/api/jobs/6/annotations"],
)
def test_planning_does_not_wait_for_the_server(
    desk: Desk, hold: Hold, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    """There is nothing to lose yet."""
    desk.server.add(6, "shapes", **shape("polygon", POLYGON))
    before = desk.server.annotations(6)

    def stall(call: Call) -> None:
        if call.path == path:
            hold.interrupt_and_wait()

    desk.server.before = stall
    code = desk.track()

    assert hold.end()
    assert code == 130
    assert "interrupted" in capsys.readouterr().err
    assert desk.server.annotations(6) == before


@pytest.mark.parametrize("action", ["create", "delete"])
def test_a_write_is_finished_first(desk: Desk, action: str) -> None:
    """Both of its parts, though one Ctrl-C comes in between."""
    desk.server.add(6, "shapes", **shape("polygon", POLYGON))

    def interrupt(call: Call) -> None:
        if call.is_(action):
            press_ctrl_c()
            desk.server.before = lambda _: None

    desk.server.before = interrupt
    client = MovingTrackingClient()
    code = desk.track("--batch", "4", client=client)

    assert code == 130
    assert client.seen == list(range(5))
    assert visible(desk.server.tracks(6)[0]) == dict.fromkeys(range(5), True) | {5: False}
    assert desk.server.shapes(6) == []


@pytest.mark.parametrize("moment", ["planning", "writing"])
def test_pauses_before_a_repeat_end_at_once(
    desk: Desk, hold: Hold, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The server fails, so there is no use in trying to write."""
    desk.server.add(6, "shapes", **shape("polygon", POLYGON))
    before = desk.server.annotations(6)

    def fail(call: Call) -> None:
        if call.method == ("GET" if moment == "planning" else "PATCH"):
            raise Refusal(500, "fails")

    monkeypatch.setattr("cvat_task.interrupts.sleep", lambda _: hold.interrupt_and_wait())
    desk.server.before = fail
    code = desk.track("--batch", "4")

    assert hold.end()
    assert code == 130
    assert desk.server.annotations(6) == before


def test_a_second_ctrl_c_does_not_wait_for_a_write(
    desk: Desk, hold: Hold, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repeat finds out what was written."""
    desk.server.add(6, "shapes", **shape("polygon", POLYGON))
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

    desk.server.before = stall
    code = desk.track("--batch", "4")
    assert hold.end()
    desk.server.before = lambda _: None
    again = desk.track("--batch", "4")

    assert (code, again) == (130, 0)
    assert "goes on after the last batch" in capsys.readouterr().err
    assert visible(desk.server.tracks(6)[0]) == dict.fromkeys(range(12), True)


# ---------------------------------------------------------------------- a running function stalls


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_running_function_is_not_waited_for(desk: Desk, hold: Hold, *, is_busy: bool) -> None:
    """Neither for its answer nor for the pause before a repeat; what was found is written."""
    desk.server.add(6, "shapes", **shape("polygon", POLYGON))
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
        code = desk.track(client=client)
        was_held = hold.end()

    assert was_held
    assert code == 130
    assert visible(desk.server.tracks(6)[0]) == dict.fromkeys(range(5), True) | {5: False}
