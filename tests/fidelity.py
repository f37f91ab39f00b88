"""Track reference objects through the function's handler, as CVAT calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shapes import Mask, decode_cvat_rle, encode_cvat_rle, mask_to_box
from testbed.functions import Function
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
        started = [index for index, obj in enumerate(objects) if obj.frame == number]
        if started:
            prompts = [shape_of(objects[index]) for index in started]
            answer = function.track(images[number], prompts, [])
            states |= dict(zip(started, answer["states"], strict=True))
    return answers


def shape_of(obj: ReferenceObject) -> dict[str, Any]:
    """Return an object's prompt as CVAT sends it."""
    if isinstance(obj.prompt, tuple):
        return {"type": "rectangle", "points": list(obj.prompt)}
    return {"type": "mask", "points": encode_cvat_rle(obj.prompt)}


def equal_answers(
    obj: ReferenceObject,
    answers: dict[int, list[float] | None],
    expected: dict[int, Mask],
) -> list[bool]:
    """Compare an object's answers, in order, with the reference's masks.

    A mask is compared directly; a rectangle with its mask's box, the last one while it is lost.
    """
    last_box: tuple[float, ...] | None = obj.prompt if isinstance(obj.prompt, tuple) else None
    equal = []
    for frame, points in answers.items():
        mask = expected[frame]
        if last_box is not None:
            last_box = mask_to_box(mask) or last_box
            equal.append(points is not None and tuple(points) == last_box)
        elif points is None:
            equal.append(not mask.any())
        else:
            equal.append(np.array_equal(decode_cvat_rle(points, mask.shape), mask))
    return equal
