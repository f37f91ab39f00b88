"""Parse CVAT's interactor requests and format their answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from errors import BadRequestError
from images import read_image_size
from protocol import image_bytes, json_object, list_field
from settings import Limits, MaskForm
from shapes import (
    Box,
    Mask,
    Shape,
    ShapeType,
    SizeHW,
    encode_cvat_rle,
    mask_to_box,
    rectangle_to_box,
)

Point = tuple[float, float]  # xy in the frame's pixels

# CVAT's interface rounds a click to check that it lies in the frame, but sends it unrounded.
CLICK_ROUNDING = 0.5  # pixels
MAX_POINTS = 256  # far more than anybody clicks; each costs the mask decoder time
EXTREME_POINTS = 4
# Largest distance of an extreme point from its side of the box, relative to the box's width or
# height.
EXTREME_TOLERANCE = 0.03


@dataclass(frozen=True)
class Prompt:
    """What the annotator clicked and drew for one object, in pixels of the frame.

    Attributes:
        positive: Points on the object, in the order of the clicks.
        negative: Points not on the object, in the order of the clicks.
        box: Box XYXY around the object, or None.
    """

    positive: tuple[Point, ...] = ()
    negative: tuple[Point, ...] = ()
    box: Box | None = None

    def __len__(self) -> int:
        return len(self.positive) + len(self.negative)

    def continues(self, earlier: Prompt) -> bool:
        """Tell whether this is an earlier prompt with further clicks."""
        return (
            len(self) > len(earlier)
            and self.box == earlier.box
            and self.positive[: len(earlier.positive)] == earlier.positive
            and self.negative[: len(earlier.negative)] == earlier.negative
        )


@dataclass(frozen=True)
class InteractorRequest:
    """One interactor call.

    Attributes:
        image: The frame's encoded bytes.
        size_hw: The frame's height and width.
        prompt: What to segment.
    """

    image: bytes
    size_hw: SizeHW
    prompt: Prompt


def parse_interactor_request(
    body: object, limits: Limits, *, extreme_points: bool
) -> InteractorRequest:
    """Read the body of an interactor call.

    Args:
        body: A dict as Nuclio decodes it, or the bytes of the JSON under another content type.
        limits: Upper limits of one request.
        extreme_points: Whether points that lie like extreme points mean a box.

    Raises:
        BadRequestError: Something is missing or malformed; the message says where.
        NotAnImageError: The image cannot be decoded.
        TooLargeError: A limit of the image is exceeded.
    """
    fields = json_object(body, limits, "image, pos_points, neg_points and obj_bbox")
    image = image_bytes(fields, limits)
    size_hw = read_image_size(image, limits)
    prompt = parse_prompt(fields, size_hw, extreme_points=extreme_points)
    return InteractorRequest(image, size_hw, prompt)


def parse_prompt(fields: dict[str, Any], size_hw: SizeHW, *, extreme_points: bool) -> Prompt:
    """Read `pos_points`, `neg_points` and `obj_bbox`.

    Args:
        fields: The request; each field is a list, and missing or None counts as empty.
        size_hw: Height and width of the frame.
        extreme_points: Whether points that lie like extreme points mean a box.

    Raises:
        BadRequestError: A field is malformed, a point lies outside the frame, or there is neither a
            box nor a positive point.
    """
    positive, negative = (_points(fields, name, size_hw) for name in ("pos_points", "neg_points"))
    box = _box(fields, size_hw)
    if not positive and box is None:
        raise BadRequestError(
            "nothing to segment: expected a box, or a positive point; a negative point only tells "
            "what to leave out"
        )
    if box is None and extreme_points:
        box = extreme_box(positive, negative)
    return Prompt(positive, negative, box)


def extreme_box(positive: Sequence[Point], negative: Sequence[Point] = ()) -> Box | None:
    """Return the box that extreme points mean, clicked as annotators click them for DEXTR.

    Points count as extreme points if each of the first four positive points lies on another side of
    the box around all positive points, within `EXTREME_TOLERANCE`, and if the negative points,
    which correct the mask, lie inside the box.

    Args:
        positive: Points on the object, in the order of the clicks.
        negative: Points not on the object.

    Returns:
        The box XYXY, or None if the points are not extreme points.
    """
    if len(positive) < EXTREME_POINTS:
        return None
    points = np.array(positive)
    low, high = points.min(axis=0), points.max(axis=0)
    first = points[:EXTREME_POINTS]
    tolerance = EXTREME_TOLERANCE * (high - low)
    on_side = np.hstack([first - low <= tolerance, high - first <= tolerance])  # points by sides
    one_each = any(
        all(on_side[point, side] for side, point in enumerate(order))
        for order in permutations(range(EXTREME_POINTS))
    )
    inside = all((low <= point).all() and (point <= high).all() for point in negative)
    if not (one_each and inside and (low < high).all()):
        return None
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def format_interactor_answer(mask: Mask, confidence: float, form: MaskForm) -> str:
    """Write the answer to an interactor call.

    Args:
        mask: `(H, W)`, at the frame's size.
        confidence: SAM 2's predicted IoU of the mask with the object, 0 to 1.
        form: Form of the field `mask`, which CVAT up to 2.54 needs beside or instead of `shapes`.

    Returns:
        JSON: `shapes` with one mask, or no shape if the mask is empty, and `mask`.
    """
    box = mask_to_box(mask)
    fields: dict[str, Any] = {"shapes": []}
    if box is not None:
        value = f"{confidence:.2f}"
        shape = {"type": str(ShapeType.MASK), "points": encode_cvat_rle(mask)}
        fields["shapes"] = [shape | {"attributes": [{"spec_id": 0, "value": value}]}]
        if form is MaskForm.CROPPED:
            x1, y1, x2, y2 = box
            fields["bounds"] = [x1, y1, x2 - 1, y2 - 1]
            mask = mask[y1:y2, x1:x2]
    text = json.dumps(fields, separators=(",", ":"))
    return text if form is MaskForm.NONE else f'{{"mask":{_json_rows(mask)},{text[1:]}'


def _json_rows(mask: Mask) -> str:
    """Return a mask `(h, w)` as a JSON list of lists of 0 and 1.

    NumPy writes the text: for a million numbers the JSON encoder takes longer than SAM 2 for a
    click.
    """
    height, width = mask.shape
    rows = np.full((height, 2 * width + 2), ord(","), dtype=np.uint8)
    rows[:, 0] = ord("[")
    rows[:, 1:-1:2] = mask + np.uint8(ord("0"))
    rows[:, -2] = ord("]")
    return f"[{rows.tobytes()[:-1].decode()}]"


def _points(fields: dict[str, Any], name: str, size_hw: SizeHW) -> tuple[Point, ...]:
    values = list_field(fields, name)
    if len(values) > MAX_POINTS:
        raise BadRequestError(f"{name} has {len(values)} points: at most {MAX_POINTS} are allowed")
    height, width = size_hw
    points = []
    for index, value in enumerate(values):
        pair = isinstance(value, list) and len(value) == 2
        if not pair or not set(map(type, value)) <= {int, float}:
            raise BadRequestError(f"{name}[{index}] must be two numbers, x and y")
        x, y = value
        edge = CLICK_ROUNDING
        if not (-edge <= x <= width + edge and -edge <= y <= height + edge):  # rejects NaN too
            raise BadRequestError(
                f"{name}[{index}] at {x!r:.20}, {y!r:.20} is outside the {width} x {height} frame"
            )
        points.append(
            (min(max(float(x), 0.0), float(width)), min(max(float(y), 0.0), float(height)))
        )
    return tuple(points)


def _box(fields: dict[str, Any], size_hw: SizeHW) -> Box | None:
    corners = list_field(fields, "obj_bbox")
    if not corners:
        return None
    if all(isinstance(corner, list) for corner in corners):
        corners = [number for corner in corners for number in corner]
    try:
        return rectangle_to_box(Shape(ShapeType.RECTANGLE, corners), size_hw)
    except BadRequestError as err:
        raise BadRequestError(f"obj_bbox: {err}") from None
