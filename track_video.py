"""Track objects through a video file or a folder of images, without CVAT.

Owns the command line and the loop over frames; reading, tracking and writing have rooms of their
own. It streams: memory does not grow with the length of the clip.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from clips.coco_tracks import CocoTracksWriter
from clips.cvat_xml import CvatXmlWriter, InitialShape, read_cvat_xml
from clips.overlays import ContactSheet, OverlayWriter, draw_masks
from clips.reader import Clip, open_clip
from clips.tracking_client import TrackingClient, open_tracking_client
from errors import BadRequestError, SettingsError, TrackerError
from object_requests import Continue, Start
from shapes import Shape, ShapeType, SizeHW, shape_to_mask
from state_token import StateToken
from tracker import TrackedObject

SHEET_FRAMES = 12
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class ClipSummary:
    """What a run did.

    Attributes:
        frames: Frames tracked.
        lost: For each track on how many of them the object was not found.
        interrupted: Whether Ctrl-C ended it early.
    """

    frames: int
    lost: tuple[int, ...]
    interrupted: bool


def track_clip(
    clip: Clip,
    prompts: Sequence[InitialShape],
    client: TrackingClient,
    out: Path,
    *,
    last_frame: int | None = None,
    backwards: bool = False,
) -> ClipSummary:
    """Track prompts through a clip and write what was found to a folder.

    Args:
        clip: The frames.
        prompts: What to follow, each from its own frame on.
        client: What tracks.
        out: Folder for `annotations.xml`, `tracks.json`, `overlay.mp4` and `contact_sheet.png`.
        last_frame: Where to stop; None means the end of the clip, or its beginning if backwards.
        backwards: Follow the objects towards frame 0.

    Raises:
        BadRequestError: A prompt or the last frame lies outside the clip or on the wrong side.
        TrackerError: As the client does; what was tracked before is written.
    """
    first, last = _range(clip, prompts, last_frame, backwards=backwards)
    labels = [prompt.label for prompt in prompts]
    tokens: dict[int, StateToken] = {}
    lost = [0] * len(prompts)
    done = 0
    interrupted = False
    out.mkdir(parents=True, exist_ok=True)
    writer: _Writer | None = None
    total = abs(last - first) + 1
    frames = clip.frames(first, last)
    try:
        with tqdm(frames, total=total, unit="frame", disable=None) as bar:
            for number, frame in bar:
                if writer is None:
                    writer = _Writer(out, clip, labels, (frame.height, frame.width), first, last)
                starts = {
                    track: Start(prompt.shape)
                    for track, prompt in enumerate(prompts)
                    if prompt.frame == number
                }
                items = {track: Continue(token) for track, token in tokens.items()} | starts
                found = dict(zip(items, client.track(frame, list(items.values())), strict=True))
                tokens = {track: one.token for track, one in found.items()}
                for track, one in found.items():
                    lost[track] += one.lost
                writer.add(number, frame, found)
                done += 1
                bar.set_postfix(objects=len(found), lost=sum(one.lost for one in found.values()))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if writer is not None:
            writer.close()
    return ClipSummary(done, tuple(lost), interrupted)


def read_prompts(path: Path) -> list[InitialShape]:
    """Read prompts from a *CVAT for video 1.1* XML, or a JSON list of label, type, points, frame.

    Raises:
        BadRequestError: The file is neither; the message says where it goes wrong.
    """
    try:
        if path.suffix.lower() == ".xml":
            return read_cvat_xml(path)
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise BadRequestError(f"{path} cannot be read: {err.strerror}") from err
    except ValueError as err:
        raise BadRequestError(f"{path} is not JSON: {err}") from err
    if not isinstance(entries, list) or not entries:
        raise BadRequestError(f"{path} must hold a list of label, type, points and frame")
    prompts = []
    for index, entry in enumerate(entries):
        try:
            shape = Shape(ShapeType(entry["type"]), entry["points"])
            prompts.append(InitialShape(str(entry["label"]), shape, int(entry.get("frame", 0))))
        except (KeyError, TypeError, ValueError) as err:
            raise BadRequestError(
                f"{path}, entry {index}: {err!r}; expected label, type "
                f"({', '.join(ShapeType)}), points and frame"
            ) from err
    return prompts


class _Writer:
    """All files of one run."""

    def __init__(
        self, out: Path, clip: Clip, labels: Sequence[str], size_hw: SizeHW, first: int, last: int
    ) -> None:
        self._labels = labels
        self._size_hw = size_hw
        self._xml = CvatXmlWriter(out / "annotations.xml", labels, clip.frame_count)
        self._coco = CocoTracksWriter(out / "tracks.json", labels, size_hw)
        self._overlay = OverlayWriter(out / "overlay.mp4", size_hw, clip.fps)
        shown = np.linspace(first, last, SHEET_FRAMES).round().astype(int).tolist()
        self._sheet = ContactSheet(out / "contact_sheet.png", shown)
        self._shapes: dict[int, Shape] = {}

    def add(self, number: int, frame: Image.Image, found: dict[int, TrackedObject]) -> None:
        masks = {}
        for track, one in found.items():
            # A lost object stands where it was last seen, marked as outside.
            shape = one.shape or self._shapes[track]
            self._shapes[track] = shape
            self._xml.add(track, number, shape, outside=one.lost)
            if not one.lost:
                masks[track] = shape_to_mask(shape, self._size_hw) if one.mask is None else one.mask
                self._coco.add(track, number, masks[track], one.score)
        picture = draw_masks(np.asarray(frame), masks, self._labels)
        self._overlay.add(picture)
        self._sheet.add(number, picture)

    def close(self) -> None:
        for file in (self._xml, self._coco, self._overlay, self._sheet):
            file.close()


def _range(
    clip: Clip, prompts: Sequence[InitialShape], last_frame: int | None, *, backwards: bool
) -> tuple[int, int]:
    for prompt in prompts:
        if not 0 <= prompt.frame < clip.frame_count:
            raise BadRequestError(
                f"{prompt.label} starts on frame {prompt.frame}: the clip has {clip.frame_count}"
            )
    frames = [prompt.frame for prompt in prompts]
    first = max(frames) if backwards else min(frames)
    end = 0 if backwards else clip.frame_count - 1
    last = end if last_frame is None else last_frame
    if not min(first, end) <= last <= max(first, end):
        raise BadRequestError(f"last frame {last} does not lie between {first} and {end}")
    for prompt in prompts:
        if not min(first, last) <= prompt.frame <= max(first, last):
            raise BadRequestError(
                f"{prompt.label} starts on frame {prompt.frame}, behind the last frame {last}"
            )
    return first, last


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip", type=Path, help="a video file or a folder of images")
    parser.add_argument(
        "--shapes",
        type=Path,
        required=True,
        help="what to track: JSON list of label, type, points, frame; or CVAT for video 1.1 XML",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--last-frame", type=int, help="where to stop; default: the clip's end")
    parser.add_argument("--backwards", action="store_true", help="track towards frame 0")
    parser.add_argument("--url", help="a running function; default: track in this process")
    options = parser.parse_args(arguments)
    try:
        clip = open_clip(options.clip)
        prompts = read_prompts(options.shapes)
        with closing(open_tracking_client(options.url, os.environ)) as client:
            outcome = track_clip(
                clip,
                prompts,
                client,
                options.out,
                last_frame=options.last_frame,
                backwards=options.backwards,
            )
    except (TrackerError, SettingsError) as err:
        print(f"track_video: {err}", file=sys.stderr)
        return 1
    for track, prompt in enumerate(prompts):
        print(f"{track} {prompt.label}: lost on {outcome.lost[track]} of {outcome.frames} frames")
    print(f"wrote annotations.xml, tracks.json, overlay.mp4 and contact_sheet.png to {options.out}")
    if outcome.interrupted:
        print("interrupted: what was tracked so far is written", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
