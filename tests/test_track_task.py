"""Track a CVAT task and write the results back, with a server that stores them as CVAT does."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from cvat_task import loop
from testbed.cvat_server import MUTABLE, Call, Task
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


# ---------------------------------------------------------------------- what is written


def test_a_polygon_becomes_a_track_and_a_mask_one_shape_per_frame(harness: TaskHarness) -> None:
    """A track replaces the polygon; the mask is grouped with the masks of the other frames."""
    harness.server.add(6, "shapes", **shape("polygon", POLYGON, z_order=3, occluded=True, group=4))
    harness.server.add(6, "shapes", **shape("mask", MASK))
    code = harness.track("--batch", "5")
    (track,) = harness.server.tracks(6)
    masks = harness.server.shapes(6)

    assert code == 0
    assert visible(track) == dict.fromkeys(range(12), True)
    for key in track["shapes"]:
        assert key["points"] == moved_by("polygon", POLYGON, key["frame"])
        assert (key["z_order"], key["occluded"]) == (3, True)
    assert (track["source"], track["group"], track["label_id"]) == ("semi-auto", 4, 6)
    assert track["attributes"] == [{"spec_id": 1, "value": "big"}]
    assert [obj["frame"] for obj in masks] == list(range(12))
    assert {obj["group"] for obj in masks} == {5}
    assert [obj["source"] for obj in masks] == ["manual"] + ["semi-auto"] * 11
    for obj in masks:
        assert obj["points"] == moved_by("mask", MASK, obj["frame"])
        assert obj["attributes"] == [{"spec_id": 1, "value": "big"}]


def test_lost_objects_are_outside_until_they_are_found(harness: TaskHarness) -> None:
    """There are keyframes on both sides of a change; no mask is written where it is lost."""
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    harness.server.add(6, "shapes", **shape("mask", MASK))
    client = MovingTrackingClient(lost=lambda _, frame: 4 <= frame <= 6)
    harness.track("--keyframe-every", "100", "--batch", "3", client=client)
    (track,) = harness.server.tracks(6)

    assert visible(track) == {0: True, 3: True, 4: False, 6: False, 7: True, 11: True}
    assert [obj["frame"] for obj in harness.server.shapes(6)] == [0, 1, 2, 3, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("batch", ["1", "4", "5", "50"])
def test_keyframes_do_not_depend_on_the_batch(harness: TaskHarness, batch: str) -> None:
    """Several batches write the same keyframes as a single one."""
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    client = MovingTrackingClient(lost=lambda _, frame: frame == 8)
    harness.track("--keyframe-every", "4", "--batch", batch, "--to-frame", "10", client=client)
    (track,) = harness.server.tracks(6)

    frames = {0: True, 4: True, 7: True, 8: False, 9: True, 10: True, 11: False}
    assert visible(track) == frames


def test_a_track_starts_between_its_keyframes_and_keeps_those_beyond(
    harness_for: Callable[[Task], TaskHarness],
) -> None:
    """It starts at the interpolated position; attributes stay where they change."""
    task = Task(frames_of(12))
    task.labels[0]["attributes"].append(MUTABLE)
    harness = harness_for(task)
    jumping = [{"spec_id": 2, "value": "jumping"}]
    harness.server.add(
        6,
        "tracks",
        frame=0,
        label_id=6,
        group=0,
        attributes=[{"spec_id": 1, "value": "big"}],
        shapes=[
            keyframe("rectangle", 0, [0, 0, 20, 20]),
            keyframe("rectangle", 4, [8, 4, 28, 24], attributes=jumping, z_order=2),
            keyframe("rectangle", 10, [8, 4, 28, 24], z_order=2),
        ],
    )
    client = MovingTrackingClient()
    harness.track("--from-frame", "2", "--to-frame", "6", "--keyframe-every", "100", client=client)
    (track,) = harness.server.tracks(6)

    assert client.starts == [(2, [4.0, 2.0, 24.0, 22.0])]
    assert [key["frame"] for key in track["shapes"]] == [0, 2, 4, 6, 10]
    assert track["shapes"][2]["points"] == [6.0, 2.0, 26.0, 22.0]
    poses = [key["attributes"] for key in track["shapes"]]
    assert poses == [[{"spec_id": 2, "value": "standing"}]] * 2 + [jumping] * 3
    assert [key["z_order"] for key in track["shapes"]] == [0, 0, 2, 2, 2]


def test_only_what_was_asked_for_is_followed(harness: TaskHarness) -> None:
    """By label or by id; everything else stays as it is."""
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    chosen = harness.server.add(6, "shapes", **shape("polygon", POLYGON, label_id=7, attributes=[]))
    harness.server.add(6, "shapes", **shape("points", [1, 1]))
    harness.track("--label", "bed", "--to-frame", "3")
    (first,) = harness.server.tracks(6)
    left = harness.server.shapes(6)
    harness.track("--objects", f"shape:{left[0]['id']}", "--to-frame", "4")

    assert first["label_id"] == 7
    assert len(left) == 2
    assert chosen not in {obj["id"] for obj in left}
    assert [track["label_id"] for track in harness.server.tracks(6)] == [7, 6]


def test_backwards_goes_to_the_first_frame(harness: TaskHarness) -> None:
    """From the last frame that has objects; the track ends after it."""
    harness.server.add(6, "shapes", **shape("polygon", POLYGON, frame=7))
    client = MovingTrackingClient()
    harness.track("--backwards", "--batch", "3", client=client)
    (track,) = harness.server.tracks(6)

    assert client.seen == list(range(7, -1, -1))
    assert visible(track) == dict.fromkeys(range(8), True) | {8: False}
    assert track["shapes"][0]["points"] == moved_by("polygon", POLYGON, -7)


def test_tracking_again_replaces_what_tracking_made(harness: TaskHarness) -> None:
    """Semi-auto masks of the group are replaced; a mask that somebody drew stays."""
    harness.server.add(6, "shapes", **shape("mask", MASK))
    harness.server.add(6, "shapes", **shape("mask", moved_by("mask", MASK, 20), group=9))
    harness.track()
    drawn = harness.server.shapes(6, frame=5, group=10)[0]
    harness.server.remove(6, "shapes", drawn["id"])
    harness.server.add(6, "shapes", **shape("mask", MASK, frame=5, group=10))
    other = harness.server.shapes(6, group=9)
    harness.track(
        "--from-frame", "2", "--objects", str(harness.server.shapes(6, frame=2, group=10)[0]["id"])
    )
    masks = harness.server.shapes(6, group=10)

    assert [obj["frame"] for obj in masks] == list(range(12))
    assert masks[5]["source"] == "manual"
    assert masks[5]["points"] == MASK
    assert harness.server.shapes(6, group=9) == other


def test_earlier_masks_are_deleted_where_the_object_is_not_found_now(harness: TaskHarness) -> None:
    """Also when a whole batch finds nothing to replace them."""
    harness.server.add(6, "shapes", **shape("mask", MASK))
    harness.track()
    client = MovingTrackingClient(lost=lambda _, frame: 3 <= frame <= 9)
    harness.track("--batch", "4", client=client)

    assert [obj["frame"] for obj in harness.server.shapes(6)] == [0, 1, 2, 10, 11]


def test_a_new_group_has_an_unused_number(harness: TaskHarness) -> None:
    """Neither shapes, tracks nor tags have it."""
    harness.server.add(6, "shapes", **shape("mask", MASK))
    tag = {"id": 1, "frame": 3, "label_id": 7, "group": 5, "source": "manual", "attributes": []}
    harness.server.data[6]["tags"].append(tag)
    harness.track()

    assert {obj["group"] for obj in harness.server.shapes(6)} == {6}


def test_a_dry_run_changes_nothing(
    harness: TaskHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints what would be written, and asks for no frame."""
    number = harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    before = harness.server.annotations(6)
    code = harness.track("--dry-run")

    assert code == 0
    assert harness.server.annotations(6) == before
    assert not [call for call in harness.server.calls if call.path.endswith("/data")]
    assert not [call for call in harness.server.calls if call.method == "PATCH"]
    out = capsys.readouterr().out
    assert "job 6: 11 frames to track, 1 to 11" in out
    assert f"shape:{number} child: polygon -> track" in out


def test_a_summary_and_a_contact_sheet(
    harness: TaskHarness, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The command prints frames, speed and how often each object was lost."""
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    client = MovingTrackingClient(lost=lambda _, frame: frame in {3, 4})
    harness.track("--out", str(tmp_path / "out"), client=client)
    printed = capsys.readouterr()

    assert "11 frames tracked" in printed.out
    assert "lost on 2 of 11 frames" in printed.out
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width == 4 * 480


def test_the_progress_bar_shows_frame_objects_lost_and_speed(
    harness: TaskHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run takes long."""
    screen = io.StringIO()

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *, disable: bool | None, **options: Any) -> None:
            del disable  # it is on only in a terminal
            super().__init__(file=screen, mininterval=0, ncols=200, **options)

    monkeypatch.setattr(loop, "tqdm", Bar)
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    harness.track(client=MovingTrackingClient(lost=lambda _, frame: frame == 11))
    last = screen.getvalue().rstrip().rpartition("\r")[2]

    assert last.startswith("frame 11: 100%")
    assert "11/11" in last
    assert "frame/s" in last or "s/frame" in last
    assert "lost=1, objects=1" in last


# ---------------------------------------------------------------------- frames


@pytest.mark.parametrize("video", [True, False])
@pytest.mark.parametrize("options", [[], ["--backwards", "--from-frame", "11"]])
def test_every_kind_of_task_gives_the_right_frames(
    harness_for: Callable[[Task], TaskHarness], *, video: bool, options: list[str]
) -> None:
    """Of videos and images, with a first frame, a frame step and deleted frames."""
    task = Task(frames_of(12), video=video, start=7, step=3, deleted=[2, 5, 6, 8], chunk_size=5)
    harness = harness_for(task)
    for frame in (0, 11):
        harness.server.add(6, "shapes", **shape("polygon", POLYGON, frame=frame))
    client = MovingTrackingClient()
    code = harness.track(*options, client=client)
    numbers = [0, 1, 3, 4, 7, 9, 10, 11]

    assert code == 0
    assert client.seen == (numbers[::-1] if options else numbers)
    keyframes = [key["frame"] for key in harness.server.tracks(6)[0]["shapes"]]
    assert keyframes == numbers


def test_honeypots_are_skipped_and_such_tasks_get_shapes(
    harness_for: Callable[[Task], TaskHarness], capsys: pytest.CaptureFixture[str]
) -> None:
    """CVAT takes no tracks there, and a frame of another scene would mislead the tracker."""
    harness = harness_for(Task(frames_of(12), video=False, honeypots=[3, 9]))
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    client = MovingTrackingClient()
    code = harness.track("--batch", "4", client=client)
    shapes = harness.server.shapes(6)

    assert code == 0
    assert client.seen == [frame for frame in range(12) if frame not in {3, 9}]
    assert [obj["frame"] for obj in shapes] == client.seen
    assert len({obj["group"] for obj in shapes}) == 1
    assert "skipped: 2 honeypot frames (3, 9)" in capsys.readouterr().out


def test_the_next_chunk_is_fetched_while_the_model_works(harness: TaskHarness) -> None:
    """The model waits on the first frame of a chunk until the next chunk was asked for."""
    asked = {index: threading.Event() for index in range(3)}
    seen = []

    def note(call: Call) -> None:
        if call.path.endswith("/data"):
            asked[int(call.query["index"])].set()

    def wait(frame: int) -> None:
        if frame in {0, 4}:
            seen.append(asked[frame // 4 + 1].wait(60))

    harness.server.before = note
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    harness.track(client=MovingTrackingClient(on_frame=wait))

    assert seen == [True, True]


@pytest.mark.parametrize("video", [True, False])
def test_a_ground_truth_job_gives_only_its_own_frames(
    harness_for: Callable[[Task], TaskHarness], *, video: bool
) -> None:
    """Its chunks hold no other frames; a frame between them may have another size."""
    frames = frames_of(12)
    if not video:
        frames[0] = frames[5] = np.zeros((30, 30, 3), np.uint8)
    included = [3, 4, 7, 9, 11]
    task = Task(frames, video=video, start=7, step=3, included=included, chunk_size=2)
    harness = harness_for(task)
    harness.server.add(6, "shapes", **shape("polygon", POLYGON, frame=3))
    client = MovingTrackingClient()

    assert harness.track(client=client) == 0
    assert client.seen == included
    assert [key["frame"] for key in harness.server.tracks(6)[0]["shapes"]] == included


def test_images_of_another_size_are_refused_before_anything_is_written(
    harness_for: Callable[[Task], TaskHarness], capsys: pytest.CaptureFixture[str]
) -> None:
    """An object cannot be followed through them."""
    frames = [*frames_of(5), np.zeros((30, 30, 3), np.uint8)]
    harness = harness_for(Task(frames, video=False))
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))

    assert harness.track() == 1
    assert "frame 5 has another size than frame 0" in capsys.readouterr().err
    assert harness.track("--to-frame", "4") == 0


# ---------------------------------------------------------------------- jobs of a task


def overlapping(overlap: int = 3) -> Task:
    """Return a task of jobs of 10 frames."""
    return Task(frames_of(24), segment_size=10, overlap=overlap)


@pytest.mark.parametrize("overlap", [0, 1, 3])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_task_goes_job_by_job(
    harness_for: Callable[[Task], TaskHarness], *, overlap: int, backwards: bool
) -> None:
    """Every job gets results on all of its frames, the same on frames that two jobs share."""
    task = overlapping(overlap)
    harness = harness_for(task)
    ranges = task.ranges()
    job = list(ranges)[-1 if backwards else 0]
    begin = 23 if backwards else 0
    fields = {"frame": begin, "label_id": 6}
    harness.server.add(job, "shapes", **shape("polygon", POLYGON, **fields))
    harness.server.add(job, "shapes", **shape("mask", MASK, **fields))
    client = MovingTrackingClient()
    code = harness.track("--task", "6", "--batch", "4", *["--backwards"] * backwards, client=client)

    assert code == 0
    assert sorted(client.seen) == list(range(24))
    groups = set()
    for number, frames in ranges.items():
        (track,) = harness.server.tracks(number)
        masks = harness.server.shapes(number)
        assert visible(track) == dict.fromkeys(frames, True)
        assert [obj["frame"] for obj in masks] == list(frames)
        for key in track["shapes"]:
            assert key["points"] == moved_by("polygon", POLYGON, key["frame"] - begin)
        for obj in masks:
            assert obj["points"] == moved_by("mask", MASK, obj["frame"] - begin)
        assert track["attributes"] == [{"spec_id": 1, "value": "big"}]
        groups |= {obj["group"] for obj in masks}
    assert groups == {1}


def test_a_task_run_again_replaces_its_own_results(
    harness_for: Callable[[Task], TaskHarness],
) -> None:
    """No job gets a second track of an object."""
    harness = harness_for(overlapping())
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    harness.server.add(6, "shapes", **shape("mask", MASK))
    harness.track("--task", "6")
    before = [harness.server.annotations(job) for job in harness.server.data]
    harness.track("--task", "6")
    after = [harness.server.annotations(job) for job in harness.server.data]

    for obj, other in zip(before, after, strict=True):
        for kind in ("shapes", "tracks"):
            assert without_ids(obj[kind]) == without_ids(other[kind])


def test_what_somebody_drew_in_the_next_job_is_left_alone(
    harness_for: Callable[[Task], TaskHarness], capsys: pytest.CaptureFixture[str]
) -> None:
    """An object that exists already is not doubled."""
    harness = harness_for(overlapping())
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    theirs = moved_by("polygon", POLYGON, 7)
    harness.server.add(
        7, "tracks", frame=7, label_id=6, shapes=[keyframe("polygon", 7, theirs)], attributes=[]
    )
    before = harness.server.annotations(7)
    harness.track("--task", "6")

    assert harness.server.annotations(7) == before
    assert len(harness.server.tracks(6)) == 1
    assert "somebody has drawn it in job 7: left alone" in capsys.readouterr().err


def test_an_object_lost_on_the_shared_frames_begins_where_it_is_found(
    harness_for: Callable[[Task], TaskHarness],
) -> None:
    """Its track in the next job has no earlier keyframes."""
    harness = harness_for(overlapping())
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    client = MovingTrackingClient(lost=lambda _, frame: 6 <= frame <= 12)
    harness.track("--task", "6", "--to-frame", "16", client=client)
    (track,) = harness.server.tracks(7)

    assert visible(track) == dict.fromkeys(range(13, 17), True)
    assert visible(harness.server.tracks(6)[0])[9] is False


def test_a_job_without_objects_is_skipped(harness_for: Callable[[Task], TaskHarness]) -> None:
    """The run begins in the first job that has any."""
    harness = harness_for(overlapping())
    harness.server.add(7, "shapes", **shape("polygon", POLYGON, frame=12))
    harness.track("--task", "6")

    assert not harness.server.tracks(6)
    assert visible(harness.server.tracks(7)[0]) == dict.fromkeys(range(12, 17), True)
    assert visible(harness.server.tracks(8)[0]) == dict.fromkeys(range(14, 24), True)


def test_a_job_whose_frames_are_all_deleted_is_skipped(
    harness_for: Callable[[Task], TaskHarness],
) -> None:
    """The objects are tracked on in the next job."""
    task = Task(frames_of(12), segment_size=4, overlap=0, deleted=range(4, 8))
    harness = harness_for(task)
    harness.server.add(6, "shapes", **shape("polygon", POLYGON))
    code = harness.track("--task", "6")

    assert code == 0
    assert not harness.server.tracks(7)
    assert visible(harness.server.tracks(8)[0]) == dict.fromkeys(range(8, 12), True)
