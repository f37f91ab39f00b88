"""The simulated annotator that the interactor is measured with."""

from __future__ import annotations

import numpy as np
import pytest

from interaction.protocol import Prompt, extreme_box
from micro_training.evaluate_interactor import (
    KINDS,
    NOC_CLICKS,
    annotate,
    clicks_needed,
    held_out_objects,
    next_click,
    prompts_of,
)
from shapes import Mask, mask_to_box
from testbed.drawn_frames import SIZE_HW, blob_mask


class Oracle:
    """Answers a prompt by discs around its positive clicks, without those around negative ones."""

    def __init__(self, radius: float) -> None:
        self._radius = radius

    def ask(self, prompt: Prompt) -> Mask:
        """Return a mask of the test frame's size."""
        rows, columns = np.indices(SIZE_HW)
        mask = np.zeros(SIZE_HW, dtype=np.bool_)
        for points, value in ((prompt.positive, True), (prompt.negative, False)):
            for x, y in points:
                mask[np.hypot(columns - x, rows - y) <= self._radius] = value
        return mask


def test_prompts_of_every_kind_show_the_object() -> None:
    """Positive clicks lie on it, negative ones beside it, boxes around it."""
    for _, masks in held_out_objects(2):
        for mask in masks:
            prompts = prompts_of(mask, np.random.default_rng(0))

            assert set(prompts) == set(KINDS)
            for prompt in prompts.values():
                assert all(mask[int(y), int(x)] for x, y in prompt.positive[:3])
                assert not any(mask[int(y), int(x)] for x, y in prompt.negative)
            assert len(set(prompts["3 clicks"].positive)) == 3
            x1, y1, x2, y2 = mask_to_box(mask) or (0, 0, 0, 0)
            for kind in ("box", "box + clicks"):
                assert prompts[kind].box == pytest.approx((x1, y1, x2, y2), abs=13)
            assert extreme_box(prompts["4 extreme points"].positive) == (x1, y1, x2 - 1, y2 - 1)


def test_no_prompt_continues_one_that_was_asked_before_it() -> None:
    """Otherwise its answer would not be of its kind alone."""
    prompts = list(prompts_of(blob_mask(), np.random.default_rng(0)).values())

    for index, prompt in enumerate(prompts):
        assert not any(prompt.continues(earlier) for earlier in prompts[:index])


def test_next_click_lies_in_the_middle_of_the_largest_wrong_region() -> None:
    """Positive where something is missing, negative where there is too much."""
    truth, answered = np.zeros((2, 40, 60), dtype=np.bool_)
    truth[10:21, 10:21] = True
    assert next_click(truth, answered, Prompt()) == Prompt(((15.0, 15.0),))

    answered[10:21, 10:19] = True  # two columns are missing
    answered[5:36, 29:60] = True  # and more than that too much
    assert next_click(truth, answered, Prompt(((15.0, 15.0),))) == Prompt(
        ((15.0, 15.0),), ((44.0, 20.0),)
    )
    assert next_click(truth, truth, Prompt(((15.0, 15.0),))) == Prompt(((15.0, 15.0),))


def test_annotator_stops_when_the_object_is_there() -> None:
    """Not before the eighth click, so that every object counts in the whole curve."""
    done = annotate(Oracle(30), blob_mask())
    never = annotate(Oracle(3), blob_mask())

    assert len(done) == 8
    assert done[0] > 0.95
    assert clicks_needed(done) == 1
    assert len(never) == NOC_CLICKS
    assert never[7] > never[0]
    assert clicks_needed(never) == NOC_CLICKS
    assert clicks_needed([0.1, 0.79, 0.8, 0.9]) == 3
