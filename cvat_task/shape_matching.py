"""Tell which shapes belong to the same object: by group, label and type, and by overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cvat_task.keyframes import Json
from shapes import ShapeType

SAME_OBJECT_IOU = 0.5  # of boxes; CVAT unites tracks of overlapping jobs from this value on


def series_of(shape: Json) -> tuple[Any, ...]:
    """Return what the shapes of an object have in common: group, label and type."""
    return shape.get("group") or 0, shape["label_id"], shape.get("type")


def count_series(annotations: Json, shape: Json, frame: int) -> int:
    """Return how many shapes on a frame have the shape's series; 0 if it is in no group."""
    if not shape["group"]:
        return 0
    return sum(
        series_of(other) == series_of(shape) and other["frame"] == frame
        for other in annotations["shapes"]
    )


def box_iou(shape_type: str, points: Sequence[float], others: Sequence[float]) -> float:
    """Return the intersection over union of the boxes of two shapes of one type."""
    a, b = _box(shape_type, points), _box(shape_type, others)
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if union else 0.0


def _box(shape_type: str, points: Sequence[float]) -> tuple[float, float, float, float]:
    """Return a box XYXY in pixels, far edge excluded."""
    if shape_type == ShapeType.MASK:
        x1, y1, x2, y2 = points[-4:]
        return x1, y1, x2 + 1, y2 + 1
    if shape_type == ShapeType.ELLIPSE:
        x, y, right, top = points
        return 2 * x - right, top, right, 2 * y - top
    xs, ys = points[0::2], points[1::2]
    return min(xs), min(ys), max(xs), max(ys)
