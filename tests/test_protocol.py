from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from errors import BadRequestError, TooLargeError, TrackerError
from object_requests import Continue, Start
from protocol import TrackerRequest, format_tracker_answer, parse_tracker_request
from settings import Limits
from shapes import Shape, ShapeType
from state_token import StateToken, new_id
from tests.malformed_requests import TRACKER_FORM

LIMITS = Limits()
TOKEN = StateToken(new_id(), new_id())
STATE = str(TOKEN)
IMAGE = base64.b64encode(b"picture").decode()
POLYGON: dict[str, Any] = {"type": "polygon", "points": [0, 0, 9, 0, 9, 9]}
BARE = [1, 2, 30, 40]

RECTANGLE_ITEM = Start(Shape(ShapeType.RECTANGLE, BARE))
POLYGON_ITEM = Start(Shape(ShapeType.POLYGON, POLYGON["points"]))
NEXT = Continue(TOKEN)


def parse(limits: Limits = LIMITS, **fields: Any) -> TrackerRequest:
    """Parse a request with a picture, as the dict that Nuclio decodes."""
    return parse_tracker_request({"image": IMAGE} | fields, limits)


# Requests of all known callers: shapes and states, the expected items and their `bare` flags.
CALLS: list[tuple[dict[str, Any], list[Start | Continue], list[bool]]] = [
    ({"shapes": [POLYGON], "states": []}, [POLYGON_ITEM], [False]),
    ({"shapes": [POLYGON]}, [POLYGON_ITEM], [False]),
    ({"shapes": [POLYGON], "states": None}, [POLYGON_ITEM], [False]),
    ({"shapes": [None, None], "states": [STATE, STATE]}, [NEXT, NEXT], [False, False]),
    ({"shapes": [], "states": [STATE]}, [NEXT], [False]),
    ({"states": [STATE]}, [NEXT], [False]),
    ({"shapes": [BARE], "states": []}, [RECTANGLE_ITEM], [True]),
    ({"shapes": [BARE], "states": [None]}, [RECTANGLE_ITEM], [True]),
    ({"shapes": [BARE, BARE], "states": [STATE, STATE]}, [NEXT, NEXT], [True, True]),
    (
        {"shapes": [BARE, POLYGON, None, POLYGON, BARE], "states": [STATE, None, STATE, STATE]},
        [NEXT, POLYGON_ITEM, NEXT, NEXT, RECTANGLE_ITEM],
        [True, False, False, False, True],
    ),
    ({"shapes": [POLYGON], "states": [], "threshold": 1, "x": {}}, [POLYGON_ITEM], [False]),
]


@pytest.mark.parametrize(("fields", "items", "bare"), CALLS)
def test_requests_of_all_callers_are_parsed(
    fields: dict[str, Any], items: list[Start | Continue], bare: list[bool]
) -> None:
    """A state continues a track, else the shape starts one; dict, bytes and bytearray alike."""
    text = json.dumps({"image": IMAGE} | fields).encode()

    expected = TrackerRequest(b"picture", tuple(items), tuple(bare))
    assert parse(**fields) == expected
    assert parse_tracker_request(text, LIMITS) == expected
    assert parse_tracker_request(bytearray(text), LIMITS) == expected


def test_answer_has_the_form_of_the_request() -> None:
    """Bare boxes are answered bare, shapes as objects, a lost object as null, in the same order.

    A lost rectangle has its last box, marked as outside unless it is bare.
    """
    request = TrackerRequest(b"", (NEXT,) * 5, (True, False, False, True, False))
    box = Shape(ShapeType.RECTANGLE, (1.0, 2.0, 3.0, 4.0))
    answer = format_tracker_answer(
        request,
        [
            (TOKEN, box, True),
            (TOKEN, box, False),
            (TOKEN, None, True),
            (TOKEN, None, True),
            (TOKEN, box, True),
        ],
    )

    assert json.loads(json.dumps(answer)) == {
        "shapes": [
            [1.0, 2.0, 3.0, 4.0],
            {"type": "rectangle", "points": [1.0, 2.0, 3.0, 4.0]},
            None,
            None,
            {"type": "rectangle", "points": [1.0, 2.0, 3.0, 4.0], "outside": True},
        ],
        "states": [STATE] * 5,
    }


@pytest.mark.parametrize(("body", "error", "reason"), TRACKER_FORM.values(), ids=TRACKER_FORM)
def test_malformed_request_is_rejected(
    body: object, error: type[TrackerError], reason: str
) -> None:
    """The message says what is wrong, and begins with the field if one is to blame."""
    with pytest.raises(error, match=reason):
        parse_tracker_request(body, LIMITS)


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_deep_nesting_is_a_bad_request_at_every_depth(depth: int) -> None:
    """Neither the parser nor the error message runs out of stack."""
    nested = b"[" * depth + b"]" * depth
    body = b'{"image": "AAAA", "shapes": [{"type": ' + nested + b', "points": []}]}'

    with pytest.raises(BadRequestError, match=r"type must be one of|body is not JSON"):
        parse_tracker_request(body, LIMITS)


@pytest.mark.parametrize(
    ("limit", "largest", "fields", "reason"),
    [
        ("objects", 2, {"shapes": [POLYGON] * 2}, "^2 objects in one request: at most 1 are all"),
        ("objects", 2, {"states": [STATE] * 2}, "^2 objects in one request: at most 1 are all"),
        ("polygon_points", 3, {"shapes": [[0, 0], POLYGON]},
         r"^shapes\[1\]: polygon has 6 numbers: at most 4 are allowed"),
        ("polygon_points", 2, {"shapes": [BARE]}, r"^shapes\[0\]: rectangle has 4 numbers: at"),
        ("mask_runs", 3, {"shapes": [{"type": "mask", "points": [1, 1, 1, 0, 0, 2, 0]}]},
         r"^shapes\[0\]: mask has 7 numbers: at most 6 are allowed"),
        ("body_bytes", len(IMAGE), {"shapes": [POLYGON]}, "^image has 12 characters: at most 11"),
    ],
)  # fmt: skip
def test_limit_is_the_largest_that_is_allowed(
    limit: str, largest: int, fields: dict[str, Any], reason: str
) -> None:
    """With a limit that is smaller by one the same request is rejected, even as a dict."""
    assert parse(Limits(**{limit: largest}), **fields).items

    with pytest.raises(TooLargeError, match=reason):
        parse(Limits(**{limit: largest - 1}), **fields)


def test_body_may_be_as_large_as_the_limit() -> None:
    """The limit counts the bytes of a body that Nuclio has not decoded."""
    body = json.dumps({"image": IMAGE, "shapes": [POLYGON]}).encode()

    assert parse_tracker_request(body, Limits(body_bytes=len(body))).items == (POLYGON_ITEM,)


def test_large_body_is_rejected_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The JSON of a body above the limit is not read."""
    monkeypatch.delattr("json.loads")

    with pytest.raises(TooLargeError, match="body has 1001 bytes: at most 1000 are allowed"):
        parse_tracker_request(bytes(1001), Limits(body_bytes=1000))
