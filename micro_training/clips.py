"""Make synthetic clips with ground truth from seeds; training, evaluation and demo share none."""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from micro_training.render import render_frame
from micro_training.scene import Event, Role, draw_scene

TRAINING_SEEDS = range(10_000_000)
HELD_OUT_SEEDS = range(10_000_000, 10_100_000)
DEMO_SEEDS = range(10_100_000, 10_200_000)

_EVENTS: tuple[Event, ...] = ("none", "eclipse", "pillar")


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip and its ground truth.

    `frames` is `(T, H, W, 3)` uint8 RGB; `labels` is `(T, H, W)` uint8, i + 1 where body i is
    visible and 0 for background; `roles` has one entry per body; `target` is the body that the
    event hides.
    """

    frames: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    roles: tuple[Role, ...]
    target: int

    def mask(self, time: int, body: int) -> npt.NDArray[np.bool_]:
        """Return the visible part of a body, `(H, W)` bool."""
        visible: npt.NDArray[np.bool_] = self.labels[time] == body + 1
        return visible


@dataclass(frozen=True)
class Script:
    """The contents of a clip; None lets the seed decide.

    `event` hides the target for about `hidden` frames of the clip (lower and upper bound);
    `lookalike` is whether a distractor looks like the target; `objects` is the number of objects
    with the target, without occluder and distractor.
    """

    event: Event | None = None
    lookalike: bool | None = None
    objects: int | None = None
    hidden: tuple[float, float] = (5, 10)


def make_clip(
    seed: int,
    *,
    frames: int,
    size_hw: tuple[int, int],
    render_hw: tuple[int, int] | None = None,
    stride: float = 1.0,
    script: Script,
) -> Clip:
    """Make a clip; equal arguments give equal clips.

    Args:
        seed: Of everything that the script leaves open.
        frames: Number of frames, T.
        size_hw: Size of the frames in pixels, (H, W); the scene is stretched to it.
        render_hw: Size to draw at before shrinking to `size_hw`; None: draw at `size_hw`.
        stride: Time between frames; 1 is a slow, smooth video.
        script: Contents of the clip.
    """
    rng = np.random.default_rng(seed)
    span = (frames - 1) * stride
    scene = draw_scene(
        rng,
        objects=script.objects or int(rng.integers(2, 5)),
        event=script.event or _EVENTS[int(rng.choice(3, p=(0.3, 0.35, 0.35)))],
        lookalike=rng.random() < 0.4 if script.lookalike is None else script.lookalike,
        moment=rng.uniform(0.35, 0.65) * span,
        hidden=rng.uniform(*script.hidden) * stride,
    )
    pictures = np.empty((frames, *size_hw, 3), np.uint8)
    labels = np.empty((frames, *size_hw), np.uint8)
    for index in range(frames):
        picture, label = render_frame(scene, index * stride, render_hw or size_hw, rng)
        if render_hw is not None:
            picture = np.asarray(
                cv2.resize(picture, size_hw[::-1], interpolation=cv2.INTER_AREA), np.uint8
            )
            label = np.asarray(
                cv2.resize(label, size_hw[::-1], interpolation=cv2.INTER_NEAREST), np.uint8
            )
        pictures[index], labels[index] = picture, label
    return Clip(pictures, labels, tuple(body.role for body in scene.bodies), scene.target)
