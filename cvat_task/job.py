"""What a run has to know about a CVAT job: its frames and labels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Label:
    """A label of the job.

    Attributes:
        name: As annotators see it.
        mutable: Ids of its attributes that may change from frame to frame.
    """

    name: str
    mutable: frozenset[int]


@dataclass(frozen=True)
class Job:
    """A job and its frames.

    Attributes:
        id: The job's id.
        task_id: Its task's id.
        frames: Numbers of all its frames, ascending, as annotations count them; chunks hold the
            frames in this order, `chunk_size` each.
        deleted: Frames that an annotator has deleted.
        honeypots: Frames that show a frame of the validation set instead of their own.
        sizes_hw: Height and width, of each of `frames` or one for all.
        chunk_size: Frames per chunk.
        is_video: Whether chunks are MP4 instead of ZIP files with images.
        tracks_allowed: Whether it takes tracks; jobs with honeypots do not.
        labels: By id.
    """

    id: int
    task_id: int
    frames: tuple[int, ...]
    deleted: frozenset[int]
    honeypots: frozenset[int]
    sizes_hw: tuple[tuple[int, int], ...]
    chunk_size: int
    is_video: bool
    tracks_allowed: bool
    labels: dict[int, Label]

    @cached_property
    def usable(self) -> tuple[int, ...]:
        """Frames to track on, ascending."""
        skipped = self.deleted | self.honeypots
        return tuple(frame for frame in self.frames if frame not in skipped)

    @cached_property
    def indices(self) -> dict[int, int]:
        """Index of each frame in `frames`, by its number."""
        return {frame: index for index, frame in enumerate(self.frames)}

    def size_hw(self, frame: int) -> tuple[int, int]:
        """Return a frame's height and width."""
        return self.sizes_hw[0 if len(self.sizes_hw) == 1 else self.indices[frame]]
