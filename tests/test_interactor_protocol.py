from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest

from errors import BadRequestError, NotAnImageError, TooLargeError
from interaction.protocol import (
    MAX_POINTS,
    Prompt,
    extreme_box,
    format_interactor_answer,
    parse_interactor_request,
)
from settings import Limits, MaskForm
from shapes import decode_cvat_rle
from testbed.drawn_frames import SIZE_HW, base64_text, blob_mask, jpeg_frames

IMAGE = base64_text(jpeg_frames(1)[0])
LEFT, TOP, RIGHT, BOTTOM = (10.0, 50.0), (30.0, 20.0), (60.0, 45.0), (35.0, 90.0)
AROUND = (10.0, 20.0, 60.0, 90.0)


def body(**fields: Any) -> dict[str, Any]:
    """Return a request with the test frame."""
    return {"image": IMAGE, "pos_points": [], "neg_points": []} | fields


def parse(sent: object, *, extreme_points: bool = True) -> Prompt:
    """Return the prompt of a request."""
    return parse_interactor_request(sent, Limits(), extreme_points=extreme_points).prompt


@pytest.mark.parametrize(
    "box", [[[30, 60], [90.5, 120]], [30, 60, 90.5, 120], [[90.5, 120], [30, 60]]]
)
def test_box_is_read_in_both_forms_and_any_order(box: list[Any]) -> None:
    """CVAT sends two corners; flat lists and corners the wrong way round happen."""
    assert parse(body(obj_bbox=box)) == Prompt(box=(30.0, 60.0, 90.5, 120.0))


@pytest.mark.parametrize("nothing", [{"obj_bbox": []}, {"obj_bbox": None}, {}])
def test_no_box_comes_in_several_forms(nothing: dict[str, Any]) -> None:
    """As an empty list, null or not at all."""
    assert parse(body(pos_points=[[5, 6.5]]) | nothing) == Prompt(((5.0, 6.5),))


def test_missing_lists_and_unknown_fields_do_no_harm() -> None:
    """CVAT may send a threshold, and leaves out what was not drawn."""
    sent = {"image": IMAGE, "obj_bbox": [1, 2, 30, 40], "threshold": 0.5, "neg_points": None}

    assert parse(sent) == Prompt(box=(1.0, 2.0, 30.0, 40.0))
    assert parse(json.dumps(sent).encode()) == parse(sent)


def test_points_keep_their_order_and_their_kind() -> None:
    """The border counts as inside, on all four sides."""
    sent = body(pos_points=[[320, 180], [0, 0]], neg_points=[[0, 180], [7, 7]])

    assert parse(sent) == Prompt(((320.0, 180.0), (0.0, 0.0)), ((0.0, 180.0), (7.0, 7.0)))


def test_click_on_the_edge_is_moved_into_the_frame() -> None:
    """CVAT's interface rounds a click to tell that it lies in the frame, and sends it as it was."""
    sent = body(pos_points=[[-0.5, 5.25], [320.5, 180.5]], neg_points=[[7, -0.3]])

    assert parse(sent) == Prompt(((0.0, 5.25), (320.0, 180.0)), ((7.0, 0.0),))


def test_box_is_cut_to_the_frame() -> None:
    """People drag past the edge."""
    assert parse(body(obj_bbox=[[-9, -9], [400, 100]])).box == (0.0, 0.0, 320.0, 100.0)


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "^body is not JSON"),
    "a list": ([], "with image, pos_points, neg_points and obj_bbox, not list"),
    "no image": ({"pos_points": [[1, 1]]}, "^image is missing"),
    "empty": (body(), "^nothing to segment: expected a box, or a positive point"),
    "empty box": (body(obj_bbox=[]), "^nothing to segment"),
    "negative point alone": (body(neg_points=[[5, 5]]), "^nothing to segment"),
    "right of the frame": (body(pos_points=[[320.6, 5]]), r"^pos_points\[0\] at 320.6, 5 is out"),
    "below the frame": (body(pos_points=[[5, 5], [5, 181]]), r"^pos_points\[1\] at 5, 181 is"),
    "left of the frame": (body(pos_points=[[-0.6, 5]]), "outside the 320 x 180 frame"),
    "negative point outside": (
        body(pos_points=[[1, 1]], neg_points=[[1, -1]]), r"^neg_points\[0\] at 1, -1 is outside"),
    "NaN": (body(pos_points=[[math.nan, 5]]), r"^pos_points\[0\] at nan, 5 is outside"),
    "NaN below": (body(pos_points=[[5, math.nan]]), r"^pos_points\[0\] at 5, nan is outside"),
    "infinity": (body(pos_points=[[5, math.inf]]), "at 5, inf is outside"),
    "endless number": (body(pos_points=[[10**400, 5]]), r"at 1000*, 5 is outside"),
    "text": (body(pos_points=[["1", "2"]]), r"^pos_points\[0\] must be two numbers"),
    "true": (body(pos_points=[[True, False]]), "must be two numbers"),
    "one number": (body(pos_points=[[5]]), "must be two numbers"),
    "three numbers": (body(pos_points=[[5, 5, 1]]), "must be two numbers"),
    "flat points": (body(pos_points=[5, 5]), "must be two numbers"),
    "points are an object": (body(pos_points={"x": 1}), "^pos_points must be a list, not dict"),
    "too many points": (
        body(pos_points=[[5, 5]] * 10_000), f"^pos_points has 10000 points: at most {MAX_POINTS}"),
    "too many negative points": (
        body(pos_points=[[5, 5]], neg_points=[[5, 5]] * 10_000), "^neg_points has 10000 points"),
    "box without width": (body(obj_bbox=[[5, 5], [5, 50]]), "^obj_bbox: rectangle has no area"),
    "box without height": (body(obj_bbox=[5, 5, 50, 5]), "^obj_bbox: rectangle has no area"),
    "box outside": (body(obj_bbox=[400, 5, 500, 50]), "^obj_bbox: .* no area in the 320"),
    "box of NaN": (body(obj_bbox=[math.nan, 5, 50, 50]), "^obj_bbox: .* NaN"),
    "box of text": (body(obj_bbox=["a", "b", "c", "d"]), "^obj_bbox: .* flat list of numbers"),
    "box of one corner": (body(obj_bbox=[[5, 5]]), "^obj_bbox: rectangle has 2 numbers"),
    "box of three corners": (body(obj_bbox=[[5, 5]] * 3), "^obj_bbox: rectangle has 6 numbers"),
    "nested box": (body(obj_bbox=[[[5, 5], [9, 9]]]), "^obj_bbox: .* flat list of numbers"),
    "mixed box": (body(obj_bbox=[[5, 5], 9, 9]), "^obj_bbox: .* flat list of numbers"),
    "box is an object": (body(obj_bbox={"x": 1}), "^obj_bbox must be a list, not dict"),
}  # fmt: skip


@pytest.mark.parametrize(("sent", "reason"), BAD.values(), ids=BAD)
def test_bad_prompt_is_refused_with_its_place(sent: Any, reason: str) -> None:
    """What is wrong, where, and what is expected."""
    with pytest.raises(BadRequestError, match=reason):
        parse(sent)


@pytest.mark.parametrize("name", ["pos_points", "neg_points"])
def test_as_many_points_as_the_limit_are_taken(name: str) -> None:
    """One more is refused."""
    sent = body(pos_points=[[5, 5]]) | {name: [[5, 5]] * MAX_POINTS}

    assert max(map(len, (parse(sent).positive, parse(sent).negative))) == MAX_POINTS
    sent[name].append([5, 5])
    with pytest.raises(BadRequestError, match=f"^{name} has {MAX_POINTS + 1} points: at most"):
        parse(sent)


def test_image_is_held_to_the_limits() -> None:
    """A refused image is not a malformed request."""
    with pytest.raises(NotAnImageError):
        parse(body(image=base64_text(b"none"), pos_points=[[1, 1]]))
    with pytest.raises(TooLargeError):
        parse_interactor_request(
            body(pos_points=[[1, 1]]), Limits(image_pixels=100), extreme_points=True
        )


@pytest.mark.parametrize(
    "points",
    [
        pytest.param([LEFT, TOP, RIGHT, BOTTOM], id="clockwise"),
        pytest.param([BOTTOM, LEFT, RIGHT, TOP], id="any order"),
        pytest.param([LEFT, TOP, RIGHT, BOTTOM, (30.0, 50.0)], id="one more inside"),
        pytest.param([(10, 30), (20, 20), (60, 80), (50, 90)], id="near the corners"),
        pytest.param([(10, 20), (30, 20), (60, 45), (35, 90)], id="cut off by the frame"),
        pytest.param([(10, 20), (30, 21), (60, 45), (35, 90)], id="nearly so"),
        pytest.param([LEFT, TOP, RIGHT, (35, 89), (36, 90)], id="corrected by a little"),
    ],
)
def test_extreme_points_mean_their_box(points: list[tuple[float, float]]) -> None:
    """DEXTR's four clicks, each on another side; more of them do not hurt."""
    assert extreme_box(points) == AROUND


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        pytest.param([LEFT, TOP, RIGHT], [], id="three"),
        pytest.param([(10, 20), (30, 40), (40, 50), (60, 90)], [], id="along a diagonal"),
        pytest.param([LEFT, TOP, RIGHT, (30, 40)], [], id="two sides on one point"),
        pytest.param([(5, 5)] * 4, [], id="one place"),
        pytest.param([(5, 5), (10, 5), (15, 5), (20, 5)], [], id="a line"),
        pytest.param([LEFT, TOP, RIGHT, BOTTOM, (70, 50)], [], id="a fifth outside"),
        pytest.param([(30, 50), LEFT, TOP, RIGHT, BOTTOM], [], id="a click in the middle first"),
        pytest.param([LEFT, TOP, RIGHT, BOTTOM], [(70, 50)], id="a negative outside"),
        pytest.param([LEFT, TOP, RIGHT], [BOTTOM], id="a side held by a negative"),
    ],
)
def test_other_points_are_just_points(
    positive: list[tuple[float, float]], negative: list[tuple[float, float]]
) -> None:
    """Clicks scattered over the object, as people correct a mask."""
    assert extreme_box(positive, negative) is None


def test_extreme_points_keep_their_box_when_the_mask_is_corrected_inside() -> None:
    """Also on a replica that did not see the clicks before."""
    points = [LEFT, TOP, RIGHT, BOTTOM]

    assert extreme_box(points, [(40.0, 60.0)]) == AROUND


def test_extreme_points_become_box_and_hints_unless_overridden() -> None:
    """The points stay as points inside the box."""
    points = (LEFT, TOP, RIGHT, BOTTOM)
    sent = body(pos_points=[list(point) for point in points])

    assert parse(sent) == Prompt(points, (), AROUND)
    assert parse(sent, extreme_points=False) == Prompt(points)


def test_a_drawn_box_is_not_replaced() -> None:
    """Whatever the points look like."""
    sent = body(pos_points=list(map(list, (LEFT, TOP, RIGHT, BOTTOM))), obj_bbox=[0, 0, 99, 99])

    assert parse(sent).box == (0.0, 0.0, 99.0, 99.0)


def test_prompt_continues_those_with_fewer_clicks_of_the_same_beginning() -> None:
    """One more click of either kind, or several when the annotator is faster than the answers."""
    box = (1.0, 2.0, 3.0, 4.0)
    prompt = Prompt((LEFT, TOP), (RIGHT,))

    assert prompt.continues(Prompt((LEFT, TOP)))
    assert prompt.continues(Prompt((LEFT,), (RIGHT,)))
    assert prompt.continues(Prompt((LEFT,)))
    assert Prompt((LEFT,), (), box).continues(Prompt(box=box))
    assert not prompt.continues(prompt)
    assert not prompt.continues(Prompt((TOP,), (RIGHT,)))
    assert not prompt.continues(Prompt((LEFT, TOP), (RIGHT, BOTTOM)))
    assert not prompt.continues(Prompt((LEFT,), (), box))


def test_answer_has_the_full_mask_and_the_shape() -> None:
    """Every CVAT finds what it reads."""
    mask = blob_mask()
    answer = json.loads(format_interactor_answer(mask, 0.934, MaskForm.FULL))

    assert set(answer) == {"mask", "shapes"}
    assert answer["mask"] == mask.astype(int).tolist()
    (shape,) = answer["shapes"]
    assert shape["type"] == "mask"
    assert shape["attributes"] == [{"spec_id": 0, "value": "0.93"}]
    assert np.array_equal(decode_cvat_rle(shape["points"], SIZE_HW), mask)


def test_cropped_mask_says_where_it_lies() -> None:
    """`bounds` are inclusive; the shape is as ever."""
    mask = blob_mask()
    answer = json.loads(format_interactor_answer(mask, 1.0, MaskForm.CROPPED))
    left, top, right, bottom = answer["bounds"]
    pasted = np.zeros_like(mask)
    pasted[top : bottom + 1, left : right + 1] = np.array(answer["mask"], dtype=np.bool_)

    assert np.array_equal(pasted, mask)
    assert np.array_equal(decode_cvat_rle(answer["shapes"][0]["points"], SIZE_HW), mask)


def test_mask_can_be_left_out() -> None:
    """For CVAT versions that read `shapes`."""
    assert set(json.loads(format_interactor_answer(blob_mask(), 1.0, MaskForm.NONE))) == {"shapes"}


@pytest.mark.parametrize("form", [MaskForm.FULL, MaskForm.CROPPED])
def test_empty_mask_is_answered_as_such(form: MaskForm) -> None:
    """No shape has nothing in it, and nothing has no bounds."""
    answer = json.loads(format_interactor_answer(np.zeros((2, 3), dtype=np.bool_), 0.1, form))

    assert answer == {"mask": [[0, 0, 0], [0, 0, 0]], "shapes": []}


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 4), (3, 1)])
def test_smallest_masks_are_well_formed(size_hw: tuple[int, int]) -> None:
    """The text is made by hand, so its edges are looked at."""
    text = format_interactor_answer(np.ones(size_hw, dtype=np.bool_), 1.0, MaskForm.FULL)

    assert json.loads(text)["mask"] == np.ones(size_hw, dtype=int).tolist()
    assert not re.search(r"\s", text)
