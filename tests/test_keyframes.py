"""Tracks are between their keyframes where CVAT shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvat_task.keyframes import keyframe_at, upright
from shapes import Shape, ShapeType, shape_to_mask

# What the UI of CVAT 2.54 gave an action: tracks, and where they are between two keyframes.
RECORDED = Path(__file__).parent.parent / "cvat_ui" / "tests" / "recorded_input.json"

Json = dict[str, Any]


def key(shape_type: str, frame: int, points: list[float], **fields: Any) -> Json:
    """Return a keyframe as the server gives it."""
    defaults = {"outside": False, "occluded": False, "z_order": 0, "rotation": 0, "attributes": []}
    return {"type": shape_type, "frame": frame, "points": points, **defaults, **fields}


def test_positions_are_those_that_cvat_showed() -> None:
    """A polygon between two keyframes, and a rectangle after its only one."""
    recorded = json.loads(RECORDED.read_text())
    states = {state["clientID"]: state for state in recorded["states_at_7"]}
    tracks = recorded["input"]["collection"]["tracks"]

    assert len(tracks) == 2
    for track in tracks:
        keyframe = keyframe_at(track["shapes"], 7)
        assert keyframe is not None
        assert keyframe["points"] == pytest.approx(states[track["clientID"]]["points"])


def test_a_track_has_no_position_before_it_begins_and_while_it_is_outside() -> None:
    """After a visible keyframe it stays where it is."""
    box = [0.0, 0.0, 2.0, 2.0]
    keys = [
        key("rectangle", 5, box, outside=True),
        key("rectangle", 2, box),
        key("rectangle", 8, box),
    ]

    visible = [frame for frame in range(12) if keyframe_at(keys, frame) is not None]
    assert visible == [2, 3, 4, 8, 9, 10, 11]


def test_boxes_move_evenly_and_turn_the_short_way() -> None:
    """From 350 to 30 degrees through 10."""
    keys = [
        key("rectangle", 0, [0, 0, 10, 10], rotation=350),
        key("rectangle", 4, [8, 4, 18, 14], rotation=30),
    ]
    keyframe = keyframe_at(keys, 2)

    assert keyframe is not None
    assert keyframe["points"] == [4, 2, 14, 12]
    assert keyframe["rotation"] == pytest.approx(10)


def test_attributes_hold_from_their_keyframe_on() -> None:
    """Also when a later keyframe changes only others."""
    box = [0.0, 0.0, 2.0, 2.0]
    first = [{"spec_id": 1, "value": "a"}, {"spec_id": 2, "value": "x"}]
    keys = [
        key("rectangle", 0, box, attributes=first),
        key("rectangle", 3, box, attributes=[{"spec_id": 2, "value": "y"}]),
    ]
    keyframe = keyframe_at(keys, 5)

    assert keyframe is not None
    assert {obj["spec_id"]: obj["value"] for obj in keyframe["attributes"]} == {1: "a", 2: "y"}


def test_vertices_pair_up_along_their_rings() -> None:
    """An additional vertex does not turn the polygon."""
    square = [0.0, 0.0, 8.0, 0.0, 8.0, 8.0, 0.0, 8.0]
    with_one_more = [0.0, 0.0, 4.0, -4.0, 8.0, 0.0, 8.0, 8.0, 0.0, 8.0]
    keys = [key("polygon", 0, square), key("polygon", 2, with_one_more)]
    keyframe = keyframe_at(keys, 1)

    assert keyframe is not None
    mask = shape_to_mask(Shape(ShapeType.POLYGON, keyframe["points"]), (16, 16))
    solid = shape_to_mask(Shape(ShapeType.POLYGON, square), (16, 16))
    assert np.count_nonzero(mask & solid) >= 0.9 * np.count_nonzero(solid)


@given(
    corners=st.lists(
        st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=3, max_size=30, unique=True
    ),
    shift=st.tuples(st.floats(-20, 20), st.floats(-20, 20)),
    share=st.integers(1, 9),
)
@settings(deadline=None)
def test_a_polygon_that_only_moves_keeps_its_shape(
    corners: list[tuple[float, float]], shift: tuple[float, float], share: int
) -> None:
    """Each vertex is paired with itself."""
    left = np.array(corners)
    steps = np.linalg.norm(np.diff(left, axis=0, append=left[:1]), axis=1)
    if steps.min() < 1e-3:  # vertices in the same position cannot be told apart
        return
    keys = [
        key("polygon", 0, left.ravel().tolist()),
        key("polygon", 10, (left + shift).ravel().tolist()),
    ]
    keyframe = keyframe_at(keys, share)

    assert keyframe is not None
    expected = (left + np.array(shift) * share / 10).ravel()
    assert keyframe["points"] == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("angle", [0, 30, 90, 200])
@pytest.mark.parametrize("shape_type", ["rectangle", "ellipse"])
def test_a_turned_shape_starts_from_its_upright_extent(shape_type: str, angle: float) -> None:
    """The bounding box of its outline."""
    points = [10.0, 20.0, 40.0, 30.0] if shape_type == "rectangle" else [25.0, 25.0, 40.0, 20.0]
    t = np.linspace(0, 2 * np.pi, 100_001)
    if shape_type == "rectangle":
        outline = np.array([[-15, -5], [15, -5], [15, 5], [-15, 5]], dtype=float)
    else:
        outline = np.stack([15 * np.cos(t), 5 * np.sin(t)], axis=1)
    turn = np.radians(angle)
    turned = outline @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    right, bottom = turned.max(axis=0)
    extent = upright(key(shape_type, 0, points, rotation=angle))

    if shape_type == "rectangle":
        expected = [25 - right, 25 - bottom, 25 + right, 25 + bottom]
    else:
        expected = [25, 25, 25 + right, 25 - bottom]
    assert extent == pytest.approx(expected, abs=1e-4)
