"""`track_video.py`: a clip and initial shapes in, CVAT XML, COCO tracks and pictures out."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import defusedxml.ElementTree
import numpy as np
import pytest
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

import track_video
from clips.cvat_xml import CvatXmlWriter, read_cvat_xml
from clips.initial_shape import InitialShape
from clips.reader import open_clip
from clips.shape_files import read_initial_shapes
from clips.track_clip import track_clip
from clips.tracking_client import RemoteTrackingClient
from errors import BadRequestError
from object_requests import Continue, Start
from shapes import Shape, ShapeType, encode_cvat_rle
from state_token import StateToken, new_id
from testbed.drawn_frames import blob_mask, jpeg_frames
from testbed.functions import Replica
from tests.function_stub import FunctionStub, Json, started_at
from tests.reference import write_frames
from tests.stalls import Hold
from tests.test_replicas import start_replicas
from tracker import TrackedObject

__all__ = ["start_replicas"]  # a fixture

FRAMES = 8
SHAPES = [
    {"label": "blob", "type": "mask", "points": encode_cvat_rle(blob_mask()), "frame": 0},
    {"label": "block", "type": "polygon", "points": [220, 40, 271, 40, 271, 101, 220, 101]},
    {"label": "box & co", "type": "rectangle", "points": [205, 40, 260, 105], "frame": 3},
    {"label": "round", "type": "ellipse", "points": [75, 90, 105, 60], "frame": 3},
]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A folder of JPEGs."""
    return write_frames(tmp_path / "clip", jpeg_frames(FRAMES))


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Initial shapes of every type, on two frames."""
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps(SHAPES))
    return path


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, model_environment: dict[str, str]) -> None:
    """Make the command line use the test model."""
    for name, value in model_environment.items():
        monkeypatch.setenv(name, value)


class ScriptedClient:
    """Answers a square that moves to the right.

    Args:
        lost_at: Frames where it is lost.
        on_frame: Called with each frame's number before it is tracked.
    """

    def __init__(
        self,
        lost_at: Sequence[int] = (),
        on_frame: Callable[[int], None] = lambda _number: None,
    ) -> None:
        self._lost_at = lost_at
        self._on_frame = on_frame
        self._number = -1

    def close(self) -> None:
        """Do nothing."""

    def track(self, _frame: Image.Image, items: Sequence[Start | Continue]) -> list[TrackedObject]:
        """See `TrackingClient.track`."""
        self._number += 1
        self._on_frame(self._number)
        lost = self._number in self._lost_at
        x = float(self._number % 20)
        square = Shape(ShapeType.POLYGON, [x, 5.0, x + 9, 5.0, x + 9, 14.0, x, 14.0])
        token = StateToken(new_id(), new_id())
        return [TrackedObject(token, None if lost else square, lost) for _ in items]


class LongClip:
    """A clip of any number of small frames."""

    fps = 25.0

    def __init__(self, frame_count: int) -> None:
        self.frame_count = frame_count

    def frames(self, first: int, last: int) -> Iterator[tuple[int, Image.Image]]:
        """See `Clip.frames`."""
        for number in range(first, last + 1):
            yield number, Image.new("RGB", (64, 48), (number % 256, 0, 0))


def tracks_in(path: Path) -> list[Any]:
    """Return the track elements of a CVAT XML."""
    return list(defusedxml.ElementTree.fromstring(path.read_text()).iter("track"))


SQUARE = InitialShape("square", Shape(ShapeType.POLYGON, [0, 5, 9, 5, 9, 14, 0, 14]), 0)


@pytest.mark.usefixtures("environment")
def test_a_clip_becomes_annotations_tracks_and_pictures(
    clip: Path, shapes: Path, tmp_path: Path
) -> None:
    """Every object is tracked from its own frame on, and every file can be read back."""
    out = tmp_path / "out"
    code = track_video.main([str(clip), "--shapes", str(shapes), "--out", str(out)])
    tracks = tracks_in(out / "annotations.xml")
    labels = [track.get("label") for track in tracks]
    found = json.loads((out / "tracks.json").read_text())
    overlay = cv2.VideoCapture(str(out / "overlay.mp4"))

    assert code == 0
    assert labels.count("blob") == FRAMES  # CVAT has no mask tracks: one element a frame
    assert {track.get("group_id") for track in tracks if track.get("label") == "blob"} == {"1"}
    for label, tag, count in (
        ("block", "polygon", 8),
        ("box & co", "box", 5),
        ("round", "ellipse", 5),
    ):
        (track,) = (track for track in tracks if track.get("label") == label)
        assert [shape.tag for shape in track] == [tag] * count
    assert len(found["annotations"]) <= 2 * FRAMES + 2 * 5
    first = found["annotations"][0]
    np.testing.assert_array_equal(coco_mask.decode(first["segmentation"]), blob_mask())
    assert first["bbox"] == [30.0, 60.0, 61.0, 61.0]
    assert overlay.get(cv2.CAP_PROP_FRAME_COUNT) == FRAMES
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width == 4 * 480


@pytest.mark.usefixtures("environment")
def test_a_running_function_finds_the_same_masks(
    clip: Path,
    shapes: Path,
    tmp_path: Path,
    start_replicas: Callable[[int], list[Replica]],
) -> None:
    """`--url` gives the same annotations as tracking in this process."""
    (replica,) = start_replicas(1)
    command = [str(clip), "--shapes", str(shapes), "--out"]
    track_video.main([*command, str(tmp_path / "here")])
    track_video.main([*command, str(tmp_path / "there"), "--url", str(replica.client.base_url)])

    here, there = (tmp_path / name / "annotations.xml" for name in ("here", "there"))
    assert here.read_text() == there.read_text()


def test_a_track_that_ends_early_is_closed_and_a_lost_object_is_outside(tmp_path: Path) -> None:
    """CVAT would otherwise show the last shape until the end of the clip."""
    outcome = track_clip(
        LongClip(20), [SQUARE], ScriptedClient(lost_at=[3, 4]), tmp_path, last_frame=6
    )
    (track,) = tracks_in(tmp_path / "annotations.xml")
    outside = [(int(shape.attrib["frame"]), shape.attrib["outside"]) for shape in track]

    assert outside == [(frame, "1" if frame in {3, 4, 7} else "0") for frame in range(8)]
    assert outcome.lost == (2,)
    assert read_cvat_xml(tmp_path / "annotations.xml") == [SQUARE_AS_FOUND]


SQUARE_AS_FOUND = InitialShape(
    "square", Shape(ShapeType.POLYGON, [0.0, 5.0, 9.0, 5.0, 9.0, 14.0, 0.0, 14.0]), 0
)


def test_what_was_tracked_before_an_interruption_is_written(tmp_path: Path) -> None:
    """Ctrl-C on frame 5 leaves complete files of frames 0 to 4."""

    def interrupt(number: int) -> None:
        if number == 5:
            raise KeyboardInterrupt

    outcome = track_clip(LongClip(20), [SQUARE], ScriptedClient(on_frame=interrupt), tmp_path)
    found = json.loads((tmp_path / "tracks.json").read_text())["annotations"]

    assert outcome.interrupted
    assert outcome.frames == 5
    assert [annotation["image_id"] for annotation in found] == list(range(5))
    assert len(tracks_in(tmp_path / "annotations.xml")) == 1


@pytest.mark.parametrize("is_busy", [False, True])
def test_interrupting_does_not_wait_for_a_running_function(
    tmp_path: Path, *, is_busy: bool
) -> None:
    """Neither for its answer nor for the pause before a repeat; what was tracked is written."""
    hold = Hold()
    function = FunctionStub()

    def interrupt_at_third(body: Json) -> tuple[int, Any]:
        if len(function.bodies) < 3:
            return 200, started_at(body)
        if not is_busy:
            hold.interrupt_and_wait()
        return 503, {"error": "busy"}

    function.answer = interrupt_at_third
    with (
        function,
        closing(
            RemoteTrackingClient(function.url, pause=lambda _: hold.interrupt_and_wait())
        ) as client,
    ):
        summary = track_clip(LongClip(20), [SQUARE], client, tmp_path)
        was_held = hold.end()
    found = json.loads((tmp_path / "tracks.json").read_text())["annotations"]

    assert was_held
    assert summary.interrupted
    assert summary.frames == 2
    assert [annotation["image_id"] for annotation in found] == [0]  # the stub loses it then


def test_interrupting_before_the_first_frame_takes_one_line(
    clip: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Loading a model may take long enough for somebody to change their mind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(track_video, "open_tracking_client", interrupt)
    code = track_video.main([str(clip), "--shapes", str(shapes), "--out", str(tmp_path / "out")])

    assert code == 130
    assert capsys.readouterr().err == "track_video: interrupted\n"


def test_memory_does_not_grow_with_the_clip(tmp_path: Path) -> None:
    """Ten times the frames need no more memory."""

    def peak_bytes(frames: int) -> int:
        tracemalloc.start()
        track_clip(LongClip(frames), [SQUARE], ScriptedClient(), tmp_path / str(frames))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    peak_bytes(10)  # first calls fill caches

    assert peak_bytes(600) < peak_bytes(60) + 400_000


@pytest.mark.parametrize("backwards", [False, True])
def test_a_video_file_is_read_in_both_directions(tmp_path: Path, *, backwards: bool) -> None:
    """Every frame once, with its own number."""
    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 20, (64, 48))
    for number in range(12):
        writer.write(np.full((48, 64, 3), 20 * number, dtype=np.uint8))
    writer.release()
    clip = open_clip(path)
    first, last = (9, 2) if backwards else (2, 9)
    read = [
        (number, round(np.asarray(frame).mean() / 20)) for number, frame in clip.frames(first, last)
    ]
    expected = list(range(2, 10))[:: -1 if backwards else 1]

    assert (clip.frame_count, clip.fps) == (12, 20.0)
    assert read == [(number, number) for number in expected]


def test_backwards_tracks_are_written_in_the_order_of_the_clip(clip: Path, tmp_path: Path) -> None:
    """A track from frame 5 down to 2 is written from 2 up, and ends after 5."""
    initial = InitialShape("square", SQUARE.shape, 5)
    track_clip(open_clip(clip), [initial], ScriptedClient(), tmp_path, last_frame=2, backwards=True)
    (track,) = tracks_in(tmp_path / "annotations.xml")

    assert [shape.attrib["frame"] for shape in track] == ["2", "3", "4", "5", "6"]
    assert [shape.attrib["outside"] for shape in track] == ["0", "0", "0", "0", "1"]


def test_frames_of_a_folder_come_in_natural_order(tmp_path: Path) -> None:
    """frame10 follows frame9."""
    for number in (10, 9, 2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    frames = open_clip(tmp_path).frames(0, 2)

    assert [frame.getpixel((0, 0)) for _, frame in frames] == [(2, 0, 0), (9, 0, 0), (10, 0, 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a list"),
        ('{"label": "a"}', "must hold a list"),
        ('[{"type": "mask", "points": []}]', "entry 0: KeyError\\('label'\\)"),
        ('[{"label": "a", "type": "line", "points": []}]', "entry 0: .*line.*mask, polygon"),
        ("[1]", "entry 0"),
    ],
)
def test_malformed_initial_shapes_are_refused_with_their_index(
    tmp_path: Path, text: str, message: str
) -> None:
    """The message names the file, the entry and what is expected."""
    path = tmp_path / "shapes.json"
    path.write_text(text)

    with pytest.raises(BadRequestError, match=message):
        read_initial_shapes(path)


@pytest.mark.parametrize(
    "text",
    ["", "<annotations/>", "<annotations><track label='a'><box frame='0'/></track></annotations>"],
)
def test_malformed_xml_is_refused(tmp_path: Path, text: str) -> None:
    """So is XML that is something else."""
    path = tmp_path / "shapes.xml"
    path.write_text(text)

    with pytest.raises(BadRequestError, match=r"shapes\.xml"):
        read_initial_shapes(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"last_frame": 99}, "last frame 99 does not lie between 0 and 19"),
        (
            {"initial_shapes": [InitialShape("late", SQUARE.shape, 20)]},
            "late starts on frame 20: .* has 20",
        ),
        (
            {"initial_shapes": [SQUARE, InitialShape("late", SQUARE.shape, 15)], "last_frame": 5},
            "late starts on frame 15, behind the last frame 5",
        ),
    ],
)
def test_frames_outside_the_clip_are_refused(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    """Before anything is tracked or written."""
    initial_shapes = arguments.pop("initial_shapes", [SQUARE])

    with pytest.raises(BadRequestError, match=message):
        track_clip(LongClip(20), initial_shapes, ScriptedClient(), tmp_path / "out", **arguments)

    assert not (tmp_path / "out").exists()


def test_the_command_line_says_what_is_wrong_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And exits with 1."""
    code = track_video.main(
        [str(tmp_path / "none.mp4"), "--shapes", "none.json", "--out", str(tmp_path)]
    )

    assert code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_written_masks_are_read_back_as_one_initial_shape_each(tmp_path: Path) -> None:
    """Though CVAT's format holds a mask track as one element per frame."""
    writer = CvatXmlWriter(tmp_path / "a.xml", ["first", "second"], 5)
    mask = Shape(ShapeType.MASK, encode_cvat_rle(blob_mask()))
    for track in (0, 1):
        for frame in (1, 2, 3):
            writer.add(track, frame, mask)
    writer.close()
    read = read_cvat_xml(tmp_path / "a.xml")

    assert [(initial.label, initial.frame) for initial in read] == [("first", 1), ("second", 1)]
    assert list(read[0].shape.points) == list(mask.points)


def test_images_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    """As CVAT shows them, and as the function decodes them."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    ((_, frame),) = open_clip(tmp_path).frames(0, 0)

    assert frame.size == (20, 40)
