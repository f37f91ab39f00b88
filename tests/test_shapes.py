from __future__ import annotations

import contextlib
import math
import tracemalloc
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pycocotools.mask
import pytest
from cvat_sdk.masks import decode_mask, encode_mask
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from errors import BadRequestError, TooLargeError
from shapes import (
    Mask,
    Shape,
    ShapeType,
    decode_cvat_rle,
    encode_cvat_rle,
    mask_to_box,
    mask_to_polygon,
    mask_to_shape,
    shape_to_mask,
)

SIZE_HW = (30, 40)
CHECK = settings(deadline=None, max_examples=150, derandomize=True)
SLOW_CHECK = settings(deadline=None, max_examples=60, derandomize=True)

some_masks = hnp.arrays(
    np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20)
).filter(np.any)
near_frame = st.floats(-60, 80, allow_nan=False)


def blob(seed: int, size_hw: tuple[int, int] = (120, 160)) -> Mask:
    """Return a solid, connected mask of seeded smooth noise."""
    rng = np.random.default_rng(seed)
    sigma = float(rng.uniform(2, 12))
    noise = cv2.GaussianBlur(rng.standard_normal(size_hw), (0, 0), sigma)
    rough = (noise > noise.std() * rng.uniform(-1, 1)).astype(np.uint8)
    rings, _ = cv2.findContours(rough, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    solid = np.zeros(size_hw, dtype=np.uint8)
    cv2.drawContours(solid, [max(rings, key=cv2.contourArea)], -1, 1, -1)
    return solid.astype(np.bool_)


def turned_ellipse(degrees: float, center_xy: tuple[int, int] = (80, 80)) -> Mask:
    """Return a solid ellipse, turned."""
    canvas = np.zeros((160, 160), dtype=np.uint8)
    cv2.ellipse(canvas, center_xy, (50, 25), degrees, 0, 360, 1, -1)
    return canvas.astype(np.bool_)


def shoelace(ring: npt.NDArray[np.float64]) -> float:
    """Return a ring's area, positive for clockwise on the screen."""
    x, y = ring.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2)


def iou(mask: Mask, other: Mask) -> float:
    """Return intersection over union."""
    return float(np.count_nonzero(mask & other) / np.count_nonzero(mask | other))


def drawn(shape_type: str, points: Any, size_hw: tuple[int, int] = SIZE_HW) -> Mask:
    """Return a shape's mask."""
    return shape_to_mask(Shape(ShapeType(shape_type), points), size_hw)


@given(some_masks)
@CHECK
def test_mask_encodes_as_cvat_does(mask: Mask) -> None:
    """Every number equals that of CVAT's own encoder, and CVAT's decoder reads it."""
    points = encode_cvat_rle(mask)

    assert points == encode_mask(mask)
    height, width = mask.shape
    np.testing.assert_array_equal(decode_mask(points, image_width=width, image_height=height), mask)


@given(some_masks)
@CHECK
def test_mask_of_cvat_decodes(mask: Mask) -> None:
    """What CVAT's encoder wrote gives the mask again, also as floats."""
    points = encode_mask(mask)

    np.testing.assert_array_equal(decode_cvat_rle(points, mask.shape), mask)
    np.testing.assert_array_equal(drawn("mask", list(map(float, points)), mask.shape), mask)


@given(some_masks, st.data())
@CHECK
def test_mask_in_a_loose_box_decodes(mask: Mask, data: st.DataObject) -> None:
    """CVAT may crop to a box larger than the mask; only the pixels count."""
    height, width = mask.shape
    tight = mask_to_box(mask)
    assert tight is not None
    x1, y1 = data.draw(st.integers(0, tight[0])), data.draw(st.integers(0, tight[1]))
    x2, y2 = data.draw(st.integers(tight[2], width)), data.draw(st.integers(tight[3], height))

    np.testing.assert_array_equal(
        decode_cvat_rle(encode_mask(mask, [x1, y1, x2, y2]), mask.shape), mask
    )


def test_example_of_the_docstring_holds() -> None:
    """Two pixels in the second row."""
    mask = np.zeros((3, 4), dtype=np.bool_)
    mask[1, 1:3] = True

    assert encode_cvat_rle(mask) == [0, 2, 1, 1, 2, 1]
    assert mask_to_box(mask) == (1, 1, 3, 2)


@given(some_masks)
@CHECK
def test_area_and_box_equal_those_of_pycocotools(mask: Mask) -> None:
    """The foreground runs add up to the area of the coco_rle, and the boxes agree."""
    coco_rle = pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    x, y, width, height = pycocotools.mask.toBbox(coco_rle).tolist()

    assert sum(encode_cvat_rle(mask)[:-4][1::2]) == pycocotools.mask.area(coco_rle)
    assert mask_to_box(mask) == (x, y, x + width, y + height)


@given(st.integers(0, 10**9))
@SLOW_CHECK
def test_polygon_of_a_solid_mask_covers_it(seed: int) -> None:
    """Above 200 pixels IoU with the mask is at least 0.98, with few points."""
    mask = blob(seed)
    ring = mask_to_polygon(mask)
    again = drawn("polygon", ring.ravel().tolist(), mask.shape)
    outline, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)

    assert np.count_nonzero(mask) < 200 or iou(again, mask) >= 0.98
    assert 3 <= len(ring) <= max(8, len(outline[0]))
    assert shoelace(ring) == pytest.approx(np.count_nonzero(mask), rel=0.05, abs=6)
    assert ring.min() >= 0
    assert (ring.max(axis=0) <= (160, 120)).all()


@given(st.integers(0, 10**9))
@SLOW_CHECK
def test_polygon_area_agrees_with_pycocotools(seed: int) -> None:
    """COCO's own reading of the ring has the mask's area, within its half pixel of outline."""
    mask = blob(seed)
    ring = mask_to_polygon(mask)
    (coco_rle,) = pycocotools.mask.frPyObjects([ring.ravel().tolist()], *mask.shape)
    length = float(np.hypot(*(ring - np.roll(ring, -1, axis=0)).T).sum())

    assert abs(float(pycocotools.mask.area(coco_rle)) - np.count_nonzero(mask)) <= length


@given(some_masks)
@CHECK
def test_exact_polygon_of_any_mask_encloses_its_largest_component(mask: Mask) -> None:
    """Without tolerance the ring fills to the component without its holes, pixel by pixel."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    component = np.pad((labels == largest).astype(np.uint8), 1)
    outside = component.copy()
    cv2.floodFill(outside, None, (0, 0), 2)  # 4-connected: a diagonal gap is closed
    solid = (outside != 2)[1:-1, 1:-1]
    ring = mask_to_polygon(mask, tolerance=0)

    np.testing.assert_array_equal(drawn("polygon", ring.ravel().tolist(), mask.shape), solid)


@pytest.mark.parametrize(
    ("x1", "y1", "x2", "y2"), [(0, 0, 40, 30), (5, 7, 6, 8), (3, 4, 20, 5), (39, 2, 40, 30)]
)
def test_polygon_runs_along_pixel_edges(x1: int, y1: int, x2: int, y2: int) -> None:
    """A block of pixels becomes its four corners, far edges excluded, clockwise from top left."""
    mask = np.zeros(SIZE_HW, dtype=np.bool_)
    mask[y1:y2, x1:x2] = True

    assert mask_to_polygon(mask).tolist() == [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]


def test_polygon_is_one_ring_around_the_largest_component() -> None:
    """Smaller pieces and holes are left out: CVAT's polygon is one ring."""
    mask = np.zeros(SIZE_HW, dtype=np.bool_)
    mask[2:6, 2:6] = True
    mask[10:25, 10:30] = True
    mask[15:17, 15:17] = False

    assert mask_to_polygon(mask).tolist() == [[10, 10], [30, 10], [30, 25], [10, 25]]


def test_polygon_moves_with_the_object() -> None:
    """A moved mask gives the same ring, moved: same start, direction and number of points."""
    ring = mask_to_polygon(turned_ellipse(20, (60, 60)))
    moved = mask_to_polygon(turned_ellipse(20, (83, 71)))

    np.testing.assert_array_equal(moved, np.add(ring, (23, 11)))


def test_polygon_starts_top_left_and_runs_clockwise_while_the_object_turns() -> None:
    """From frame to frame the start moves by a little only, and the direction never flips."""
    rings = [mask_to_polygon(turned_ellipse(degrees)) for degrees in range(0, 180, 2)]
    starts = np.array([ring[0] for ring in rings])
    jumps = np.hypot(*np.diff(starts, axis=0).T)

    assert all(shoelace(ring) > 0 for ring in rings)
    assert all(ring.sum(axis=1).argmin() == 0 for ring in rings)
    assert jumps.max() < 25  # half of the longer radius
    assert max(map(len, rings)) < 40


def test_larger_tolerance_gives_fewer_points() -> None:
    """The tolerance is the knob between points and closeness, down to IoU 0.98."""
    mask = turned_ellipse(20)
    counts = [len(mask_to_polygon(mask, tolerance=value)) for value in (0, 0.5, 1, 100)]

    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) >= 3
    coarse = mask_to_polygon(mask, tolerance=100).ravel().tolist()
    assert iou(drawn("polygon", coarse, mask.shape), mask) >= 0.98


@given(hnp.arrays(np.float64, st.tuples(st.integers(3, 9), st.just(2)), elements=near_frame))
@CHECK
def test_polygon_holds_the_pixels_whose_centres_are_inside(ring: npt.NDArray[np.float64]) -> None:
    """Counting crossings for every pixel on its own gives the same mask, also off the frame."""
    expected = np.zeros(SIZE_HW, dtype=np.bool_)
    x, y = np.arange(SIZE_HW[1]) + 0.5, np.arange(SIZE_HW[0]) + 0.5
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        for row in np.flatnonzero((y >= y0) != (y >= y1)):
            expected[row] ^= x >= x0 + (y[row] - y0) * ((x1 - x0) / (y1 - y0))

    if expected.any():
        mask = drawn("polygon", ring.ravel().tolist())
        # A centre exactly on an edge may fall to either side by the last bit.
        assert np.count_nonzero(mask ^ expected) <= np.count_nonzero(ring % 1 == 0.5)
    else:
        with pytest.raises(BadRequestError, match="covers no pixel"):
            drawn("polygon", ring.ravel().tolist())


@pytest.mark.parametrize("shape_type", ["polygon", "rectangle", "ellipse"])
@given(quarters=st.lists(st.integers(-240, 320), min_size=6, max_size=6))
@CHECK
def test_shape_over_the_border_is_cut_off(shape_type: str, quarters: list[int]) -> None:
    """Annotators drag past the edge: the mask equals that part of a larger frame's mask."""
    points = [value / 4 for value in quarters]
    if shape_type == "polygon":
        assume(abs(shoelace(np.reshape(points, (3, 2)))) > 1)
    else:
        points = points[:4]
    if shape_type == "ellipse":
        points[2:] = [points[0] + 1 + abs(points[2]), points[1] - 1 - abs(points[3])]
    larger = np.zeros((430, 440), dtype=np.bool_)
    with contextlib.suppress(BadRequestError):
        larger = drawn(shape_type, [value + 200 for value in points], larger.shape)
    expected = larger[200:230, 200:240]

    if expected.any():
        np.testing.assert_array_equal(drawn(shape_type, points), expected)
    else:
        with pytest.raises(BadRequestError, match=r"covers no pixel|no area"):
            drawn(shape_type, points)


@given(st.integers(0, 39), st.integers(0, 29), st.integers(1, 40), st.integers(1, 30))
@CHECK
def test_rectangle_comes_back(x1: int, y1: int, width: int, height: int) -> None:
    """Whole-pixel boxes round-trip exactly; the far edge is excluded."""
    x2, y2 = min(x1 + width, 40), min(y1 + height, 30)
    mask = drawn("rectangle", [x1, y1, x2, y2])
    expected = np.zeros(SIZE_HW, dtype=np.bool_)
    expected[y1:y2, x1:x2] = True

    np.testing.assert_array_equal(mask, expected)
    assert mask_to_shape(mask, ShapeType.RECTANGLE) == Shape(
        ShapeType.RECTANGLE, [float(x1), float(y1), float(x2), float(y2)]
    )


def test_rectangle_corners_may_come_in_any_order() -> None:
    """A box drawn from the bottom right is the same box."""
    np.testing.assert_array_equal(
        drawn("rectangle", [30, 20, 10, 5]), drawn("rectangle", [10, 5, 30, 20])
    )


@given(st.floats(70, 90), st.floats(50, 70), st.floats(4, 60), st.floats(4, 45))
@CHECK
def test_ellipse_comes_back(x: float, y: float, radius_x: float, radius_y: float) -> None:
    """Centre and radii of a drawn ellipse are recovered within 0.7 pixels.

    Of a thin ellipse the longer radius is less exact, in proportion to the ratio of the radii.
    """
    points = [x, y, x + radius_x, y - radius_y]
    mask = drawn("ellipse", points, (120, 160))
    shape = mask_to_shape(mask, ShapeType.ELLIPSE)

    assert shape is not None
    ratio = max(radius_x / radius_y, radius_y / radius_x)
    assert shape.points == pytest.approx(points, abs=max(0.7, 0.2 * ratio))
    assert np.count_nonzero(mask) == pytest.approx(math.pi * radius_x * radius_y, rel=0.1)


@pytest.mark.parametrize("shape_type", list(ShapeType))
def test_empty_mask_has_no_shape(shape_type: ShapeType) -> None:
    """None stands for an object that is not in the frame."""
    assert mask_to_shape(np.zeros(SIZE_HW, dtype=np.bool_), shape_type) is None


@pytest.mark.parametrize("shape_type", list(ShapeType))
@given(mask=some_masks)
@CHECK
def test_every_mask_has_a_shape_that_can_be_drawn_again(shape_type: ShapeType, mask: Mask) -> None:
    """Plain Python numbers, finite, and accepted as a prompt: an answer can start a new track."""
    shape = mask_to_shape(mask, shape_type)

    assert shape is not None
    assert {type(value) for value in shape.points} <= {int, float}
    if shape_type is not ShapeType.ELLIPSE:  # that of two far pixels may cover neither's centre
        assert shape_to_mask(shape, mask.shape).any()
    if shape_type is ShapeType.MASK:
        np.testing.assert_array_equal(shape_to_mask(shape, mask.shape), mask)


FLAT = "points must be a flat list of numbers"
NUMBERS = "points hold NaN, infinity or a number beyond 1e9"
WRONG_FOR_ALL = [
    (["1"] * 6, FLAT),
    ([None] * 6, FLAT),
    ([True] * 6, FLAT),
    ([1, 2, 3, 4, 5, [6]], FLAT),
    ([[1, 2], [3, 4], [5, 6]], FLAT),
    ([{}] * 6, FLAT),
    ([1, 2, 3, 4, 5, 10**400], f"({FLAT}|{NUMBERS})"),
    ([1.0, 2, 3, 4, 5, math.nan], NUMBERS),
    ([1.0, 2, 3, 4, 5, math.inf], NUMBERS),
    ([1.0, 2, 3, 4, 5, -1e308], NUMBERS),
    ([1.0, 2, 3, 4, 5, 2**63], NUMBERS),
    ([1, 2, 3, 4, 5, -(2**63)], NUMBERS),
]
WRONG_FOR_ONE = [
    ("mask", [], "mask points must be a flat|mask has 0 numbers: expected runs and x1, y1"),
    ("mask", [0, 0, 1, 1], "mask has 4 numbers: expected runs and x1, y1, x2, y2"),
    ("mask", [0, 4.5, 0, 0, 1, 1], "number that is negative or not whole"),
    ("mask", [-4, 8, 0, 0, 1, 1], "number that is negative or not whole"),
    ("mask", [0, 4, -1, 0, 0, 1], "number that is negative or not whole"),
    ("mask", [0, 3, 0, 0, 1, 1], "mask runs add up to 3, its box has 4 pixels"),
    ("mask", [0, 5, 0, 0, 1, 1], "mask runs add up to 5, its box has 4 pixels"),
    ("mask", [1e9, 1e9, 0, 0, 1, 1], "mask runs add up to 2000000000, its box has 4"),
    ("mask", [0, 2, 39, 0, 40, 0], "mask box 39, 0, 40, 0 does not lie in the 40 x 30 frame"),
    ("mask", [0, 2, 0, 29, 0, 30], "mask box 0, 29, 0, 30 does not lie in the 40 x 30 frame"),
    ("mask", [0, 2, 5, 0, 4, 0], "does not lie in"),
    ("mask", [0, 2, 0, 5, 0, 4], "does not lie in"),
    ("mask", [4, 0, 0, 1, 1], "mask covers no pixel of the 40 x 30 frame: draw it on the object"),
    ("polygon", [1, 1, 9, 9], "polygon has 4 numbers: expected x, y pairs, at least three"),
    ("polygon", [1, 1, 9, 9, 3, 8, 1], "polygon has 7 numbers: expected x, y pairs"),
    ("polygon", [1, 1, 9, 9, 5, 5], "polygon covers no pixel"),
    ("polygon", [-9, -9, -1, -9, -5, -1], "polygon covers no pixel"),
    ("polygon", [5.1, 5.1, 5.2, 5.1, 5.2, 5.2], "polygon covers no pixel"),
    ("rectangle", [1, 2, 3], "rectangle has 3 numbers: expected x1, y1, x2, y2"),
    ("rectangle", [1, 2, 3, 4, 5], "rectangle has 5 numbers"),
    ("rectangle", [5, 5, 5, 9], "rectangle has no area in the 40 x 30 frame"),
    ("rectangle", [41, 0, 50, 9], "rectangle has no area"),
    ("rectangle", [0, -9, 9, 0], "rectangle has no area"),
    ("ellipse", [1, 2, 3], "ellipse has 3 numbers: expected cx, cy, right, top"),
    ("ellipse", [9, 9, 9, 5], "ellipse needs its right-most x and top-most y outside"),
    ("ellipse", [9, 9, 12, 10], "ellipse needs its right-most x and top-most y outside"),
    ("ellipse", [9, 9, 9.1, 8.9], "ellipse covers no pixel"),
    ("ellipse", [0, 0, 5e-324, -5e-324], "ellipse covers no pixel"),
    ("ellipse", [-20, 9, -12, 5], "ellipse covers no pixel"),
]


@pytest.mark.parametrize("shape_type", list(ShapeType))
@pytest.mark.parametrize(("points", "reason"), WRONG_FOR_ALL)
def test_points_that_are_no_numbers_are_refused(
    shape_type: ShapeType, points: list[Any], reason: str
) -> None:
    """Other JSON values in place of numbers are rejected before NumPy sees them."""
    with pytest.raises(BadRequestError, match=f"^{shape_type} {reason}"):
        drawn(shape_type, points)


@pytest.mark.parametrize(("shape_type", "points", "reason"), WRONG_FOR_ONE)
def test_malformed_shape_is_refused(shape_type: str, points: list[float], reason: str) -> None:
    """The message has the expected and the actual value."""
    with pytest.raises(BadRequestError, match=reason):
        drawn(shape_type, points)


def test_polygon_that_would_fill_the_memory_is_refused() -> None:
    """A zigzag over a tall frame is small as JSON and huge to fill."""
    zigzag = [value for index in range(600) for value in (0.5, 16_384.0 * (index % 2))]

    with pytest.raises(TooLargeError, match="crosses the rows of the frame some 98"):
        drawn(ShapeType.POLYGON, zigzag, (16_384, 4))


@pytest.mark.parametrize("value", ["a" * 10_000, True, None, [1]])
def test_other_value_among_many_numbers_is_rejected_by_its_type(value: object) -> None:
    """NumPy would reserve its size for each of two hundred thousand numbers."""
    tracemalloc.start()
    with pytest.raises(BadRequestError, match="flat list of numbers"):
        drawn(ShapeType.MASK, [*[1] * 200_000, value])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 10_000_000
