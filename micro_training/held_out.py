"""Choose the held-out clips for evaluating the bundled model; training never uses their seeds."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from micro_training.clips import HELD_OUT_SEEDS, Clip, Script, make_clip
from micro_training.scene import Event

CLIPS = 40
FRAMES = 40
SIZE_HW = (360, 640)
HIDDEN_FRAMES = range(5, 11)
MAX_OBJECTS = 3

_PREVIEW_HW = (90, 160)
_MIN_START_SHARE = 0.01
# Least number of frames in view after the occlusion, to judge whether the object is found again.
_MIN_FRAMES_AFTER = 6


@dataclass(frozen=True)
class HeldOut:
    """One clip to evaluate on.

    `event` hides the first object for 5 to 10 frames unless it is "none"; `bodies` are the objects
    to track, the event's target first.
    """

    seed: int
    event: Event
    lookalike: bool
    bodies: tuple[int, ...]

    def make(self, size_hw: tuple[int, int] = SIZE_HW) -> Clip:
        """Draw the clip."""
        return make_clip(
            self.seed,
            frames=FRAMES,
            size_hw=size_hw,
            script=Script(self.event, self.lookalike, objects=3, hidden=(4, 8)),
        )


def choose_held_out(count: int = CLIPS) -> Iterator[HeldOut]:
    """Choose the clips: 7 in 10 with a full occlusion, every second one with a look-alike.

    Seeds are taken in order. A seed is skipped only if its clip does not show the event and the
    look-alike that its position in the list requires, never for how well it is tracked.
    """
    seeds = iter(HELD_OUT_SEEDS)
    for index in range(count):
        event: Event = ("eclipse", "pillar")[index % 2] if index % 10 < 7 else "none"
        lookalike = index // 2 % 2 == 0
        yield next(
            held_out
            for held_out in (_candidate(seed, event, lookalike=lookalike) for seed in seeds)
            if held_out is not None
        )


def hidden_run(visible: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> tuple[int, int] | None:
    """Return the first index of the only hidden run and the index after its end, or None.

    Args:
        visible: `(T,)`, whether any of the object is visible. The result is None unless it is
            hidden exactly once and visible before and after.
    """
    edges = np.flatnonzero(np.diff(visible.astype(np.int8)))
    if len(edges) != 2 or not visible[0]:
        return None
    return int(edges[0]) + 1, int(edges[1]) + 1


def in_full_view(
    areas: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which frames show at least half of the area visible on the first frame."""
    return np.asarray(areas >= 0.5 * areas[0])


def _candidate(seed: int, event: Event, *, lookalike: bool) -> HeldOut | None:
    draft = HeldOut(seed, event, lookalike, ())
    clip = draft.make(_PREVIEW_HW)
    areas = np.stack(
        [(clip.labels == body + 1).sum(axis=(1, 2)) for body in range(len(clip.roles))]
    )
    bodies = [clip.target]
    bodies += [i for i, role in enumerate(clip.roles) if role == "object" and i != clip.target]
    bodies = [i for i in bodies if areas[i, 0] >= _MIN_START_SHARE * clip.labels[0].size]
    if clip.target not in bodies:
        return None
    if lookalike and not areas[clip.roles.index("lookalike")].any():
        return None
    if event != "none":
        run = hidden_run(areas[clip.target] > 0)
        if run is None or run[1] - run[0] not in HIDDEN_FRAMES:
            return None
        if in_full_view(areas[clip.target])[run[1] :].sum() < _MIN_FRAMES_AFTER:
            return None
    return HeldOut(seed, event, lookalike, tuple(bodies[:MAX_OBJECTS]))
