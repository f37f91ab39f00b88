"""Draws the clips that benchmarks track: discs that drift over a grainy ground, of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from shapes import Mask, SizeHW

COLUMNS, ROWS = 8, 4  # a place for each of up to 32 discs, so that none hides another
JPEG_QUALITY = 95
FIRST_NEW_FRAME = 16  # SAM 2 looks back on 15 frames, and on fewer in clips of fewer than 16


@dataclass(frozen=True)
class Clip:
    """A clip as files and in memory.

    Attributes:
        folder: The frames as `00000.jpg` and so on, which is how SAM 2's predictor wants them.
        frames: The same JPEGs.
        masks: The discs on frame 0, each `(H, W)`.
    """

    folder: Path
    frames: list[bytes]
    masks: list[Mask]

    @property
    def size_hw(self) -> SizeHW:
        """Height and width of the frames."""
        height, width = self.masks[0].shape
        return height, width


def draw_discs(
    count: int, objects: int, size_hw: SizeHW
) -> tuple[list[npt.NDArray[np.uint8]], list[Mask]]:
    """Return frames `(H, W, 3)` in OpenCV's BGR, and each disc's mask on frame 0."""
    height, width = size_hw
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (9, 16, 3), dtype=np.uint8)
    ground = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    ground += rng.normal(0, 4, (height, width, 1)).astype(np.int16)
    still = np.clip(ground, 0, 255).astype(np.uint8)
    places = np.arange(objects) % (COLUMNS * ROWS)
    centers = np.stack([places % COLUMNS + 0.5, places // COLUMNS + 0.5], axis=1)
    centers *= [width / COLUMNS, height / ROWS]
    speeds = rng.uniform(-1, 1, (objects, 2)) * height / 500
    colors = rng.integers(0, 255, (objects, 3)).tolist()
    frames, masks = [], []
    for index in range(count):
        frame = np.roll(still, index, axis=1)  # no two are equal: features are kept by content
        for center, speed, color in zip(centers, speeds, colors, strict=True):
            x, y = (center + index * speed).astype(int).tolist()
            cv2.circle(frame, (x, y), height // 14, color, -1, cv2.LINE_AA)
            if index == 0:
                disc = cv2.circle(np.zeros(size_hw, np.uint8), (x, y), height // 14, 1, -1)
                masks.append(disc.astype(np.bool_))
        frames.append(frame)
    return frames, masks


def clients_own(frames: Sequence[bytes], client: int) -> list[bytes]:
    """Return a client's own JPEGs: features are kept by content, and a byte more is another."""
    return [frame + bytes([client]) for frame in frames]


def make_clip(folder: Path, count: int, objects: int, size_hw: SizeHW) -> Clip:
    """Write a clip of `FIRST_NEW_FRAME` equal frames and `count` further ones.

    Only frame 0 and the further ones are tracked on: see `contenders`.
    """
    pictures, masks = draw_discs(count + 1, objects, size_hw)
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    first, *others = [cv2.imencode(".jpg", one, options)[1].tobytes() for one in pictures]
    frames = [first] * FIRST_NEW_FRAME + others
    folder.mkdir(parents=True)
    for index, frame in enumerate(frames):
        (folder / f"{index:05d}.jpg").write_bytes(frame)
    return Clip(folder, frames, masks)
