"""Draw the clips that benchmarks track: discs that drift over a grainy background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from shapes import Mask, SizeHW

COLUMNS, ROWS = 8, 4  # a grid cell for each of up to 32 discs, so that none hides another
JPEG_QUALITY = 95
FIRST_NEW_FRAME = 16  # SAM 2 attends to 15 earlier frames, to fewer in clips of fewer than 16


@dataclass(frozen=True)
class Clip:
    """A clip as files and in memory.

    Attributes:
        folder: The frames as `00000.jpg` and so on, the names that SAM 2's predictor expects.
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
    background = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    background += rng.normal(0, 4, (height, width, 1)).astype(np.int16)
    still_frame = np.clip(background, 0, 255).astype(np.uint8)
    cells = np.arange(objects) % (COLUMNS * ROWS)
    centers = np.stack([cells % COLUMNS + 0.5, cells // COLUMNS + 0.5], axis=1)
    centers *= [width / COLUMNS, height / ROWS]
    speeds = rng.uniform(-1, 1, (objects, 2)) * height / 500
    colors = rng.integers(0, 255, (objects, 3)).tolist()
    frames, masks = [], []
    for index in range(count):
        # shifted, so that no two frames are equal: equal frames share cached features
        frame = np.roll(still_frame, index, axis=1)
        for center, speed, color in zip(centers, speeds, colors, strict=True):
            x, y = (center + index * speed).astype(int).tolist()
            cv2.circle(frame, (x, y), height // 14, color, -1, cv2.LINE_AA)
            if index == 0:
                disc = cv2.circle(np.zeros(size_hw, np.uint8), (x, y), height // 14, 1, -1)
                masks.append(disc.astype(np.bool_))
        frames.append(frame)
    return frames, masks


def distinct_frames(frames: Sequence[bytes], client: int) -> list[bytes]:
    """Append a byte to JPEGs, so that clients do not share cached features."""
    return [frame + bytes([client]) for frame in frames]


def make_clip(folder: Path, count: int, objects: int, size_hw: SizeHW) -> Clip:
    """Write a clip of `FIRST_NEW_FRAME` equal frames and `count` further frames.

    Only frame 0 and the further frames are tracked: the memories of those between are copies, see
    `memory_banks`.
    """
    pictures, masks = draw_discs(count + 1, objects, size_hw)
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    first, *others = [cv2.imencode(".jpg", picture, options)[1].tobytes() for picture in pictures]
    frames = [first] * FIRST_NEW_FRAME + others
    folder.mkdir(parents=True)
    for index, frame in enumerate(frames):
        (folder / f"{index:05d}.jpg").write_bytes(frame)
    return Clip(folder, frames, masks)
