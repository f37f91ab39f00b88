"""Masks through the handler and a real Redis equal SAM2VideoPredictor's, bit for bit.

The reference fills small holes as on CUDA. The weights are random and scaled to amplify small
differences (see random_weights.py): a wrong rounding, a missing memory or a shifted frame number
changes masks. The full sizes are in fidelity_full.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shapes import Mask
from testbed.drawn_frames import SIZE_HW, base64_text, blob_mask, block_mask, jpeg_frames
from testbed.functions import CONFIG, IMAGE_SIZE, Function
from testbed.random_weights import write_checkpoint
from testbed.redis_server import RedisServer
from tests.fidelity import equal_answers, follow
from tests.reference import Reference, ReferenceObject, write_frames

FRAMES = 18  # more than SAM 2 attends to, and enough that their number has no effect
SMALL_CONFIG = "configs/sam2.1/sam2.1_hiera_s.yaml"


@pytest.fixture(scope="module", params=[CONFIG, SMALL_CONFIG])
def function_and_reference(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Path,
    redis_server: RedisServer,
    start_function: Callable[[dict[str, str]], Function],
) -> tuple[Function, Reference]:
    """The function and the official predictor on the same weights and frames."""
    config: str = request.param
    folder = tmp_path_factory.mktemp("frames")
    if config != CONFIG:
        checkpoint = write_checkpoint(config, folder / "weights.pt")
    write_frames(folder, jpeg_frames(FRAMES))
    environment = {"SAM2_CONFIG": config, "SAM2_CHECKPOINT": str(checkpoint)}
    environment["SAM2_BIT_EXACT"] = "on"
    function = start_function(redis_server.environment | environment)
    return function, Reference(config, checkpoint, IMAGE_SIZE, folder)


OBJECTS = [
    ReferenceObject(blob_mask()),
    ReferenceObject((215.0, 35.5, 275.0, 104.0)),
    ReferenceObject(block_mask(), frame=3),
]


def test_all_objects_at_once_equal_one_session_each(
    function_and_reference: tuple[Function, Reference],
) -> None:
    """Three objects, two masks and a box, one of them started later, tracked in one run."""
    function, reference = function_and_reference
    frames = [base64_text(frame) for frame in jpeg_frames(FRAMES)]
    ours = follow(function, frames, OBJECTS)

    for obj, masks in zip(OBJECTS, ours, strict=True):
        expected = reference.track(obj, FRAMES)
        assert_equal_answers(obj, masks, expected)


def test_tracking_backwards_equals_a_reverse_session(
    function_and_reference: tuple[Function, Reference],
) -> None:
    """Frames in descending order equal the official `reverse=True`."""
    function, reference = function_and_reference
    frames = [base64_text(frame) for frame in jpeg_frames(FRAMES)]
    obj = ReferenceObject(blob_mask(), frame=9)
    (masks,) = follow(function, frames, [obj], backwards=True)

    assert_equal_answers(obj, masks, reference.track(obj, FRAMES, backwards=True))


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(np.eye(*SIZE_HW) + np.eye(*SIZE_HW, k=1) > 0, id="diagonal"),
        pytest.param(np.ones(SIZE_HW, dtype=np.bool_), id="everything"),
        pytest.param(np.indices(SIZE_HW).sum(axis=0) % 7 < 5, id="stripes"),
    ],
)
def test_odd_masks_start_as_the_predictor_starts(
    function_and_reference: tuple[Function, Reference], mask: Mask
) -> None:
    """Thin, full and ragged prompts go through the same resizing and hole filling."""
    function, reference = function_and_reference
    frames = [base64_text(frame) for frame in jpeg_frames(FRAMES)]
    obj = ReferenceObject(mask)
    (masks,) = follow(function, frames[:4], [obj])

    assert_equal_answers(obj, masks, reference.track(obj, 3))


def assert_equal_answers(
    obj: ReferenceObject, answers: dict[int, list[float] | None], expected: dict[int, Mask]
) -> None:
    """Compare answered points with masks on all frames after the prompt's."""
    assert set(answers) == set(expected) - {obj.frame}
    assert all(equal_answers(obj, answers, expected))
    # empty and full masks would be equal too easily
    partial = [0 < mask.mean() < 1 for mask in expected.values()]
    assert np.mean(partial) > 0.5
