"""Shapes that are too small at the model's input size are refused, and no others."""

from __future__ import annotations

import re
from typing import NoReturn

import numpy as np
import pytest
import torch
from torch.nn import functional

from errors import BadRequestError
from model_loader import load_model
from object_requests import Start
from settings import Settings
from shapes import Shape, ShapeType, SizeHW, shape_to_mask
from state_store import MemoryStateStore
from tracker import Frame, Tracker


class StartedComputingError(Exception):
    """All items were accepted, and the image is read."""


class Screen:
    """A tracker with the bundled model, asked what it accepts on blank frames.

    Args:
        image_size: The model's input size.
    """

    def __init__(self, image_size: int) -> None:
        self._tracker = Tracker(
            model=load_model(Settings(model_id="micro", device="cpu", image_size=image_size)),
            store=MemoryStateStore(state_ttl_s=1000, retry_window_s=100),
            memory_cache_bytes=1 << 26,
            polygon_tolerance=1.0,
            request_limit_s=100,
        )

    def refusal(self, size_hw: SizeHW, *shapes: Shape) -> str | None:
        """Return the reason why shapes cannot be started, or None if they are accepted."""
        frame = Frame("blank", size_hw, self._compute)
        try:
            self._tracker.run(frame, [Start(shape) for shape in shapes])
        except StartedComputingError:
            return None
        except BadRequestError as err:
            return str(err)
        return pytest.fail("the image was not read")

    @staticmethod
    def _compute() -> NoReturn:
        raise StartedComputingError


@pytest.fixture(scope="module")
def screen() -> Screen:
    """The smallest input size that the bundled model is made for."""
    return Screen(256)


def drawn(x1: float, y1: float, x2: float, y2: float) -> dict[ShapeType, Shape]:
    """Return a mask, a polygon, an ellipse and a rectangle of the same box."""
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    width, height = int(x2 - x1), int(y2 - y1)
    points: dict[ShapeType, list[float]] = {
        ShapeType.MASK: [0, width * height, int(x1), int(y1), int(x2) - 1, int(y2) - 1],
        ShapeType.POLYGON: [x1, y1, x2, y1, x2, y2, x1, y2],
        ShapeType.ELLIPSE: [x, y, x2, y1],
        ShapeType.RECTANGLE: [x1, y1, x2, y2],
    }
    return {kind: Shape(kind, numbers) for kind, numbers in points.items()}


FULL_HD: SizeHW = (1080, 1920)
UHD: SizeHW = (2160, 3840)
MASKS = [ShapeType.MASK, ShapeType.POLYGON, ShapeType.ELLIPSE]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("size_hw", "box"),
    [
        pytest.param(UHD, (1800, 600, 1804, 1600), id="4 px wide on 4K"),
        pytest.param(FULL_HD, (900, 300, 902, 800), id="2 px wide on 1080p"),
        pytest.param(FULL_HD, (300, 500, 1500, 501), id="1 px high on 1080p"),
        pytest.param(FULL_HD, (900, 500, 902, 502), id="square of 2 px on 1080p"),
    ],
)
def test_shape_that_leaves_no_pixel_at_the_input_size_is_refused(
    screen: Screen, size_hw: SizeHW, box: tuple[float, float, float, float], kind: ShapeType
) -> None:
    """SAM 2 takes such a prompt for an absent object: it would be lost on all frames."""
    good = drawn(200, 200, 500, 500)[kind]
    reason = screen.refusal(size_hw, good, drawn(*box)[kind])

    assert reason is not None
    expected = rf"shapes\[1\]: {kind} is too small for the model, whose input has 256 x 256 pixels"
    expected += r": it covers at most ([1-4]?\d) % of any of them, 50 % is needed; set a larger "
    expected += r"SAM2_IMAGE_SIZE, or draw a rectangle around the object"
    assert re.fullmatch(expected, reason)


@pytest.mark.parametrize("kind", MASKS)
def test_refusal_tells_how_far_a_shape_is_from_large_enough(
    screen: Screen, kind: ShapeType
) -> None:
    """Poles of up to 9 columns in the middle of the 15 that one pixel of the input has."""
    reasons = [
        screen.refusal(UHD, drawn(1807 - width // 2, 600, 1808 + width // 2, 1600)[kind])
        for width in (1, 3, 5, 7, 9)
    ]
    shares = [reason and re.findall(r"at most (\d+) %", reason) for reason in reasons]

    assert shares == [["6"], ["19"], ["30"], ["41"], None]


@pytest.mark.parametrize("size_hw", [FULL_HD, UHD, (500, 8000), (100, 100), (256, 256)])
def test_shapes_are_accepted_exactly_when_the_predictor_has_a_pixel_left(
    screen: Screen, size_hw: SizeHW
) -> None:
    """One pixel at the input size is enough, wherever it lies."""
    rng = np.random.default_rng(0)
    accepted = []
    for _ in range(60):
        width, height = np.ceil(rng.uniform(0.1, 1.6, 2) * size_hw[::-1] / 256).astype(int)
        x, y = rng.integers(0, np.array(size_hw[::-1]) - (width, height) + 1)
        kind = MASKS[rng.integers(3)]
        shape = drawn(int(x), int(y), int(x + width), int(y + height))[kind]
        mask = torch.from_numpy(shape_to_mask(shape, size_hw))[None, None].float()
        # SAM2VideoPredictor.add_new_mask
        seen = functional.interpolate(
            mask, (256, 256), mode="bilinear", align_corners=False, antialias=True
        )

        accepted.append(screen.refusal(size_hw, shape) is None)
        assert accepted[-1] == bool((seen >= 0.5).any())
    assert any(accepted)
    assert not all(accepted) or max(size_hw) <= 256  # small frames lose nothing


@pytest.mark.parametrize(
    ("size_hw", "box"),
    [
        pytest.param(UHD, (1800, 600, 1804, 608), id="4 x 8 px on 4K"),
        pytest.param(FULL_HD, (900, 500, 902, 502), id="2 px on 1080p"),
        pytest.param(FULL_HD, (900, 500, 907.4, 504.2), id="almost one pixel of the input"),
        pytest.param((100, 100), (50, 50, 50.3, 50.3), id="within a pixel of a small frame"),
    ],
)
def test_rectangle_within_one_pixel_of_the_input_is_refused(
    screen: Screen, size_hw: SizeHW, box: tuple[float, float, float, float]
) -> None:
    """Its corners are one point to SAM 2."""
    good = drawn(20, 20, 90, 90)[ShapeType.RECTANGLE]
    reason = screen.refusal(size_hw, good, drawn(*box)[ShapeType.RECTANGLE])

    assert reason is not None
    expected = r"shapes\[1\]: rectangle is too small for the model, whose input has 256 x 256 "
    expected += r"pixels: it has 0\.\d+ x 0\.\d+ of them, one side must have 1; set a larger "
    expected += r"SAM2_IMAGE_SIZE, or draw a larger rectangle"
    assert re.fullmatch(expected, reason)


@pytest.mark.parametrize(
    ("size_hw", "box"),
    [
        pytest.param(UHD, (1800, 600, 1804, 1600), id="4 px wide on 4K"),
        pytest.param(FULL_HD, (300, 500, 1500, 500.5), id="half a px high on 1080p"),
        pytest.param(FULL_HD, (900, 500, 907.5, 501), id="one pixel of the input wide"),
        pytest.param(FULL_HD, (900, 500, 901, 504.21875), id="one pixel of the input high"),
    ],
)
def test_rectangle_thinner_than_a_pixel_of_the_input_is_accepted(
    screen: Screen, size_hw: SizeHW, box: tuple[float, float, float, float]
) -> None:
    """SAM 2 makes masks from such boxes, unlike from masks of them."""
    assert screen.refusal(size_hw, drawn(*box)[ShapeType.RECTANGLE]) is None


def test_larger_input_size_accepts_what_a_smaller_one_refuses() -> None:
    """The advice in the refusal helps."""
    pole = drawn(1800, 600, 1804, 1600)[ShapeType.MASK]
    square = drawn(1800, 600, 1804, 604)[ShapeType.RECTANGLE]

    assert [Screen(512).refusal(UHD, shape) is None for shape in (pole, square)] == [False, False]
    assert [Screen(1024).refusal(UHD, shape) is None for shape in (pole, square)] == [True, True]
