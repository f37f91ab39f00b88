"""Tracks reference objects through the function's handler, the way CVAT calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shapes import Mask, decode_cvat_rle, encode_cvat_rle, mask_to_box
from tests.conftest import Function
from tests.reference import ReferenceObject


def follow(
    function: Function,
    images: Sequence[str],
    objects: Sequence[ReferenceObject],
    *,
    backwards: bool = False,
) -> list[dict[int, list[float] | None]]:
    """Return for each object the answered points by frame, without the frame of its prompt."""
    answers: list[dict[int, list[float] | None]] = [{} for _ in objects]
    states: dict[int, str] = {}
    numbers = range(len(images) - 1, -1, -1) if backwards else range(len(images))
    for number in numbers:
        if states:
            tracked = list(states)
            answer = function.track(images[number], [None] * len(tracked), list(states.values()))
            states = dict(zip(tracked, answer["states"], strict=True))
            for index, shape in zip(tracked, answer["shapes"], strict=True):
                answers[index][number] = None if shape is None else shape["points"]
        started = [index for index, one in enumerate(objects) if one.frame == number]
        if started:
            prompts = [shape_of(objects[index]) for index in started]
            answer = function.track(images[number], prompts, [])
            states |= dict(zip(started, answer["states"], strict=True))
    return answers


def shape_of(one: ReferenceObject) -> dict[str, Any]:
    """Return an object's prompt as CVAT sends it."""
    if isinstance(one.prompt, tuple):
        return {"type": "rectangle", "points": list(one.prompt)}
    return {"type": "mask", "points": encode_cvat_rle(one.prompt)}


def equals(one: ReferenceObject, points: list[float] | None, expected: Mask) -> bool:
    """Compare one answer with the reference's mask: the mask itself, or its box for a box."""
    if isinstance(one.prompt, tuple):
        box = mask_to_box(expected)
        return points is not None and (box is None or tuple(points) == box)
    if points is None:
        return not expected.any()
    return np.array_equal(decode_cvat_rle(points, expected.shape), expected)
