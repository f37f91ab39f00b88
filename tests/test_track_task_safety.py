"""A disturbed run loses nothing, doubles nothing, and says in one line what is wrong."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import track_task
from cvat_task import connection
from errors import TrackerError
from testbed.cvat_server import LABELS, PASSWORD, TOKEN, USER, Call, CvatServer, Refusal, Task
from testbed.redis_server import free_port
from tests.stalls import unanswered_url
from tests.task_harness import (
    MASK,
    POLYGON,
    MovingTrackingClient,
    TaskHarness,
    frames_of,
    harness,
    harness_for,
    keyframe,
    moved_by,
    shape,
    visible,
    without_ids,
)

__all__ = ["harness", "harness_for"]  # fixtures

Json = dict[str, Any]


def two_jobs() -> Task:
    """Return a task of two jobs of 10 frames that share 3."""
    return Task(frames_of(17), segment_size=10, overlap=3)


def draw(server: CvatServer) -> None:
    """Draw a polygon and a mask, and a rectangle that is not to be tracked."""
    server.add(6, "shapes", **shape("polygon", POLYGON))
    server.add(6, "shapes", **shape("mask", MASK))
    server.add(6, "shapes", **shape("rectangle", [1, 1, 5, 5], frame=4, label_id=7, attributes=[]))


def everything(server: CvatServer) -> list[Any]:
    """Return all annotations, without ids."""
    return [without_ids(server.annotations(job)) for job in server.data]


@pytest.fixture
def undisturbed(harness_for: Callable[[Task], TaskHarness]) -> list[Any]:
    """The annotations after a run that nobody disturbs."""
    harness = harness_for(two_jobs())
    draw(harness.server)
    assert harness.track("--task", "6", "--batch", "4") == 0
    return everything(harness.server)


# ---------------------------------------------------------------------- interrupted and repeated


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("nth", range(9))
def test_a_repeat_gives_the_same_as_an_undisturbed_run(
    harness_for: Callable[[Task], TaskHarness], undisturbed: list[Any], nth: int, moment: str
) -> None:
    """Whether the server fails before it writes, or after it has written and before it answers."""
    harness = harness_for(two_jobs())
    draw(harness.server)
    writes = 0

    def count(call: Call) -> None:
        nonlocal writes
        writes += call.method == "PATCH"
        if writes > nth:
            raise Refusal(500, "lost")

    setattr(harness.server, moment, count)
    first = harness.track("--task", "6", "--batch", "4")
    harness.server.before = harness.server.after = lambda _: None
    client = MovingTrackingClient()
    code = harness.track("--task", "6", "--batch", "4", client=client)

    assert first == 6
    assert code == 0
    assert everything(harness.server) == undisturbed
    assert client.seen == sorted(set(client.seen))
    assert client.seen[-1] == 16
    # What is written is not tracked again: a batch of four frames takes two writes.
    assert client.seen[0] >= {0: 0, 1: 0, 2: 4, 3: 4, 4: 8, 5: 8}.get(nth, 8)


def test_a_repeat_may_write_more_or_less_often(
    harness_for: Callable[[Task], TaskHarness], undisturbed: list[Any]
) -> None:
    """Another `--batch` is the same run: a half-written batch is completed."""
    harness = harness_for(two_jobs())
    draw(harness.server)
    lost: list[Call] = []

    def lose(call: Call) -> None:
        if call.is_("delete") or lost:
            lost.append(call)
            raise Refusal(500, "lost")

    harness.server.before = lose
    first = harness.track("--task", "6", "--batch", "4")
    harness.server.before = lambda _: None
    again = harness.track("--task", "6", "--batch", "2")

    assert (first, again) == (6, 0)
    assert everything(harness.server) == undisturbed


def test_ctrl_c_writes_what_is_found_and_a_repeat_goes_on(
    harness_for: Callable[[Task], TaskHarness],
    undisturbed: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The frame that is being tracked is the last one."""
    harness = harness_for(two_jobs())
    draw(harness.server)

    def interrupt(frame: int) -> None:
        if frame == 6:
            os.kill(os.getpid(), signal.SIGINT)

    code = harness.track(
        "--task", "6", "--batch", "4", client=MovingTrackingClient(on_frame=interrupt)
    )
    (track,) = harness.server.tracks(6)
    client = MovingTrackingClient()
    again = harness.track("--task", "6", "--batch", "4", client=client)

    assert code == 130
    assert visible(track) == dict.fromkeys(range(7), True) | {7: False}
    assert "interrupted" in capsys.readouterr().out
    assert again == 0
    assert client.seen == list(range(6, 17))
    assert everything(harness.server) == undisturbed


def test_a_second_ctrl_c_ends_at_once_and_loses_one_batch(
    harness: TaskHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repeat goes on after the batch before."""
    draw(harness.server)

    def interrupt(frame: int) -> None:
        if frame == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    code = harness.track("--batch", "4", client=MovingTrackingClient(on_frame=interrupt))
    client = MovingTrackingClient()
    harness.track("--batch", "4", client=client)

    assert code == 130
    assert "goes on after the last batch" in capsys.readouterr().err
    assert client.seen == list(range(4, 12))
    assert visible(harness.server.tracks(6)[0]) == dict.fromkeys(range(12), True)
    assert [obj["frame"] for obj in harness.server.shapes(6, type="mask")] == list(range(12))


def test_an_object_lost_when_interrupted_is_taken_up_where_it_was_seen(
    harness: TaskHarness,
) -> None:
    """The frames since then are tracked again, and nothing is written on them twice."""
    draw(harness.server)

    def interrupt(frame: int) -> None:
        if frame == 7:
            os.kill(os.getpid(), signal.SIGINT)

    def lost(shape_type: str, frame: int) -> bool:
        return shape_type == "mask" and 4 <= frame <= 8

    harness.track("--batch", "4", client=MovingTrackingClient(lost, interrupt))
    client = MovingTrackingClient(lost)
    harness.track("--batch", "4", client=client)

    assert client.seen == list(range(3, 12))
    assert [start[0] for start in client.starts] == [3, 7]
    masks = [obj["frame"] for obj in harness.server.shapes(6, type="mask")]
    assert masks == [0, 1, 2, 3, 9, 10, 11]


def test_a_correction_before_the_repeat_counts(harness: TaskHarness) -> None:
    """It goes on from the corrected position."""
    draw(harness.server)

    def interrupt(frame: int) -> None:
        if frame == 5:
            os.kill(os.getpid(), signal.SIGINT)

    harness.track(client=MovingTrackingClient(on_frame=interrupt))
    moved = moved_by("polygon", POLYGON, 30)
    harness.server.data[6]["tracks"][0]["shapes"][5]["points"] = moved
    client = MovingTrackingClient()
    harness.track(client=client)

    assert (5, moved) in client.starts
    keyframes = harness.server.tracks(6)[0]["shapes"]
    assert keyframes[5]["points"] == moved
    assert keyframes[6]["points"] == moved_by("polygon", moved, 1)


def test_a_repeat_names_deleted_objects(
    harness: TaskHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    """A track that somebody has deleted since is not written again."""
    draw(harness.server)

    def interrupt(frame: int) -> None:
        if frame == 5:
            os.kill(os.getpid(), signal.SIGINT)

    harness.track(client=MovingTrackingClient(on_frame=interrupt))
    harness.server.remove(6, "tracks", harness.server.tracks(6)[0]["id"])
    code = harness.track()

    assert code == 0
    assert "child: changed or deleted by somebody since: left alone" in capsys.readouterr().out
    assert not harness.server.tracks(6)


def test_a_repeat_in_the_next_job_knows_the_size_of_the_frame_before(
    harness_for: Callable[[Task], TaskHarness],
) -> None:
    """The journal ends on the last frame of a job that shares no frame with the next."""
    frames = [*frames_of(11), np.zeros((30, 30, 3), np.uint8)]
    harness = harness_for(Task(frames, video=False, segment_size=6))
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    harness.server.refuse["/api/jobs/7/data"] = 500, "no chunk"
    first = harness.track("--task", "6", "--to-frame", "10")
    harness.server.refuse.clear()
    again = harness.track("--task", "6", "--to-frame", "10")

    assert (first, again) == (6, 0)
    assert visible(harness.server.tracks(7)[0]) == dict.fromkeys(range(6, 11), True) | {11: False}


def test_restart_begins_anew(harness: TaskHarness, capsys: pytest.CaptureFixture[str]) -> None:
    """A half-written batch is completed, and then everything is replaced."""
    draw(harness.server)
    lost: list[Call] = []

    def lose(call: Call) -> None:
        if call.is_("delete") or lost:
            lost.append(call)
            raise Refusal(500, "lost")

    harness.server.before = lose
    harness.track("--batch", "4")
    harness.server.before = lambda _: None
    half_written = harness.server.annotations(6)
    dry = harness.track("--batch", "4", "--dry-run")
    unchanged = harness.server.annotations(6)
    said = capsys.readouterr().out
    client = MovingTrackingClient()
    harness.track("--batch", "4", "--restart", client=client)

    assert len(half_written["shapes"]) > 5
    assert dry == 0
    assert "going on after frame 4" in said
    assert unchanged == half_written
    assert client.seen == list(range(12))
    assert len(harness.server.tracks(6)) == 1
    assert [obj["frame"] for obj in harness.server.shapes(6, type="mask")] == list(range(12))
    assert not harness.server.shapes(6, type="polygon")


def test_a_journal_of_another_version_is_ignored(harness: TaskHarness, tmp_path: Path) -> None:
    """The run begins anew."""
    draw(harness.server)

    def interrupt(frame: int) -> None:
        if frame == 6:
            os.kill(os.getpid(), signal.SIGINT)

    harness.track(client=MovingTrackingClient(on_frame=interrupt))
    (journal,) = (tmp_path / "state").rglob("*.json")
    saved = json.loads(journal.read_text())
    journal.write_text(json.dumps(saved | {"version": saved["version"] - 1}))
    client = MovingTrackingClient()
    code = harness.track(client=client)

    assert code == 0
    assert client.seen == list(range(12))


def test_what_was_found_before_the_client_fails_is_written(
    harness: TaskHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    """The client's message is printed."""
    draw(harness.server)

    def fail(frame: int) -> None:
        if frame == 6:
            raise TrackerError("the function has stopped")

    code = harness.track(client=MovingTrackingClient(on_frame=fail))

    assert code == 1
    assert "the function has stopped" in capsys.readouterr().err
    assert visible(harness.server.tracks(6)[0]) == dict.fromkeys(range(6), True) | {6: False}


# ---------------------------------------------------------------------- the server and others


def test_nothing_is_deleted_before_its_replacement_exists(harness: TaskHarness) -> None:
    """At no moment does a frame lack an object that it had."""
    draw(harness.server)
    covered: list[set[int]] = []

    def look(_: Call) -> None:
        frames = {key["frame"] for track in harness.server.tracks(6) for key in track["shapes"]}
        frames |= {obj["frame"] for obj in harness.server.shapes(6, type="polygon")}
        masks = {obj["frame"] for obj in harness.server.shapes(6, type="mask")}
        covered.extend([frames, masks])

    harness.server.before = harness.server.after = look
    harness.track("--batch", "3")
    harness.track("--batch", "3", "--from-frame", "2")

    # The keyframe that ends a track moves on with each batch, which may leave a frame out.
    for kind in (covered[0::2], covered[1::2]):
        for before, after in itertools.pairwise(kind):
            assert before <= after | {max(before)}
        assert all(0 in frames for frames in kind)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_server_that_fails_once_is_asked_again_and_nothing_is_doubled(
    harness_for: Callable[[Task], TaskHarness], undisturbed: list[Any], moment: str
) -> None:
    """Also when it had done what it was asked but could not answer."""
    harness = harness_for(two_jobs())
    draw(harness.server)
    failed: set[tuple[str, str, str]] = set()

    def fail_once(call: Call) -> None:
        key = (call.method, call.path, str(call.query))
        if key not in failed and call.path != "/api/auth/login":
            failed.add(key)
            raise Refusal(502, "<html>Bad Gateway</html>")

    setattr(harness.server, moment, fail_once)

    assert harness.track("--task", "6", "--batch", "4") == 0
    assert everything(harness.server) == undisturbed
    assert len(failed) > 10


def test_an_object_that_somebody_changes_meanwhile_is_left_alone(
    harness: TaskHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are tracked on, and a new object stays."""
    draw(harness.server)
    harness.server.add(6, "shapes", **shape("ellipse", [40, 40, 50, 30]))
    theirs: list[Json] = []

    def annotate(frame: int) -> None:
        if frame == 6:
            track = next(
                obj
                for obj in harness.server.data[6]["tracks"]
                if obj["shapes"][0]["type"] == "polygon"
            )
            track["shapes"][2]["points"] = moved_by("polygon", POLYGON, 40)
            theirs.append(without_ids(track))
            harness.server.add(6, "shapes", **shape("polygon", POLYGON, frame=8))

    code = harness.track("--batch", "4", client=MovingTrackingClient(on_frame=annotate))
    tracks = harness.server.tracks(6)
    polygon, ellipse = sorted(tracks, key=lambda obj: obj["shapes"][0]["type"], reverse=True)

    assert code == 0
    assert polygon["shapes"][2]["points"] == moved_by("polygon", POLYGON, 40)
    assert visible(polygon) == dict.fromkeys(range(5), True) | {5: False}
    assert visible(ellipse) == dict.fromkeys(range(12), True)
    assert [obj["frame"] for obj in harness.server.shapes(6, type="mask")] == list(range(12))
    assert len(harness.server.shapes(6, type="polygon", frame=8)) == 1
    assert "child was changed by somebody after frame 4: left alone" in capsys.readouterr().err


def test_what_somebody_deletes_meanwhile_stays_deleted(harness: TaskHarness) -> None:
    """The object is not written again."""
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    client = MovingTrackingClient(
        on_frame=lambda frame: (
            harness.server.remove(6, "tracks", harness.server.tracks(6)[0]["id"])
            if frame == 6
            else None
        )
    )
    code = harness.track("--batch", "4", client=client)

    assert code == 0
    assert not harness.server.tracks(6)
    assert client.seen == list(range(9))  # nothing is left to track


def test_what_somebody_changes_while_it_is_written_stays(
    harness: TaskHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    """After its replacement is created and before it is deleted; a line says so."""
    number = harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    corrected = moved_by("polygon", POLYGON, 3)

    def correct(call: Call) -> None:
        if call.is_("create") and harness.server.data[6]["shapes"]:
            harness.server.data[6]["shapes"][0]["points"] = corrected

    harness.server.after = correct
    code = harness.track("--batch", "4")

    assert code == 0
    assert [obj["points"] for obj in harness.server.shapes(6, id=number)] == [corrected]
    assert len(harness.server.tracks(6)) == 1
    assert "1 annotations were changed by somebody while" in capsys.readouterr().err


def test_a_server_that_finishes_what_a_proxy_gave_up_doubles_nothing(
    harness_for: Callable[[Task], TaskHarness], undisturbed: list[Any]
) -> None:
    """The server carries out the first attempt during the second one."""
    harness = harness_for(two_jobs())
    draw(harness.server)
    late: list[Call] = []

    def give_up(call: Call) -> None:
        if call.is_("create"):
            late.append(call)
            if len(late) % 2:
                raise Refusal(504, "Gateway Timeout")
            job = int(call.path.split("/")[3])
            harness.server.create(job, late[-2].body)

    harness.server.before = give_up
    code = harness.track("--task", "6", "--batch", "4")

    assert code == 0
    assert everything(harness.server) == undisturbed


def test_an_earlier_shape_that_somebody_corrects_meanwhile_stays(harness: TaskHarness) -> None:
    """No other shape is written on its frame."""
    harness.server.add(6, "shapes", **shape("mask", MASK))
    harness.track()
    corrected = moved_by("mask", MASK, 2)

    def correct(frame: int) -> None:
        if frame == 5:
            (mask,) = (obj for obj in harness.server.data[6]["shapes"] if obj["frame"] == 9)
            mask["points"] = corrected

    harness.track("--batch", "4", client=MovingTrackingClient(on_frame=correct))
    masks = harness.server.shapes(6)

    assert [obj["frame"] for obj in masks] == list(range(12))
    assert [obj["frame"] for obj in masks if obj["points"] == corrected] == [2, 9]


def test_a_chunk_that_does_not_come_keeps_what_was_found(harness: TaskHarness) -> None:
    """The frames before it are written, and a repeat begins after them."""
    draw(harness.server)

    def refuse(call: Call) -> None:
        if call.query.get("index") == "2":
            raise Refusal(500, "no chunk")

    harness.server.before = refuse
    code = harness.track()
    frames = visible(harness.server.tracks(6)[0])
    harness.server.before = lambda _: None
    client = MovingTrackingClient()
    again = harness.track(client=client)

    assert code == 6
    assert frames == dict.fromkeys(range(8), True) | {8: False}
    assert again == 0
    assert client.seen == list(range(7, 12))
    assert visible(harness.server.tracks(6)[0]) == dict.fromkeys(range(12), True)


# ---------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("path", "answer", "code", "words"),
    [
        ("/api/jobs/6", (403, {"detail": "not yours"}), 5, "ask for the job to be assigned"),
        ("/api/jobs/6", (404, {"detail": "No Job matches"}), 4, "check the number"),
        ("/api/jobs/6", (500, "<html>oh</html>"), 6, "failed with 500"),
        ("/api/jobs/6", (401, {"detail": "expired"}), 3, "check user, password, token"),
        ("/api/jobs/6/annotations", (503, ""), 6, "failed with 503"),
        ("/api/jobs/6/data", (500, "no chunk"), 6, "failed with 500"),
        ("/api/jobs/6/data/meta", (200, "?"), 6, "is this a CVAT server"),
    ],
)
def test_errors_of_the_server(
    harness: TaskHarness,
    capsys: pytest.CaptureFixture[str],
    path: str,
    answer: tuple[int, object],
    code: int,
    words: str,
) -> None:
    """Each is one line that says what to do, with an exit code of its own."""
    draw(harness.server)
    if answer[0] == 200:
        harness.server.raw[path] = b"<html>"
    else:
        harness.server.refuse[path] = answer

    assert harness.track() == code
    err = capsys.readouterr().err
    assert words in err
    lines = [line for line in err.splitlines() if "frame/s" not in line and line.strip()]
    assert len(lines) == 1, err


@pytest.mark.parametrize(("status", "code"), [(403, 5), (400, 8), (500, 6)])
def test_errors_of_writing(
    harness: TaskHarness, capsys: pytest.CaptureFixture[str], status: int, code: int
) -> None:
    """Nothing is changed, and the run ends at the first batch that fails."""
    draw(harness.server)
    before = harness.server.annotations(6)

    def refuse(call: Call) -> None:
        if call.method == "PATCH":
            raise Refusal(status, {"detail": "no"})

    harness.server.before = refuse
    client = MovingTrackingClient()

    assert harness.track("--batch", "4", client=client) == code
    assert harness.server.annotations(6) == before
    assert max(client.seen) <= 4
    assert "track_task: " in capsys.readouterr().err


def test_a_wrong_password(harness: TaskHarness, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3; the password is not printed."""
    code = track_task.main(
        ["--server", harness.server.url, "--auth", f"{USER}:wr0ng", "--job", "6"]
    )
    err = capsys.readouterr().err

    assert code == 3
    assert "wrong user or password" in err
    assert "wr0ng" not in err
    assert err.count("\n") == 1


def test_no_server(harness: TaskHarness, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 6."""
    del harness
    url = f"http://127.0.0.1:{free_port()}"
    code = track_task.main(["--server", url, "--auth", f"{USER}:{PASSWORD}", "--job", "6"])
    err = capsys.readouterr().err

    assert code == 6
    assert "does not answer" in err
    assert err.count("\n") == 1


def test_a_server_that_takes_no_connection_is_given_up_soon(
    harness: TaskHarness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before logging in, for which CVAT's SDK has no time limit."""
    del harness  # only its environment
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT_S", 0.05)
    with unanswered_url() as url:
        code = track_task.main(["--server", url, "--auth", f"{USER}:{PASSWORD}", "--job", "6"])
    err = capsys.readouterr().err

    assert code == 6
    assert "does not answer (timed out)" in err
    assert err.count("\n") == 1


def test_a_server_that_speaks_http_is_not_a_matter_of_certificates(
    harness: TaskHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its address with https gets exit code 6 and what to write instead."""
    address = harness.server.url.replace("http://", "https://")
    options = ["--auth", f"{USER}:{PASSWORD}", "--job", "6", "--dry-run"]
    code = track_task.main(["--server", address, *options])
    err = capsys.readouterr().err

    assert code == 6
    assert "speaks http, not https: begin its address with http://" in err
    assert err.count("\n") == 1


def test_a_self_signed_certificate(
    monkeypatch: pytest.MonkeyPatch,
    harness: TaskHarness,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is refused with exit code 7, but taken with --insecure or SSL_CERT_FILE."""
    del harness  # only its environment
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    both = tmp_path / "both.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += (
        f" -keyout {key} -out {certificate} -subj /CN=cvat -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    both.write_text(key.read_text() + certificate.read_text())
    with CvatServer(Task(frames_of(3)), both) as server:
        server.add(6, "shapes", **shape("polygon", POLYGON))
        dry = ["--server", server.url, "--auth", f"{USER}:{PASSWORD}", "--job", "6", "--dry-run"]
        refused = track_task.main(dry)
        err = capsys.readouterr().err
        insecure = track_task.main([*dry, "--insecure"])
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        named = track_task.main(dry)

    assert (refused, insecure, named) == (7, 0, 0)
    assert "SSL_CERT_FILE" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--label", "dog"], "expected one of bed, child"),
        (["--objects", "99"], "nothing to track on any frame"),
        (["--objects", "1,99"], "--objects 99: not on frame 0"),
        (["--from-frame", "7"], "nothing to track on frame 7"),
        (["--from-frame", "70"], "--from-frame 70 is not a frame to track on"),
        (["--to-frame", "70"], "--to-frame 70 is not a frame to track on"),
        (["--to-frame", "0"], "does not come after frame 0"),
        (["--from-frame", "4", "--to-frame", "2"], "--backwards tracks towards frame 0"),
    ],
)
def test_options_that_do_not_fit_the_task(
    harness: TaskHarness, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    """The exit code is 1, and the line says what could be done."""
    draw(harness.server)

    assert harness.track(*options) == 1
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_an_id_of_two_objects_needs_their_kind(
    harness: TaskHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shapes and tracks are numbered separately in CVAT."""
    number = harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    box = keyframe("rectangle", 0, [0, 0, 9, 9])
    assert harness.server.add(6, "tracks", frame=0, label_id=6, shapes=[box]) == number

    assert harness.track("--objects", str(number)) == 1
    assert f"write shape:{number} or track:{number}" in capsys.readouterr().err
    assert harness.track("--objects", f"track:{number}") == 0
    assert len(harness.server.shapes(6)) == 1


def test_a_folder_that_cannot_be_made_stops_the_run_before_it_writes(
    harness: TaskHarness, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message is a single line."""
    draw(harness.server)
    before = harness.server.annotations(6)
    (tmp_path / "file").touch()

    assert harness.track("--out", str(tmp_path / "file" / "out")) == 1
    assert "name another folder" in capsys.readouterr().err
    assert harness.server.annotations(6) == before


def test_a_journal_that_cannot_be_written_stops_the_run_before_it_writes(
    harness: TaskHarness,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The line says how to name another folder."""
    draw(harness.server)
    before = harness.server.annotations(6)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))

    assert harness.track() == 1
    assert "XDG_STATE_HOME" in capsys.readouterr().err
    assert harness.server.annotations(6) == before


# ---------------------------------------------------------------------- logging in, pages


def test_a_token_and_an_organisation(harness: TaskHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are given as to cvat-cli."""
    draw(harness.server)
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", TOKEN)
    code = track_task.main(
        ["--server", harness.server.url, "--org", "us", "--job", "6", "--dry-run"]
    )

    assert code == 0
    assert {call.headers.get("x-organization") for call in harness.server.calls} == {"us"}
    assert not [call for call in harness.server.calls if call.path == "/api/auth/login"]


def test_a_password_from_the_environment(
    harness: TaskHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In PASS, so that no list of processes shows it."""
    draw(harness.server)
    monkeypatch.setenv("PASS", PASSWORD)

    assert (
        track_task.main(["--server", harness.server.url, "--auth", USER, "--job", "6", "--dry-run"])
        == 0
    )


def test_lists_are_read_to_their_last_page(harness_for: Callable[[Task], TaskHarness]) -> None:
    """CVAT answers ten labels or jobs at a time."""
    labels = [
        {"id": 10 + i, "name": f"label {i}", "attributes": [], "type": "any"} for i in range(12)
    ]
    task = Task(
        frames_of(24), segment_size=2, overlap=0, job_ids=range(6, 18), labels=LABELS + labels
    )
    harness = harness_for(task)
    harness.server.add(6, "shapes", **shape("polygon", POLYGON, label_id=21, attributes=[]))
    code = harness.track("--task", "6", "--label", "label 11")

    assert code == 0
    assert [len(harness.server.tracks(job)) for job in range(6, 18)] == [1] * 12
