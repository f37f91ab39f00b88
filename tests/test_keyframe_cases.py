"""The keyframe rules in `keyframe_cases.json`, which `cvat_ui/` follows as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cvat_task.annotations import build_track
from cvat_task.job import Label
from cvat_task.object_selection import ObjectFilter, select_objects

Json = dict[str, Any]

RULES: Json = json.loads((Path(__file__).parent / "keyframe_cases.json").read_text())
DEFAULTS: dict[str, Json] = RULES["defaults"]


def track_in_cvat_task(case: Json, annotations: Json) -> tuple[list[float], Json | None]:
    """Run a case in `cvat_task`: the points that tracking starts from, and the track to create."""
    labels = {4: Label("label", frozenset(RULES["mutable_attributes"]))}
    [obj] = select_objects(
        annotations, case["frame"], labels, wanted=ObjectFilter(), tracks_allowed=True
    )
    prompt = obj.progress.last_seen.points
    for frame, points in case["tracked"]:
        obj.progress.record(frame, points)
    track = build_track(
        obj, labels, keyframe_interval=case["interval"], next_frame=case["next_frame"]
    )
    return prompt, track


def complete_track(fields: Json, keyframes: list[Json]) -> Json:
    """Return a track with all fields that CVAT's JSON has."""
    shapes = [DEFAULTS["keyframe"] | keyframe for keyframe in keyframes]
    frame = min(shape["frame"] for shape in shapes)
    return DEFAULTS["object"] | {"frame": frame} | fields | {"shapes": shapes}


@pytest.mark.parametrize("case", RULES["cases"], ids=lambda case: case["name"])
def test_a_tracked_object_becomes_the_expected_track(case: Json) -> None:
    """The same track as CVAT's UI action makes of it."""
    original = case["original"]
    annotations: Json = {"shapes": [], "tracks": []}
    if "shape" in original:
        annotations["shapes"] = [
            DEFAULTS["object"] | DEFAULTS["keyframe"] | original["shape"] | {"id": 1}
        ]
    else:
        annotations["tracks"] = [
            complete_track(
                {"id": 2}, [key | {"id": 100 + key["frame"]} for key in original["track"]]
            )
        ]
    prompt, track = track_in_cvat_task(case, annotations)

    expected = case["expected"]
    assert track == complete_track(DEFAULTS["expected"] | expected, expected["shapes"])
    if "prompt" in case:
        assert prompt == pytest.approx(case["prompt"], abs=1e-5)
