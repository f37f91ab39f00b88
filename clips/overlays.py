"""Draw masks into frames, and write these as a video or as a contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from errors import BadRequestError
from shapes import Mask, SizeHW, mask_to_box

Picture = npt.NDArray[np.uint8]  # (H, W, 3), RGB

# Colours that people with the common kinds of colour blindness can tell apart: Okabe and Ito,
# "Color Universal Design", 2008. RGB.
COLORS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
)
SHEET_COLUMNS = 4
SHEET_TILE_WIDTH = 480


def draw_masks(frame: Picture, masks: Mapping[int, Mask], labels: Sequence[str]) -> Picture:
    """Return a copy of the frame with each track's mask tinted, outlined and labelled.

    Args:
        frame: RGB `(H, W, 3)`, uint8.
        masks: Boolean masks `(H, W)` by track.
        labels: One per track.
    """
    picture = frame.copy()
    for track, mask in masks.items():
        color = np.array(COLORS[track % len(COLORS)], dtype=np.uint8)
        picture[mask] = picture[mask] // 2 + color // 2
        outlines, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outlines, -1, color.tolist(), 2)
        box = mask_to_box(mask)
        if box is not None:
            _write(
                picture, f"{track} {labels[track]}", (box[0], max(box[1] - 6, 14)), color.tolist()
            )
    return picture


class OverlayWriter:
    """Writes the drawn frames as an MP4.

    Args:
        path: The file to write.
        size_hw: Height and width of the frames.
        fps: Frames per second.
    """

    def __init__(self, path: Path, size_hw: SizeHW, fps: float) -> None:
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(path), codec, fps, size_hw[::-1])
        if not self._writer.isOpened():
            raise BadRequestError(f"{path} cannot be written as a video")

    def add(self, picture: Picture) -> None:
        """Add a drawn frame, RGB."""
        self._writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        """Complete the file."""
        self._writer.release()


class ContactSheet:
    """Lays out a few drawn frames on one page.

    Args:
        path: The PNG to write.
        frames: The numbers of the frames to show.
    """

    def __init__(self, path: Path, frames: Sequence[int]) -> None:
        self._path = path
        self._frames = frozenset(frames)
        self._tiles: list[Picture] = []

    def add(self, frame: int, picture: Picture) -> None:
        """Add a drawn frame, RGB, if its number is among those to show."""
        if frame not in self._frames:
            return
        height = round(SHEET_TILE_WIDTH * picture.shape[0] / picture.shape[1])
        size = (SHEET_TILE_WIDTH, height)
        tile = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        _write(tile, f"frame {frame}", (8, height - 10), (255, 255, 255))
        self._tiles.append(tile)

    def close(self) -> None:
        """Write the page, unless it is empty."""
        if not self._tiles:
            return
        blank = np.zeros_like(self._tiles[0])
        tiles = self._tiles + [blank] * (-len(self._tiles) % SHEET_COLUMNS)
        rows = [
            np.hstack(tiles[i : i + SHEET_COLUMNS]) for i in range(0, len(tiles), SHEET_COLUMNS)
        ]
        cv2.imwrite(str(self._path), cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))


def _write(picture: Picture, text: str, at_xy: tuple[int, int], color: Sequence[int]) -> None:
    for shade, width in (((0, 0, 0), 3), (color, 1)):  # dark rim: readable on any background
        cv2.putText(picture, text, at_xy, cv2.FONT_HERSHEY_SIMPLEX, 0.5, shade, width, cv2.LINE_AA)
