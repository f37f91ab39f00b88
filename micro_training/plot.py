"""Draw J over time as a small picture."""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

_WIDTH, _HEIGHT, _MARGIN = 720, 360, 48
_COLOURS_BGR = ((180, 90, 20), (30, 110, 220), (60, 140, 60))
_INK, _GRID = (40, 40, 40), (220, 220, 220)


def draw_curves(curves: dict[str, list[float]], title: str, path: Path) -> None:
    """Write a PNG with one curve per entry, values 0..1 against frame numbers from 1."""
    canvas = np.full((_HEIGHT, _WIDTH, 3), 255, np.uint8)
    frames = max(len(curve) for curve in curves.values())
    for tenth in range(0, 11, 2):
        y = _pixel(1, tenth / 10, frames)[1]
        cv2.line(canvas, (_MARGIN, y), (_WIDTH - _MARGIN, y), _GRID, 1, cv2.LINE_AA)
        _write(canvas, f"{tenth / 10:.1f}", (8, y + 4), _INK)
    for frame in range(5, frames + 1, 5):
        _write(canvas, str(frame), (_pixel(frame, 0, frames)[0] - 8, _HEIGHT - 26), _INK)
    _write(canvas, title, (_MARGIN, 24), _INK)
    _write(canvas, "frame", (_WIDTH // 2 - 20, _HEIGHT - 8), _INK)
    for index, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS_BGR[index % len(_COLOURS_BGR)]
        corners = [_pixel(frame, value, frames) for frame, value in enumerate(curve, start=1)]
        cv2.polylines(canvas, [np.array(corners, np.int32)], False, colour, 2, cv2.LINE_AA)  # noqa: FBT003
        _write(canvas, name, (_WIDTH - 220, _HEIGHT - 90 + 20 * index), colour)
    cv2.imwrite(str(path), canvas)


def _pixel(frame: int, value: float, frames: int) -> tuple[int, int]:
    x = _MARGIN + (frame - 1) / max(1, frames - 1) * (_WIDTH - 2 * _MARGIN)
    y = _HEIGHT - _MARGIN - value * (_HEIGHT - 2 * _MARGIN)
    return round(x), round(y)


def _write(
    canvas: npt.NDArray[np.uint8], text: str, corner: tuple[int, int], colour: tuple[int, int, int]
) -> None:
    cv2.putText(canvas, text, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, 1, cv2.LINE_AA)
