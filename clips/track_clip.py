"""Track objects through a clip, frame by frame: memory does not grow with the clip's length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from clips.initial_shape import InitialShape
from clips.reader import Clip
from clips.result_files import ResultFiles
from clips.tracking_client import TrackingClient
from errors import BadRequestError
from object_requests import Continue, Start
from state_token import StateToken


@dataclass(frozen=True)
class ClipSummary:
    """What a run did.

    Attributes:
        frames: Frames tracked.
        lost: For each track, on how many of them the object was not found.
        interrupted: Whether Ctrl-C ended it early.
    """

    frames: int
    lost: tuple[int, ...]
    interrupted: bool


def track_clip(
    clip: Clip,
    initial_shapes: Sequence[InitialShape],
    client: TrackingClient,
    out: Path,
    *,
    last_frame: int | None = None,
    backwards: bool = False,
) -> ClipSummary:
    """Track objects through a clip and write the results to a folder.

    Ctrl-C ends the run; the files then hold the frames before.

    Args:
        clip: The frames.
        initial_shapes: The objects to track, each from its own frame on.
        client: What tracks.
        out: Folder for the files that `ResultFiles` writes.
        last_frame: Where to stop; None means the end of the clip, or its beginning if backwards.
        backwards: Track towards frame 0.

    Raises:
        BadRequestError: An initial shape or the last frame lies outside the clip or on the wrong
            side.
        TrackerError: As the client raises it; what was tracked before is written.
    """
    first, last = _frame_range(clip, initial_shapes, last_frame, backwards=backwards)
    labels = [initial.label for initial in initial_shapes]
    tokens: dict[int, StateToken] = {}
    lost = [0] * len(initial_shapes)
    done = 0
    interrupted = False
    out.mkdir(parents=True, exist_ok=True)
    files: ResultFiles | None = None
    total = abs(last - first) + 1
    frames = clip.frames(first, last)
    try:
        with tqdm(frames, total=total, unit="frame", disable=None) as bar:
            for number, frame in bar:
                if files is None:
                    size_hw = (frame.height, frame.width)
                    files = ResultFiles(out, clip, labels, size_hw, first, last)
                starts = {
                    track: Start(initial.shape)
                    for track, initial in enumerate(initial_shapes)
                    if initial.frame == number
                }
                items = {track: Continue(token) for track, token in tokens.items()} | starts
                objects = dict(zip(items, client.track(frame, list(items.values())), strict=True))
                tokens = {track: obj.token for track, obj in objects.items()}
                for track, obj in objects.items():
                    lost[track] += obj.lost
                files.add(number, frame, objects)
                done += 1
                bar.set_postfix(
                    objects=len(objects), lost=sum(obj.lost for obj in objects.values())
                )
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if files is not None:
            files.close()
    return ClipSummary(done, tuple(lost), interrupted)


def _frame_range(
    clip: Clip, initial_shapes: Sequence[InitialShape], last_frame: int | None, *, backwards: bool
) -> tuple[int, int]:
    """Return the numbers of the first and the last frame to track on."""
    for initial in initial_shapes:
        if not 0 <= initial.frame < clip.frame_count:
            raise BadRequestError(
                f"{initial.label} starts on frame {initial.frame}: the clip has {clip.frame_count}"
            )
    starts = [initial.frame for initial in initial_shapes]
    first = max(starts) if backwards else min(starts)
    end = 0 if backwards else clip.frame_count - 1
    last = end if last_frame is None else last_frame
    if not min(first, end) <= last <= max(first, end):
        raise BadRequestError(f"last frame {last} does not lie between {first} and {end}")
    for initial in initial_shapes:
        if not min(first, last) <= initial.frame <= max(first, last):
            raise BadRequestError(
                f"{initial.label} starts on frame {initial.frame}, behind the last frame {last}"
            )
    return first, last
