"""Parse CVAT's tracker requests and format their answers."""

from __future__ import annotations

import base64
import binascii
import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from errors import BadRequestError, TooLargeError, TrackerError
from object_requests import Continue, Start
from settings import Limits
from shapes import Shape, ShapeType
from state_token import StateToken


@dataclass(frozen=True)
class TrackerRequest:
    """One tracker call.

    Attributes:
        image: The frame's encoded bytes.
        items: What to do, one item per object.
        bare: For each item whether its shape is a bare list of points, as CVAT before 2.40 sends
            rectangles and expects them back.
    """

    image: bytes
    items: tuple[Start | Continue, ...]
    bare: tuple[bool, ...]


def parse_tracker_request(body: object, limits: Limits) -> TrackerRequest:
    """Read the body of a tracker call.

    Args:
        body: A dict as Nuclio decodes it, or the bytes of the JSON under another content type.
        limits: Upper limits of one request.

    Raises:
        BadRequestError: Something is missing or malformed; the message says where.
        TooLargeError: A limit is exceeded.
    """
    fields = json_object(body, limits, "image, shapes and states")
    shapes, states = list_field(fields, "shapes"), list_field(fields, "states")
    count = max(len(shapes), len(states))
    if count == 0:
        raise BadRequestError("nothing to track: shapes and states are both empty")
    if count > limits.objects:
        raise TooLargeError(f"{count} objects in one request: at most {limits.objects} are allowed")
    image = image_bytes(fields, limits)
    items: list[Start | Continue] = []
    bare = []
    for index in range(count):
        shape = shapes[index] if index < len(shapes) else None
        state = states[index] if index < len(states) else None
        bare.append(isinstance(shape, list))
        if state is None and shape is None:
            raise BadRequestError(f"shapes[{index}] and states[{index}] are both missing")
        field = f"shapes[{index}]" if state is None else f"states[{index}]"
        try:
            if state is None:
                items.append(Start(parse_shape(shape, limits)))
            else:
                items.append(Continue(StateToken.parse(state)))
        except TrackerError as err:
            raise type(err)(f"{field}: {err}") from None
    return TrackerRequest(image, tuple(items), tuple(bare))


def format_tracker_answer(
    request: TrackerRequest, answers: Sequence[tuple[StateToken, Shape | None, bool]]
) -> dict[str, Any]:
    """Return the answer to a tracker call.

    Args:
        request: The request.
        answers: Per item its new state, its shape, and whether the object is lost. The shape of a
            lost rectangle is its last box; `outside` marks it for callers that read it.
    """
    shapes: list[object] = []
    for (_, shape, lost), bare in zip(answers, request.bare, strict=True):
        if shape is None:
            shapes.append(None)
        elif bare:
            shapes.append(list(shape.points))
        else:
            outside = {"outside": True} if lost else {}
            shapes.append({"type": str(shape.type), "points": list(shape.points)} | outside)
    return {"shapes": shapes, "states": [str(token) for token, _, _ in answers]}


def parse_shape(value: object, limits: Limits) -> Shape:
    """Read one shape, `{"type", "points"}` or a rectangle's bare points.

    The points themselves are checked where the shape is drawn, see `shapes.shape_to_mask`.

    Raises:
        BadRequestError: The type is unknown, or the points are no list.
        TooLargeError: There are more points than allowed.
    """
    if isinstance(value, list):
        value = {"type": "rectangle", "points": value}
    if not isinstance(value, dict):
        raise BadRequestError(f"a shape must be an object, not {type(value).__name__}")
    name, points = value.get("type"), value.get("points")
    if not isinstance(name, str) or name not in set(ShapeType):
        # reprlib shortens what was sent
        known = ", ".join(ShapeType)
        raise BadRequestError(f"type must be one of {known}, not {reprlib.repr(name)}")
    if not isinstance(points, list):
        raise BadRequestError("points must be a flat list of numbers")
    shape_type = ShapeType(name)
    most = limits.mask_runs + 4 if shape_type is ShapeType.MASK else 2 * limits.polygon_points
    if len(points) > most:
        raise TooLargeError(f"{shape_type} has {len(points)} numbers: at most {most} are allowed")
    return Shape(shape_type, points)


def json_object(body: object, limits: Limits, fields: str) -> dict[str, Any]:
    """Return a request's body as a dict.

    Args:
        body: A dict as Nuclio decodes it, or the bytes of the JSON under another content type.
        limits: Upper limits of one request.
        fields: The expected fields, for the error message.

    Raises:
        BadRequestError: The body is not a JSON object.
        TooLargeError: The body has more bytes than allowed.
    """
    if isinstance(body, bytes | bytearray):
        if len(body) > limits.body_bytes:
            raise TooLargeError(
                f"body has {len(body)} bytes: at most {limits.body_bytes} are allowed"
            )
        try:
            body = json.loads(body)
        except (ValueError, RecursionError):
            raise BadRequestError("body is not JSON") from None
    if not isinstance(body, dict):
        raise BadRequestError(
            f"body must be a JSON object with {fields}, not {type(body).__name__}"
        )
    return body


def list_field(fields: dict[str, Any], name: str) -> list[Any]:
    """Return a list field; missing or null counts as empty.

    Raises:
        BadRequestError: The field is of another type.
    """
    value = fields.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRequestError(f"{name} must be a list, not {type(value).__name__}")
    return value


def image_bytes(fields: dict[str, Any], limits: Limits) -> bytes:
    """Return the frame's encoded bytes.

    Raises:
        BadRequestError: `image` is missing or not base64.
        TooLargeError: `image` is longer than a body may be.
    """
    image = fields.get("image")
    if not isinstance(image, str) or not image:
        raise BadRequestError("image is missing: expected a base64 string")
    if len(image) > limits.body_bytes:
        raise TooLargeError(f"image has {len(image)} characters: at most {limits.body_bytes}")
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequestError("image is not base64") from None
