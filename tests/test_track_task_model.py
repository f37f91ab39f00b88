"""`track_task.py` with a real model: masks as of a video file, and a process that is killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import defusedxml.ElementTree
import numpy as np
import pytest
from PIL import Image

import track_task
import track_video
from clips.cvat_xml import _read_points
from shapes import encode_cvat_rle
from testbed.cvat_server import PASSWORD, USER, Call, CvatServer, Picture, Refusal, Task
from testbed.drawn_frames import blob_mask, jpeg_frames
from testbed.forked_replica import ForkedReplica
from testbed.functions import micro_environment
from tests.task_harness import TaskHarness, harness_for, shape, without_ids

__all__ = ["harness_for"]  # a fixture

FRAMES = 10
PROMPTS: list[dict[str, Any]] = [
    {"label": "child", "type": "mask", "points": encode_cvat_rle(blob_mask())},
    {"label": "bed", "type": "polygon", "points": [220, 40, 271, 40, 271, 101, 220, 101]},
    {"label": "child", "type": "rectangle", "points": [205, 40, 260, 105]},
    {"label": "child", "type": "ellipse", "points": [75, 90, 105, 60]},
]


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    """Frames of a clip."""
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in jpeg_frames(FRAMES)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a very small model with random weights."""
    return micro_environment(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, weights: dict[str, str]) -> None:
    """Make both command lines use it, also as processes."""
    for name, value in weights.items():
        monkeypatch.setenv(name, value)


def draw(server: CvatServer) -> None:
    """Draw the prompts on frame 0 of the first job."""
    labels = {"child": 6, "bed": 7}
    for prompt in PROMPTS:
        label_id = labels[prompt["label"]]
        drawn = shape(prompt["type"], prompt["points"], label_id=label_id, attributes=[])
        server.add(6, "shapes", **drawn)


def command(server: CvatServer, *options: str) -> list[str]:
    """Return the arguments of a run."""
    return ["--server", server.url, "--auth", f"{USER}:{PASSWORD}", *options]


Keyframes = dict[tuple[str, int], tuple[bool, list[float]]]  # (outside, points) by type and frame


def keyframes_on(server: CvatServer, job: int) -> Keyframes:
    """Return what the server has of a job."""
    keyframes: Keyframes = {}
    for track in server.tracks(job):
        for key in track["shapes"]:
            points = [] if key["outside"] else key["points"]
            keyframes[key["type"], key["frame"]] = key["outside"], points
    for obj in server.shapes(job):
        keyframes[obj["type"], obj["frame"]] = False, obj["points"]
    return keyframes


def keyframes_in(path: Path) -> Keyframes:
    """Return what `track_video.py` wrote."""
    keyframes: Keyframes = {}
    types = {"box": "rectangle"}
    for element in defusedxml.ElementTree.fromstring(path.read_text()).iter():
        if "frame" not in element.attrib or element.tag == "track":
            continue
        outside = element.attrib["outside"] == "1"
        points = [] if outside else [float(value) for value in _read_points(element)]
        keyframes[types.get(element.tag, element.tag), int(element.attrib["frame"])] = (
            outside,
            points,
        )
    return keyframes


@pytest.mark.parametrize(("video", "overlap"), [(True, 3), (False, 3), (True, 0)])
def test_masks_are_those_of_a_video_file(
    pictures: list[Picture],
    harness_for: Callable[[Task], TaskHarness],
    tmp_path: Path,
    *,
    video: bool,
    overlap: int,
) -> None:
    """For every type of shape, through two jobs and several chunks."""
    task = Task(pictures, video=video, segment_size=6, overlap=overlap)
    server = harness_for(task).server
    draw(server)
    code = track_task.main(command(server, "--task", "6", "--batch", "3"))

    clip = tmp_path / "clip"
    clip.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(clip / f"{number:03d}.png")
    (tmp_path / "shapes.json").write_text(json.dumps(PROMPTS))
    out = tmp_path / "out"
    track_video.main([str(clip), "--shapes", str(tmp_path / "shapes.json"), "--out", str(out)])
    expected = keyframes_in(out / "annotations.xml")

    assert code == 0
    found = [points for outside, points in expected.values() if not outside]
    assert len(found) > 2 * FRAMES  # the test model loses some
    for job, frames in task.ranges().items():
        in_job = {key: value for key, value in expected.items() if key[1] in frames}
        answered = keyframes_on(server, job)
        for key, (outside, points) in in_job.items():
            # A track has no keyframes before the object is seen in the job.
            answer = answered.pop(key, (True, []))
            assert answer[0] == outside, key
            # The file has two decimal places.
            np.testing.assert_allclose(answer[1], points, rtol=0, atol=0.011)
        # The remaining keyframes end a track after the last frame.
        assert all(outside for outside, _ in answered.values())


def test_a_running_function_gives_the_same(
    pictures: list[Picture], harness_for: Callable[[Task], TaskHarness]
) -> None:
    """With `--url` the same annotations are written as with a model in this process."""
    replica = ForkedReplica(dict(os.environ))
    try:
        replica.wait()
        written = []
        for options in ([], ["--url", str(replica.client.base_url)]):
            server = harness_for(Task(pictures)).server
            draw(server)
            assert track_task.main(command(server, "--job", "6", *options)) == 0
            written.append(without_ids(server.annotations(6)))
    finally:
        replica.kill()

    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("moment", "action", "begin"),
    [("before", "create", 3), ("after", "create", 6), ("before", "delete", 6)],
)
def test_a_killed_process_loses_one_batch_at_most(
    pictures: list[Picture],
    harness_for: Callable[[Task], TaskHarness],
    moment: str,
    action: str,
    begin: int,
) -> None:
    """Before its second batch arrives, or before it knows that it did. Nothing is doubled."""
    server = harness_for(Task(pictures)).server
    draw(server)
    root = Path(track_task.__file__).parent
    start = [sys.executable, "track_task.py", *command(server, "--job", "6", "--batch", "3")]
    process = subprocess.Popen(start, cwd=root, stdout=subprocess.DEVNULL)
    count = 0

    def kill(call: Call) -> None:
        nonlocal count
        count += call.is_(action)
        if count == 2 and call.is_(action):
            process.kill()
            if moment == "before":
                raise Refusal(500, "it has not arrived")

    setattr(server, moment, kill)
    killed = process.wait(250)
    setattr(server, moment, lambda _: None)
    again = subprocess.run(start, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    masks = [obj["frame"] for obj in server.shapes(6)]
    tracks = server.tracks(6)

    assert killed == -signal.SIGKILL
    assert f"going on after frame {begin}" in again.stdout
    assert masks == sorted(set(masks))
    assert {obj["type"] for obj in server.shapes(6)} == {"mask"}
    assert sorted(track["shapes"][0]["type"] for track in tracks) == [
        "ellipse",
        "polygon",
        "rectangle",
    ]
    for track in tracks:
        assert [key["frame"] for key in track["shapes"]] == list(range(FRAMES))
