"""Malformed requests by protocol, each with the status and the reason that its caller gets."""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from typing import Any

from errors import BadRequestError, NotAnImageError, StateGoneError, TooLargeError, TrackerError
from interaction.protocol import MAX_POINTS
from shapes import encode_cvat_rle
from state_token import StateToken, new_id
from testbed.drawn_frames import base64_text, blob_mask, jpeg_frames

IMAGE = base64_text(jpeg_frames(1)[0])  # 320 x 180
MASK = {"type": "mask", "points": encode_cvat_rle(blob_mask())}
BOX = [220, 40, 271, 101]
UNKNOWN = str(StateToken(new_id(), new_id()))

Malformed = tuple[Any, type[TrackerError], str]  # body, error, reason as a regular expression
BAD, LARGE, IMAGELESS, GONE = BadRequestError, TooLargeError, NotAnImageError, StateGoneError


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that announces a size and holds almost no pixels."""
    chunks = b""
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(data)) + kind + data
        chunks += struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def tracker_body(*shapes: Any, **changes: Any) -> dict[str, Any]:
    """Return a tracker request that is valid except for its changes."""
    return {"image": IMAGE, "shapes": list(shapes), "states": []} | changes


def _shape(name: str, points: Any) -> dict[str, Any]:
    return tracker_body({"type": name, "points": points})


def _image(data: Any) -> dict[str, Any]:
    image = base64.b64encode(data).decode() if isinstance(data, bytes) else data
    return tracker_body(MASK, image=image)


NO_TOKEN = "this is not a state token"

# What `parse_tracker_request` rejects.
TRACKER_FORM: dict[str, Malformed] = {
    "empty body": (b"", BAD, "^body is not JSON"),
    "cut off JSON": (json.dumps(tracker_body(MASK))[:-9].encode(), BAD, "^body is not JSON"),
    "binary": (b"\x80\x04\x95\xff", BAD, "^body is not JSON"),
    "UTF-16": (b"\xff\xfe{}", BAD, "^body is not JSON"),
    "deep": (b"[" * 100_000, BAD, "^body is not JSON"),
    "deep field": (b'{"image": ' + b"[" * 5000 + b"]" * 5000 + b"}", BAD, "^body is not JSON"),
    "endless number": (b"[1" + b"0" * 5000 + b"]", BAD, "^body is not JSON"),
    "JSON list": (b"[]", BAD, "must be a JSON object with image, shapes and states, not list"),
    "JSON NaN": (b"NaN", BAD, "not float"),
    "JSON null": (b"null", BAD, "not NoneType"),
    "JSON text": (b'"image"', BAD, "not str"),
    "text": ("image", BAD, "not str"),
    "number": (7, BAD, "not int"),
    "list": ([tracker_body(MASK)], BAD, "not list"),
    "empty object": ({}, BAD, "^nothing to track: shapes and states are both empty"),
    "nothing to do": (tracker_body(), BAD, "^nothing to track"),
    "shapes is an object": (tracker_body(shapes={}), BAD, "^shapes must be a list, not dict"),
    "shapes is a number": (tracker_body(shapes=0), BAD, "^shapes must be a list, not int"),
    "states is a text": (tracker_body(MASK, states=UNKNOWN), BAD, "^states must be a list, not"),
    "no image": ({"shapes": [MASK]}, BAD, "^image is missing: expected a base64 string"),
    "image is null": (_image(None), BAD, "^image is missing"),
    "image is empty": (_image(""), BAD, "^image is missing"),
    "image is a list": (_image([1]), BAD, "^image is missing"),
    "image is no base64": (_image("%%%"), BAD, "^image is not base64"),
    "image is cut off base64": (_image("AAA"), BAD, "^image is not base64"),
    "image has a line end": (_image("AA\nAA"), BAD, "^image is not base64"),
    "image is not ASCII": (_image("ÄÄÄÄ"), BAD, "^image is not base64"),
    "image has a surrogate": (_image("\ud800AAA"), BAD, "^image is not base64"),
    "image is a data URL": (_image(f"data:image/jpeg;base64,{IMAGE}"), BAD, "^image is not base64"),
    "too many objects": (tracker_body(*[BOX] * 257), LARGE, "^257 objects in one request: at most"),
    "too many states": (tracker_body(states=[UNKNOWN] * 257), LARGE, "^257 objects in one requ"),
    "too many points": (_shape("polygon", [0] * 40_001), LARGE, "polygon has 40001 numbers: at mo"),
    "too many runs": (_shape("mask", [0] * 2_000_005), LARGE, "mask has 2000005 numbers: at most"),
    "neither": (tracker_body(None), BAD, r"^shapes\[0\] and states\[0\] are both missing"),
    "neither at the end": (tracker_body(MASK, None), BAD, r"^shapes\[1\] and states\[1\] are both"),
    "neither of two": (
        tracker_body(BOX, None, states=[UNKNOWN, None]), BAD, r"^shapes\[1\] and states\[1\] are"),
    "shape is a number": (
        tracker_body(MASK, 5), BAD, r"^shapes\[1\]: a shape must be an object, not int"),
    "shape is a text": (tracker_body("mask"), BAD, r"^shapes\[0\]: a shape must be .* not str"),
    "no type": (
        tracker_body({"points": BOX}), BAD,
        r"^shapes\[0\]: type must be one of mask, polygon, rectangle, ellipse, not None"),
    "unknown type": (_shape("cuboid", BOX), BAD, r"^shapes\[0\]: type must be one of .*'cuboid'"),
    "type in capitals": (_shape("MASK", BOX), BAD, "not 'MASK'"),
    "type is a list": (tracker_body({"type": ["mask"], "points": BOX}), BAD, r"not \['mask'\]"),
    "endless type": (_shape("\ud800" * 99, BOX), BAD, r"not .(\\ud800)+.*\.\.\..*\\ud800.$"),
    "no points": (tracker_body({"type": "mask"}), BAD, r"^shapes\[0\]: points must be a flat list"),
    "points is a text": (_shape("polygon", "1,2,3"), BAD, "points must be a flat list"),
    "points is an object": (_shape("mask", {}), BAD, "points must be a flat list"),
    "token is a number": (tracker_body(states=[7]), BAD, rf"^states\[0\]: {NO_TOKEN}"),
    "token is false": (tracker_body(states=[False]), BAD, rf"^states\[0\]: {NO_TOKEN}"),
    "token is an object": (tracker_body(states=[{}]), BAD, rf"^states\[0\]: {NO_TOKEN}"),
    "token of another": (tracker_body(states=["{'frame': 1}"]), BAD, rf"^states\[0\]: {NO_TOKEN}"),
    "second token": (tracker_body(states=[UNKNOWN, 0]), BAD, rf"^states\[1\]: {NO_TOKEN}"),
}  # fmt: skip

# What only the frame, the drawing or the store tells. test_shapes has malformed points at length.
TRACKER: dict[str, Malformed] = TRACKER_FORM | {
    "image is text": (_image(b"not a picture"), IMAGELESS, "^image cannot be decoded"),
    "image is an empty PNG": (_image(png_header(9, 9)[:20]), IMAGELESS, "^image cannot be decoded"),
    "image is cut off": (_image(IMAGE[: len(IMAGE) // 8 * 4]), IMAGELESS, "^image cannot be dec"),
    "image is SVG": (_image(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), IMAGELESS, "expected o"),
    "image is a bomb": (_image(png_header(30_000, 30_000)), LARGE, "^image has 30000 x 30000 pixe"),
    "points are texts": (_shape("polygon", ["1"] * 6), BAD, r"^shapes\[0\]: polygon points must"),
    "points are NaN": (_shape("polygon", [math.nan] * 6), BAD, "points hold NaN, infinity"),
    "NaN in JSON": (
        json.dumps(tracker_body([1, 2, math.nan, 4])).encode(), BAD, r"^shapes\[0\]: .* NaN"),
    "polygon elsewhere": (_shape("polygon", [900, 0, 950, 0, 950, 9]), BAD, "covers no pixel of"),
    "bare box of three": (tracker_body([1, 2, 3]), BAD, r"^shapes\[0\]: rectangle has 3 numbers"),
    "empty bare box": (
        tracker_body([]), BAD, r"^shapes\[0\]: rectangle points|rectangle has 0 numbers"),
    "box without area": (tracker_body([9, 9, 9, 20]), BAD, "rectangle has no area in the 320 x 18"),
    "inverted ellipse": (_shape("ellipse", [50, 50, 40, 60]), BAD, "ellipse needs its right-most"),
    "wrong run sum": (_shape("mask", [0, 3, 0, 0, 1, 1]), BAD, "mask runs add up to 3, its box"),
    "thin mask": (_shape("mask", [0, 99, 9, 9, 9, 107]), BAD, r"^shapes\[0\]: mask is too small"),
    "thin polygon": (_shape("polygon", [9, 9, 10, 9, 10, 90, 9, 90]), BAD, "polygon is too small"),
    "thin ellipse": (_shape("ellipse", [9.5, 90, 10.1, 50]), BAD, "ellipse is too small"),
    "speck": (_shape("rectangle", [9, 9, 11, 10]), BAD, r"^shapes\[0\]: rectangle is too small"),
    "unknown token": (tracker_body(states=[UNKNOWN]), GONE, r"^states\[0\] expired or is unknown"),
    "one bad of three": (
        tracker_body(MASK, BOX, [1]), BAD, r"^shapes\[2\]: rectangle has 1 numbers"),
    "one unknown of two": (
        tracker_body(MASK, None, states=[None, UNKNOWN]), GONE, r"^states\[1\] expired"),
}  # fmt: skip


def interactor_body(**fields: Any) -> dict[str, Any]:
    """Return an interactor request with the test frame and no prompt but the given fields."""
    return {"image": IMAGE, "pos_points": [], "neg_points": []} | fields


def _points(*points: Any, **fields: Any) -> dict[str, Any]:
    return interactor_body(pos_points=list(points), **fields)


def _box(box: Any) -> dict[str, Any]:
    return interactor_body(obj_bbox=box)


# What `parse_interactor_request` rejects.
INTERACTOR: dict[str, Malformed] = {
    "no JSON": (b"{", BAD, "^body is not JSON"),
    "a list": ([], BAD, "with image, pos_points, neg_points and obj_bbox, not list"),
    "no image": ({"pos_points": [[1, 1]]}, BAD, "^image is missing"),
    "image is no base64": (_points([1, 1], image="%%%"), BAD, "^image is not base64"),
    "image is text": (_points([1, 1], image="AAAA"), IMAGELESS, "^image cannot be decoded"),
    "image is a bomb": (
        _points([1, 1], image=base64_text(png_header(30_000, 30_000))), LARGE, "^image has 30000"),
    "nothing": (_points(), BAD, "^nothing to segment: expected a box, or a positive point"),
    "empty box": (_box([]), BAD, "^nothing to segment"),
    "negative point alone": (interactor_body(neg_points=[[5, 5]]), BAD, "^nothing to segment"),
    "right of the frame": (_points([320.6, 5]), BAD, r"^pos_points\[0\] at 320.6, 5 is outside"),
    "below the frame": (_points([5, 5], [5, 181]), BAD, r"^pos_points\[1\] at 5, 181 is outside"),
    "left of the frame": (_points([-0.6, 5]), BAD, "outside the 320 x 180 frame"),
    "negative point outside": (
        _points([1, 1], neg_points=[[1, -1]]), BAD, r"^neg_points\[0\] at 1, -1 is outside"),
    "NaN": (_points([math.nan, 5]), BAD, r"^pos_points\[0\] at nan, 5 is outside"),
    "NaN below": (_points([5, math.nan]), BAD, r"^pos_points\[0\] at 5, nan is outside"),
    "infinity": (_points([5, math.inf]), BAD, "at 5, inf is outside"),
    "endless number": (_points([10**400, 5]), BAD, r"at 1000*, 5 is outside"),
    "text": (_points(["1", "2"]), BAD, r"^pos_points\[0\] must be two numbers"),
    "true": (_points([True, False]), BAD, "must be two numbers"),
    "one number": (_points([5]), BAD, "must be two numbers"),
    "three numbers": (_points([5, 5, 1]), BAD, "must be two numbers"),
    "flat points": (_points(5, 5), BAD, "must be two numbers"),
    "points are an object": (
        interactor_body(pos_points={"x": 1}), BAD, "^pos_points must be a list, not dict"),
    "too many points": (
        _points(*[[5, 5]] * 10_000), BAD, f"^pos_points has 10000 points: at most {MAX_POINTS}"),
    "too many negative points": (
        _points([5, 5], neg_points=[[5, 5]] * 10_000), BAD, "^neg_points has 10000 points"),
    "box without width": (_box([[5, 5], [5, 50]]), BAD, "^obj_bbox: rectangle has no area"),
    "box without height": (_box([5, 5, 50, 5]), BAD, "^obj_bbox: rectangle has no area"),
    "box outside": (_box([400, 5, 500, 50]), BAD, "^obj_bbox: .* no area in the 320"),
    "box of NaN": (_box([math.nan, 5, 50, 50]), BAD, "^obj_bbox: .* NaN"),
    "box of text": (_box(["a", "b", "c", "d"]), BAD, "^obj_bbox: .* flat list of numbers"),
    "box of one corner": (_box([[5, 5]]), BAD, "^obj_bbox: rectangle has 2 numbers"),
    "box of three corners": (_box([[5, 5]] * 3), BAD, "^obj_bbox: rectangle has 6 numbers"),
    "nested box": (_box([[[5, 5], [9, 9]]]), BAD, "^obj_bbox: .* flat list of numbers"),
    "mixed box": (_box([[5, 5], 9, 9]), BAD, "^obj_bbox: .* flat list of numbers"),
    "box is an object": (_box({"x": 1}), BAD, "^obj_bbox must be a list, not dict"),
}  # fmt: skip
