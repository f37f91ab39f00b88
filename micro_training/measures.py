"""Compute the measures of the evaluation from answers and ground truth."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from micro_training.clips import Clip
from micro_training.function_client import Answer
from micro_training.held_out import HIDDEN_FRAMES, HeldOut, hidden_run, in_full_view
from micro_training.metrics import boundary_f, region_iou

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

# Found again: an IoU of at least a half in most of the first frames in view.
_FOUND_IOU = 0.5
_FRAMES_TO_FIND = 8
# Swapped: most of the mask is on the look-alike for this many frames in a row.
_FRAMES_OF_SWAP = 3


@dataclass(frozen=True, eq=False)
class ClipResult:
    """The measures of one clip with one kind of prompt.

    `j` and `f` are `(N, T - 1)`, objects by frames 1 to T - 1; so are `lost`, answered as absent,
    and `hidden`, truly not visible. `hidden_null` is the share of the occlusion's frames answered
    as absent, None without an occlusion of 5 to 10 frames; `found` is whether the target was found
    again afterwards, None likewise; `swapped` is whether its mask moved to the look-alike, None
    without a look-alike.
    """

    j: Floats
    f: Floats
    lost: Flags
    hidden: Flags
    hidden_null: float | None
    found: bool | None
    swapped: bool | None


def measure_clip(held_out: HeldOut, clip: Clip, answers: list[list[Answer]]) -> ClipResult:
    """Compute the measures of one clip.

    Args:
        held_out: Contents of the clip.
        clip: The clip and its ground truth.
        answers: By frame from frame 1, and by object.
    """
    truth = np.stack([clip.labels == body + 1 for body in held_out.bodies])
    pairs = [
        [(row[n].mask, truth[n, t]) for t, row in enumerate(answers, start=1)]
        for n in range(len(held_out.bodies))
    ]
    j = np.array([[region_iou(*pair) for pair in row] for row in pairs])
    f = np.array([[boundary_f(*pair) for pair in row] for row in pairs])
    lost = np.array([[row[n].shape is None for row in answers] for n in range(len(pairs))])
    areas = truth.sum(axis=(2, 3))
    run = hidden_run(areas[0] > 0) if held_out.event != "none" else None
    hidden_null = found = None
    if run is not None and run[1] - run[0] in HIDDEN_FRAMES:
        hidden_null = float(lost[0, run[0] - 1 : run[1] - 1].mean())
        in_view = np.flatnonzero(in_full_view(areas[0])[run[1] :]) + run[1] - 1
        found = bool((j[0, in_view[:_FRAMES_TO_FIND]] >= _FOUND_IOU).mean() > 0.5)
    swapped = None
    if held_out.lookalike:
        lookalike = clip.labels == clip.roles.index("lookalike") + 1
        on_lookalike = [
            bool(row[0].mask.any() and (row[0].mask & lookalike[t]).sum() > row[0].mask.sum() / 2)
            for t, row in enumerate(answers, start=1)
        ]
        swapped = _longest_run(on_lookalike) >= _FRAMES_OF_SWAP
    return ClipResult(j, f, lost, areas[:, 1:] == 0, hidden_null, found, swapped)


def summarise(results: list[ClipResult]) -> dict[str, float]:
    """Average over clips; J and F over all objects and frames after the prompt's.

    `j_frame_5` and `j_frame_39` are means over 3 frames, around frame 5 and up to the last.
    """
    j = np.concatenate([result.j for result in results])
    hidden = np.concatenate([result.hidden for result in results])
    found = [result.found for result in results if result.found is not None]
    nulls = [result.hidden_null for result in results if result.hidden_null is not None]
    swaps = [result.swapped for result in results if result.swapped is not None]
    return {
        "j": float(j.mean()),
        "j_visible": float(j[~hidden].mean()),
        "f": float(np.concatenate([result.f for result in results]).mean()),
        "j_frame_5": float(j[:, 3:6].mean()),
        "j_frame_39": float(j[:, -3:].mean()),
        "found_again": float(np.mean(found)),
        "hidden_null": float(np.mean(nulls)),
        "swapped": float(np.mean(swaps)),
        "objects": float(len(j)),
        "occlusions": float(len(found)),
        "lookalikes": float(len(swaps)),
    }


def j_over_time(results: list[ClipResult]) -> list[float]:
    """Return the mean J of every frame from 1 on."""
    means: list[float] = np.concatenate([result.j for result in results]).mean(axis=0).tolist()
    return means


def _longest_run(flags: list[bool]) -> int:
    longest = current = 0
    for flag in flags:
        current = current + 1 if flag else 0
        longest = max(longest, current)
    return longest
