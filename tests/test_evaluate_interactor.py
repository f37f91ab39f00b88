"""The simulated annotator, and the interactor that it uses."""

from __future__ import annotations

import numpy as np
import pytest

from interaction.protocol import Prompt, extreme_box
from micro_training.evaluate_interactor import (
    EXTREME,
    KINDS,
    NOC_CLICKS,
    InteractorClient,
    annotate,
    clicks_needed,
    held_out_objects,
    make_prompts,
    next_click,
)
from shapes import Mask, mask_to_box
from testbed.drawn_frames import SIZE_HW, blob_mask


class Oracle:
    """Answers a prompt with discs around positive clicks, minus discs around negative clicks."""

    def __init__(self, radius: float) -> None:
        self._radius = radius

    def segment(self, prompt: Prompt) -> Mask:
        """Return a mask of the test frame's size."""
        rows, columns = np.indices(SIZE_HW)
        mask = np.zeros(SIZE_HW, dtype=np.bool_)
        for points, value in ((prompt.positive, True), (prompt.negative, False)):
            for x, y in points:
                mask[np.hypot(columns - x, rows - y) <= self._radius] = value
        return mask


def test_prompts_of_every_kind_fit_the_object() -> None:
    """Positive clicks are on the object, negative clicks beside it, boxes around it."""
    for _, masks in held_out_objects(2):
        for mask in masks:
            prompts = make_prompts(mask, np.random.default_rng(0))

            assert set(prompts) == set(KINDS)
            for prompt in prompts.values():
                assert all(mask[int(y), int(x)] for x, y in prompt.positive[:3])
                assert not any(mask[int(y), int(x)] for x, y in prompt.negative)
            assert len(set(prompts["3 clicks"].positive)) == 3
            x1, y1, x2, y2 = mask_to_box(mask) or (0, 0, 0, 0)
            for kind in ("box", "box + clicks"):
                assert prompts[kind].box == pytest.approx((x1, y1, x2, y2), abs=13)
            assert extreme_box(prompts[EXTREME].positive) == (x1, y1, x2 - 1, y2 - 1)


def test_no_prompt_continues_an_earlier_prompt() -> None:
    """Otherwise the interactor would refine the earlier answer."""
    prompts = list(make_prompts(blob_mask(), np.random.default_rng(0)).values())

    for index, prompt in enumerate(prompts):
        assert not any(prompt.continues(earlier) for earlier in prompts[:index])


def test_next_click_lies_in_the_middle_of_the_largest_wrong_region() -> None:
    """It is positive where the answer lacks pixels, negative where it has too many."""
    truth, answered = np.zeros((2, 40, 60), dtype=np.bool_)
    truth[10:21, 10:21] = True
    assert next_click(truth, answered, Prompt()) == Prompt(((15.0, 15.0),))

    answered[10:21, 10:19] = True  # two columns are missing
    answered[5:36, 29:60] = True  # a larger region is wrong
    assert next_click(truth, answered, Prompt(((15.0, 15.0),))) == Prompt(
        ((15.0, 15.0),), ((44.0, 20.0),)
    )
    assert next_click(truth, truth, Prompt(((15.0, 15.0),))) == Prompt(((15.0, 15.0),))


def test_the_annotator_stops_when_the_mask_is_good() -> None:
    """But not before the eighth click, so that every object counts in the whole curve."""
    good = annotate(Oracle(30), blob_mask())
    poor = annotate(Oracle(3), blob_mask())

    assert len(good) == 8
    assert good[0] > 0.95
    assert clicks_needed(good) == 1
    assert len(poor) == NOC_CLICKS
    assert poor[7] > poor[0]
    assert clicks_needed(poor) == NOC_CLICKS
    assert clicks_needed([0.1, 0.79, 0.8, 0.9]) == 3


def test_extreme_points_mean_a_box_only_where_they_are_evaluated() -> None:
    """The client that evaluates them answers as for their box; other four clicks stay clicks."""
    frame, (mask, *_) = next(held_out_objects(1))
    prompt = make_prompts(mask, np.random.default_rng(0))[EXTREME]
    boxed = Prompt(prompt.positive, (), extreme_box(prompt.positive))
    default, with_extremes = InteractorClient(), InteractorClient(extreme_points=True)
    default.show(frame)
    with_extremes.show(frame)

    assert np.array_equal(with_extremes.segment(prompt), default.segment(boxed))
    assert not np.array_equal(default.segment(prompt), default.segment(boxed))
