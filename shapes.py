"""Convert CVAT's shapes to boolean masks and back.

Frame of reference: continuous pixel coordinates, pixel (x, y) covers [x, x + 1) x [y, y + 1). A
pixel belongs to a polygon, rectangle or ellipse if its centre lies inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import cv2
import numpy as np
import numpy.typing as npt

from errors import BadRequestError, TooLargeError

Mask = npt.NDArray[np.bool_]  # (H, W), full image size
SizeHW = tuple[int, int]
Box = tuple[float, float, float, float]  # XYXY, far edge excluded

DEFAULT_POLYGON_TOLERANCE = 1.0
MIN_POLYGON_IOU = 0.98
# Filling a polygon that crosses the frame's rows more often takes more than 150 MB.
MAX_CROSSINGS = 2_000_000
MAX_NUMBER = 1e9  # far larger than any frame, and small enough that no sum or product overflows


class ShapeType(StrEnum):
    """The shape types that CVAT's tracker protocol and this function share."""

    MASK = "mask"
    POLYGON = "polygon"
    RECTANGLE = "rectangle"
    ELLIPSE = "ellipse"


@dataclass(frozen=True)
class Shape:
    """One shape as CVAT writes it.

    Attributes:
        type: How to read `points`.
        points: CVAT's flat list. Mask: cvat_rle. Polygon: x0, y0, x1, y1, ... Rectangle: x1, y1,
            x2, y2. Ellipse: the centre's x and y, the right-most x, the top-most y.
    """

    type: ShapeType
    points: Sequence[float]


def shape_to_mask(shape: Shape, size_hw: SizeHW) -> Mask:
    """Draw a shape.

    Args:
        shape: Of any type; parts outside the frame are cut off.
        size_hw: Frame height and width.

    Returns:
        Boolean mask `(H, W)` with at least one pixel set.

    Raises:
        BadRequestError: The points are malformed, or cover no pixel of the frame.
    """
    points = _numbers(shape)
    match shape.type:
        case ShapeType.MASK:
            mask = decode_cvat_rle(points, size_hw)
        case ShapeType.POLYGON:
            mask = _polygon_to_mask(_vertices(points, size_hw), size_hw)
        case ShapeType.RECTANGLE:
            x1, y1, x2, y2 = rectangle_to_box(shape, size_hw)
            mask = _polygon_to_mask(np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]]), size_hw)
        case ShapeType.ELLIPSE:
            mask = _ellipse_to_mask(points, size_hw)
    if not mask.any():
        height, width = size_hw
        raise BadRequestError(
            f"{shape.type} covers no pixel of the {width} x {height} frame: draw it on the object"
        )
    return mask


def mask_to_shape(
    mask: Mask, shape_type: ShapeType, *, polygon_tolerance: float = DEFAULT_POLYGON_TOLERANCE
) -> Shape | None:
    """Convert a mask to a shape of the given type.

    Args:
        mask: Boolean mask `(H, W)`.
        shape_type: The type: the mask itself, a polygon around its largest component, the box of
            all its pixels, or the axis-aligned ellipse with its centre and second moments.
        polygon_tolerance: See `mask_to_polygon`.

    Returns:
        The shape, or None for an empty mask.
    """
    box = mask_to_box(mask)
    if box is None:
        return None
    points: Sequence[float]
    match shape_type:
        case ShapeType.MASK:
            points = encode_cvat_rle(mask)
        case ShapeType.POLYGON:
            points = mask_to_polygon(mask, tolerance=polygon_tolerance).ravel().tolist()
        case ShapeType.RECTANGLE:
            points = [float(edge) for edge in box]
        case ShapeType.ELLIPSE:
            points = _mask_to_ellipse(mask, box)
    return Shape(shape_type, points)


def mask_to_box(mask: Mask) -> tuple[int, int, int, int] | None:
    """Return the box XYXY of all pixels, far edge excluded, or None for an empty mask."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    return (x, y, x + width, y + height) if width else None


def encode_cvat_rle(mask: Mask) -> list[int]:
    """Encode a mask as CVAT does.

    Args:
        mask: Boolean mask `(H, W)` with at least one pixel set.

    Returns:
        Run lengths over the mask's box, row by row, background first, then the box `x1, y1, x2,
        y2` with its far edge **included**.

    Example:
        A 4 x 3 frame whose pixels (1, 1) and (2, 1) are set: `[0, 2, 1, 1, 2, 1]`.

    Source:
        CVAT's format, `cvat_sdk.masks.encode_mask`.
    """
    box = mask_to_box(mask)
    assert box is not None
    x1, y1, x2, y2 = box
    flat = mask[y1:y2, x1:x2].ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(changes, prepend=0, append=flat.size).tolist()
    background_first = [0] if flat[0] else []
    return [*background_first, *runs, x1, y1, x2 - 1, y2 - 1]


def decode_cvat_rle(points: Sequence[float] | npt.NDArray[np.float64], size_hw: SizeHW) -> Mask:
    """Decode cvat_rle, see `encode_cvat_rle`; numbers may be floats without a fraction.

    Returns:
        Boolean mask `(H, W)`.

    Raises:
        BadRequestError: The runs do not fit the box, or the box does not fit the frame.
    """
    values = np.asarray(points, dtype=np.float64)
    height, width = size_hw
    if values.size < 5:
        raise BadRequestError(f"mask has {values.size} numbers: expected runs and x1, y1, x2, y2")
    if (values != np.floor(values)).any() or (values < 0).any():
        raise BadRequestError("mask has a number that is negative or not whole")
    x1, y1, x2, y2 = (int(value) for value in values[-4:])
    if not (x1 <= x2 < width and y1 <= y2 < height):
        raise BadRequestError(
            f"mask box {x1}, {y1}, {x2}, {y2} does not lie in the {width} x {height} frame"
        )
    box_hw = (y2 - y1 + 1, x2 - x1 + 1)
    runs = values[:-4]
    area = box_hw[0] * box_hw[1]
    if runs.sum() != area:
        raise BadRequestError(f"mask runs add up to {runs.sum():.0f}, its box has {area} pixels")
    inside = np.arange(runs.size) % 2 == 1
    mask = np.zeros(size_hw, dtype=np.bool_)
    mask[y1 : y2 + 1, x1 : x2 + 1] = np.repeat(inside, runs.astype(np.int64)).reshape(box_hw)
    return mask


def rectangle_to_box(shape: Shape, size_hw: SizeHW) -> Box:
    """Return a rectangle's box XYXY, corners in order, clipped to the frame, far edge excluded.

    Raises:
        BadRequestError: The points are not four numbers, or no part lies in the frame.
    """
    points = _numbers(shape)
    if points.size != 4:
        raise BadRequestError(f"rectangle has {points.size} numbers: expected x1, y1, x2, y2")
    height, width = size_hw
    x1, x2 = np.clip(np.sort(points[0::2]), 0, width).tolist()
    y1, y2 = np.clip(np.sort(points[1::2]), 0, height).tolist()
    if not (x1 < x2 and y1 < y2):
        raise BadRequestError(f"rectangle has no area in the {width} x {height} frame")
    return x1, y1, x2, y2


def mask_to_polygon(
    mask: Mask, *, tolerance: float = DEFAULT_POLYGON_TOLERANCE
) -> npt.NDArray[np.float64]:
    """Trace the largest 8-connected component along its pixel edges, as one ring.

    Holes are filled. The ring is simplified with Douglas-Peucker; the tolerance is lowered until
    the IoU of ring and component is at least `MIN_POLYGON_IOU`, which thin or tiny components need.

    Args:
        mask: Boolean mask `(H, W)` with at least one pixel set.
        tolerance: Largest distance in pixels between the ring and the pixel edges.

    Returns:
        Vertices `(N, 2)`, N >= 3, xy in pixels, clockwise on the screen, beginning with the vertex
        nearest to the frame's top left (smallest x + y), so that successive frames match up.
    """
    component, offset_xy = _largest_component(mask)
    # On a grid of half pixels, pixel (x, y) is the odd point (2x + 1, 2y + 1) and its corners are
    # even points. Dilated by one point, OpenCV's contour of points runs along the pixel edges.
    height, width = component.shape
    grid = np.zeros((2 * height + 1, 2 * width + 1), dtype=np.uint8)
    grid[1::2, 1::2] = component
    grid = cv2.dilate(grid, np.ones((3, 3), dtype=np.uint8))
    rings, _ = cv2.findContours(grid, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    outline = rings[0].astype(np.float32) / 2
    solid = _polygon_to_mask(outline[:, 0].astype(np.float64), (height, width))
    while tolerance > 0.05:  # a lower tolerance drops only points that lie on a line anyway
        ring = cv2.approxPolyDP(outline, tolerance, closed=True)[:, 0].astype(np.float64)
        if (
            len(ring) >= 3
            and _iou(_polygon_to_mask(ring, (height, width)), solid) >= MIN_POLYGON_IOU
        ):
            return _canonical(ring + offset_xy)
        tolerance *= 0.85  # halving would sometimes leave three times as many points
    return _canonical(outline[:, 0] + offset_xy)


def _numbers(shape: Shape) -> npt.NDArray[np.float64]:
    # Before NumPy sees them: one long string among them would take its length for every number.
    if not set(map(type, shape.points)) <= {int, float}:
        raise BadRequestError(f"{shape.type} points must be a flat list of numbers")
    try:
        points = np.array(shape.points, dtype=np.float64)
    except OverflowError:
        points = np.array([np.inf])
    if not (np.abs(points) <= MAX_NUMBER).all():
        raise BadRequestError(f"{shape.type} points hold NaN, infinity or a number beyond 1e9")
    return points


def _vertices(points: npt.NDArray[np.float64], size_hw: SizeHW) -> npt.NDArray[np.float64]:
    if points.size < 6 or points.size % 2:
        raise BadRequestError(
            f"polygon has {points.size} numbers: expected x, y pairs, at least three"
        )
    vertices = points.reshape(-1, 2)
    crossings = np.abs(np.diff(np.clip(vertices[:, 1], 0, size_hw[0]))).sum()
    if crossings > MAX_CROSSINGS:
        raise TooLargeError(
            f"polygon crosses the rows of the frame some {crossings:.0f} times: at most "
            f"{MAX_CROSSINGS} are allowed; draw it with fewer points"
        )
    return vertices


def _polygon_to_mask(vertices: npt.NDArray[np.float64], size_hw: SizeHW) -> Mask:
    """Fill one ring `(N, 2)` by the even-odd rule at pixel centres.

    OpenCV and Pillow also set the pixels that the outline touches, half a pixel too much on every
    side. This function is exact, so that shapes do not grow on a round trip.
    """
    # Columns and rows are counted from the polygon's own box: small polygons take little time.
    low = np.clip(np.floor(vertices.min(axis=0)), 0, size_hw[::-1]).astype(np.int64)
    high = np.clip(np.ceil(vertices.max(axis=0)), 0, size_hw[::-1]).astype(np.int64)
    width, height = (high - low).tolist()
    start = vertices - low
    end = np.roll(start, -1, axis=0)
    top, bottom = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    first_row = np.clip(np.ceil(top - 0.5), 0, height).astype(np.int64)
    last_row = np.clip(np.ceil(bottom - 0.5), 0, height).astype(np.int64)
    row_count = last_row - first_row  # rows whose centre line this edge crosses
    edge = np.repeat(np.arange(len(start)), row_count)
    row = first_row[edge] + np.arange(edge.size)
    row -= np.repeat(np.cumsum(row_count) - row_count, row_count)
    (x0, y0), (x1, y1) = start[edge].T, end[edge].T
    crossing_x = x0 + (row + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
    # Every pixel from this column to the right flips between outside and inside.
    column = np.clip(np.ceil(crossing_x - 0.5), 0, width).astype(np.int64)
    flips = np.bincount(row * (width + 1) + column, minlength=height * (width + 1))
    flips = flips.reshape(height, width + 1)[:, :width].astype(np.uint8)
    mask = np.zeros(size_hw, dtype=np.bool_)
    mask[low[1] : high[1], low[0] : high[0]] = np.cumsum(flips, axis=1, dtype=np.uint8) % 2
    return mask


def _ellipse_to_mask(points: npt.NDArray[np.float64], size_hw: SizeHW) -> Mask:
    if points.size != 4:
        raise BadRequestError(f"ellipse has {points.size} numbers: expected cx, cy, right, top")
    center_x, center_y, right, top = points
    radius_x, radius_y = right - center_x, center_y - top
    if radius_x <= 0 or radius_y <= 0:
        raise BadRequestError("ellipse needs its right-most x and top-most y outside its centre")
    height, width = size_hw
    left, right = np.clip([center_x - radius_x, right], 0, width).astype(int).tolist()
    top, bottom = np.clip([top, center_y + radius_y], 0, height).astype(int).tolist()
    rows, columns = np.ogrid[top : min(bottom + 1, height), left : min(right + 1, width)]
    mask = np.zeros(size_hw, dtype=np.bool_)
    with np.errstate(over="ignore"):  # a tiny radius gives an infinite distance
        distance = ((columns + 0.5 - center_x) / radius_x) ** 2
        inside = distance + ((rows + 0.5 - center_y) / radius_y) ** 2 <= 1
    mask[top : min(bottom + 1, height), left : min(right + 1, width)] = inside
    return mask


def _mask_to_ellipse(mask: Mask, box: tuple[int, int, int, int]) -> list[float]:
    x1, y1, x2, y2 = box
    moments = cv2.moments(mask[y1:y2, x1:x2].astype(np.uint8), binaryImage=True)
    area = moments["m00"]
    # OpenCV treats a pixel as a point at its centre; as a square it adds 1/12 to the variance. A
    # filled ellipse's variance along an axis is a quarter of the squared radius.
    radius_x = 2 * (moments["mu20"] / area + 1 / 12) ** 0.5
    radius_y = 2 * (moments["mu02"] / area + 1 / 12) ** 0.5
    center_x = x1 + moments["m10"] / area + 0.5
    center_y = y1 + moments["m01"] / area + 0.5
    return [center_x, center_y, center_x + radius_x, center_y - radius_y]


def _largest_component(mask: Mask) -> tuple[Mask, npt.NDArray[np.float64]]:
    """Return the largest component, cropped to its box, and the box's top left corner in xy."""
    box = mask_to_box(mask)
    assert box is not None
    # OpenCV numbers components by blocks of 2 x 2 pixels: an even corner does not change the order.
    left, top = box[0] & ~1, box[1] & ~1
    cut = np.ascontiguousarray(mask[top : box[3], left : box[2]])
    _, labels, stats, _ = cv2.connectedComponentsWithStats(cut.view(np.uint8), connectivity=8)
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    x, y, width, height = stats[largest, : cv2.CC_STAT_AREA].tolist()
    component = labels[y : y + height, x : x + width] == largest
    return component, np.array([left + x, top + y], dtype=np.float64)


def _iou(mask: Mask, other: Mask) -> float:
    union = np.count_nonzero(mask | other)
    return np.count_nonzero(mask & other) / union if union else 1.0


def _canonical(ring: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    x, y = ring.T
    signed_area = np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)
    if signed_area < 0:  # y points down: positive is clockwise on the screen
        ring = ring[::-1]
    first = np.lexsort((ring[:, 1], ring.sum(axis=1)))[0]
    return np.roll(ring, -first, axis=0)
