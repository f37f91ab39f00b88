from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from errors import BadRequestError, TrackerError
from interaction.protocol import (
    MAX_POINTS,
    Prompt,
    extreme_box,
    format_interactor_answer,
    parse_interactor_request,
)
from settings import Limits, MaskForm
from shapes import decode_cvat_rle
from testbed.drawn_frames import SIZE_HW, blob_mask
from tests.malformed_requests import IMAGE, INTERACTOR
from tests.malformed_requests import interactor_body as body

LEFT, TOP, RIGHT, BOTTOM = (10.0, 50.0), (30.0, 20.0), (60.0, 45.0), (35.0, 90.0)
AROUND = (10.0, 20.0, 60.0, 90.0)


def parse(sent: object, *, extreme_points: bool = True) -> Prompt:
    """Return the prompt of a request."""
    return parse_interactor_request(sent, Limits(), extreme_points=extreme_points).prompt


@pytest.mark.parametrize(
    "box", [[[30, 60], [90.5, 120]], [30, 60, 90.5, 120], [[90.5, 120], [30, 60]]]
)
def test_box_is_read_in_both_forms_and_any_order(box: list[Any]) -> None:
    """CVAT sends two corners; others send flat lists, and corners in another order."""
    assert parse(body(obj_bbox=box)) == Prompt(box=(30.0, 60.0, 90.5, 120.0))


@pytest.mark.parametrize("nothing", [{"obj_bbox": []}, {"obj_bbox": None}, {}])
def test_no_box_comes_in_several_forms(nothing: dict[str, Any]) -> None:
    """An empty list, null, or a missing field."""
    assert parse(body(pos_points=[[5, 6.5]]) | nothing) == Prompt(((5.0, 6.5),))


def test_missing_lists_and_unknown_fields_are_accepted() -> None:
    """CVAT may send a threshold, and leaves out what was not drawn."""
    sent = {"image": IMAGE, "obj_bbox": [1, 2, 30, 40], "threshold": 0.5, "neg_points": None}

    assert parse(sent) == Prompt(box=(1.0, 2.0, 30.0, 40.0))
    assert parse(json.dumps(sent).encode()) == parse(sent)


def test_points_keep_their_order_and_their_kind() -> None:
    """Points on the frame's border are valid, on all four sides."""
    sent = body(pos_points=[[320, 180], [0, 0]], neg_points=[[0, 180], [7, 7]])

    assert parse(sent) == Prompt(((320.0, 180.0), (0.0, 0.0)), ((0.0, 180.0), (7.0, 7.0)))


def test_click_on_the_edge_is_moved_into_the_frame() -> None:
    """CVAT's interface rounds a click to check that it lies in the frame; it sends the original."""
    sent = body(pos_points=[[-0.5, 5.25], [320.5, 180.5]], neg_points=[[7, -0.3]])

    assert parse(sent) == Prompt(((0.0, 5.25), (320.0, 180.0)), ((7.0, 0.0),))


def test_box_is_cut_to_the_frame() -> None:
    """People drag past the edge."""
    assert parse(body(obj_bbox=[[-9, -9], [400, 100]])).box == (0.0, 0.0, 320.0, 100.0)


@pytest.mark.parametrize(("sent", "error", "reason"), INTERACTOR.values(), ids=INTERACTOR)
def test_malformed_request_is_rejected(sent: Any, error: type[TrackerError], reason: str) -> None:
    """The message says what is wrong, where, and what is expected."""
    with pytest.raises(error, match=reason):
        parse(sent)


@pytest.mark.parametrize("name", ["pos_points", "neg_points"])
def test_as_many_points_as_the_limit_are_accepted(name: str) -> None:
    """One point more is rejected."""
    sent = body(pos_points=[[5, 5]]) | {name: [[5, 5]] * MAX_POINTS}

    assert max(map(len, (parse(sent).positive, parse(sent).negative))) == MAX_POINTS
    sent[name].append([5, 5])
    with pytest.raises(BadRequestError, match=f"^{name} has {MAX_POINTS + 1} points: at most"):
        parse(sent)


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
    """DEXTR's four clicks, each on another side, and further clicks inside."""
    assert extreme_box(points) == AROUND


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        pytest.param([LEFT, TOP, RIGHT], [], id="three"),
        pytest.param([(10, 20), (30, 40), (40, 50), (60, 90)], [], id="along a diagonal"),
        pytest.param([LEFT, TOP, RIGHT, (30, 40)], [], id="two sides on one point"),
        pytest.param([(5, 5)] * 4, [], id="one position"),
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
    """Also on a replica that has not answered the earlier clicks."""
    points = [LEFT, TOP, RIGHT, BOTTOM]

    assert extreme_box(points, [(40.0, 60.0)]) == AROUND


def test_extreme_points_become_a_box_with_clicks_only_if_asked_for() -> None:
    """The points stay clicks beside the box."""
    points = (LEFT, TOP, RIGHT, BOTTOM)
    sent = body(pos_points=[list(point) for point in points])

    assert parse(sent) == Prompt(points, (), AROUND)
    assert parse(sent, extreme_points=False) == Prompt(points)


def test_drawn_box_is_not_replaced() -> None:
    """Even if the points lie like extreme points."""
    sent = body(pos_points=list(map(list, (LEFT, TOP, RIGHT, BOTTOM))), obj_bbox=[0, 0, 99, 99])

    assert parse(sent).box == (0.0, 0.0, 99.0, 99.0)


def test_prompt_continues_those_with_fewer_clicks_of_the_same_beginning() -> None:
    """One more click of either kind, or several if the annotator is faster than the answers."""
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
    """Each version of CVAT reads one of them."""
    mask = blob_mask()
    answer = json.loads(format_interactor_answer(mask, 0.934, MaskForm.FULL))

    assert set(answer) == {"mask", "shapes"}
    assert answer["mask"] == mask.astype(int).tolist()
    (shape,) = answer["shapes"]
    assert shape["type"] == "mask"
    assert shape["attributes"] == [{"spec_id": 0, "value": "0.93"}]
    assert np.array_equal(decode_cvat_rle(shape["points"], SIZE_HW), mask)


def test_cropped_mask_says_where_it_lies() -> None:
    """`bounds` are inclusive; the shape does not change."""
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
def test_empty_mask_has_no_shape_and_no_bounds(form: MaskForm) -> None:
    """The mask itself covers the whole frame."""
    answer = json.loads(format_interactor_answer(np.zeros((2, 3), dtype=np.bool_), 0.1, form))

    assert answer == {"mask": [[0, 0, 0], [0, 0, 0]], "shapes": []}


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 4), (3, 1)])
def test_smallest_masks_are_well_formed(size_hw: tuple[int, int]) -> None:
    """The text is not written by the JSON encoder."""
    text = format_interactor_answer(np.ones(size_hw, dtype=np.bool_), 1.0, MaskForm.FULL)

    assert json.loads(text)["mask"] == np.ones(size_hw, dtype=int).tolist()
    assert not re.search(r"\s", text)
