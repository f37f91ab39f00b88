"""The segmenter without its handler: caches, refinement of answers, removal of small regions."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from sam2.sam2_video_predictor import SAM2VideoPredictor

from errors import SettingsError, TooLargeError
from interaction.protocol import Prompt
from interaction.segmenter import CACHED_HINTS, Segmenter, build_segmenter
from model_loader import load_predictor
from settings import Settings
from testbed.drawn_frames import SIZE_HW, jpeg_frames

CLICK = Prompt(((60.0, 90.0),))
TWO = Prompt(((60.0, 90.0), (50.0, 80.0)))


@pytest.fixture(scope="module")
def model(micro: dict[str, str]) -> SAM2VideoPredictor:
    """A very small model."""
    return load_predictor(Settings.from_env(micro))[0]


def picture(index: int = 0) -> Image.Image:
    """Return one frame of the test clip."""
    return Image.open(io.BytesIO(jpeg_frames(index + 1)[index])).convert("RGB")


def make(
    model: SAM2VideoPredictor, *, cached_frames: int = 2, hole_area: int = 0, island_area: int = 0
) -> Segmenter:
    """Return a segmenter with empty caches."""
    return Segmenter(
        model,
        fingerprint="test",
        cached_frames=cached_frames,
        hole_area=hole_area,
        island_area=island_area,
    )


@pytest.fixture
def encoded(model: SAM2VideoPredictor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each run of the image encoder."""
    calls: list[int] = []
    encode: Callable[[torch.Tensor], object] = model.forward_image

    def record(pixels: torch.Tensor) -> object:
        calls.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(model, "forward_image", record)
    return calls


def test_second_click_costs_no_encoding(model: SAM2VideoPredictor, encoded: list[int]) -> None:
    """The picture is not decoded again either."""
    segmenter = make(model)

    def unwanted() -> Image.Image:
        raise AssertionError("decoded again")

    first = segmenter.segment("a", picture, CLICK)
    second = segmenter.segment("a", unwanted, TWO)

    assert encoded == [1]
    assert (first.encoded, second.encoded) == (True, False)
    assert first.mask.shape == second.mask.shape == SIZE_HW


def test_recently_used_frames_are_cached(model: SAM2VideoPredictor, encoded: list[int]) -> None:
    """The least recently used frame is dropped."""
    segmenter = make(model, cached_frames=2)
    for key in ("a", "b", "a", "c", "a", "b"):
        segmenter.segment(key, picture, CLICK)

    assert len(encoded) == 4  # a, b, c, and b again


def test_frame_that_does_not_fit_is_tried_again_without_caches(
    model: SAM2VideoPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's memory may be full of cached frames; the second attempt has it all."""
    segmenter = make(model)
    segmenter.segment("a", picture, CLICK)
    expected = make(model).segment("b", lambda: picture(1), CLICK)
    encode = model.forward_image

    def fails_beside_a_cached_frame(pixels: torch.Tensor) -> object:
        if segmenter._frames:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pixels)

    monkeypatch.setattr(model, "forward_image", fails_beside_a_cached_frame)
    answer = segmenter.segment("b", lambda: picture(1), CLICK)

    assert np.array_equal(answer.mask, expected.mask)


def test_frame_that_never_fits_is_refused(
    model: SAM2VideoPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says what helps, and the next frame is served as usual."""
    segmenter = make(model)

    def fail(_: torch.Tensor) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward_image", fail)
        with pytest.raises(TooLargeError, match=r"too little memory .* smaller SAM2_IMAGE_SIZE"):
            segmenter.segment("a", picture, CLICK)

    assert segmenter.segment("a", picture, CLICK).mask.shape == SIZE_HW


def test_device_that_is_too_small_is_refused_at_the_start(
    micro: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function stops with one line instead of refusing every frame."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Segmenter, "_encode", fail)

    with pytest.raises(SettingsError, match="SAM2_DEVICE='cpu': cpu has too little memory"):
        build_segmenter(Settings.from_env(micro))


def test_frames_do_not_share_hints(model: SAM2VideoPredictor) -> None:
    """The same clicks on another frame do not refine its answer."""
    segmenter = make(model)
    segmenter.segment("a", picture, CLICK)

    assert not segmenter.segment("b", lambda: picture(1), TWO).refined
    assert segmenter.segment("a", picture, TWO).refined


def test_longest_earlier_prompt_is_refined(model: SAM2VideoPredictor) -> None:
    """Also if clicks came faster than the answers."""
    three = Prompt((*TWO.positive, (70.0, 95.0)), ((5.0, 5.0),))
    seen, slow = make(model), make(model)
    seen.segment("a", picture, CLICK)
    seen.segment("a", picture, TWO)
    slow.segment("a", picture, CLICK)
    after_two = seen.segment("a", picture, three)
    after_one = slow.segment("a", picture, three)
    alone = make(model).segment("a", picture, three)

    assert after_two.refined
    assert after_one.refined
    assert not alone.refined
    masks = [segment.mask.tobytes() for segment in (after_two, after_one, alone)]
    assert len(set(masks)) == 3


def test_repeated_prompt_gets_the_same_answer(model: SAM2VideoPredictor) -> None:
    """After a lost answer or an undone click."""
    segmenter = make(model)
    answers = [segmenter.segment("a", picture, prompt) for prompt in (CLICK, TWO, TWO, CLICK)]

    assert np.array_equal(answers[1].mask, answers[2].mask)
    assert np.array_equal(answers[0].mask, answers[3].mask)


def test_scores_are_clamped_before_they_are_fed_back(model: SAM2VideoPredictor) -> None:
    """As SAM2ImagePredictor does."""
    segmenter = make(model)
    handle = model.sam_mask_decoder.register_forward_hook(
        lambda _module, _inputs, outputs: (outputs[0] * 1e4, *outputs[1:])
    )
    segmenter.segment("a", picture, CLICK)
    handle.remove()

    assert segmenter._hints["a", CLICK].abs().max() == 32


def test_hints_are_bounded(model: SAM2VideoPredictor) -> None:
    """However many prompts there are."""
    segmenter = make(model)
    for number in range(CACHED_HINTS + 5):
        segmenter.segment("a", picture, Prompt(((float(number), 5.0),)))

    assert len(segmenter._hints) == CACHED_HINTS


def logits_of(*regions: tuple[slice, slice], size: int = 32) -> torch.Tensor:
    """Return logits that are 1 in the regions and -1 elsewhere."""
    logits = -torch.ones(1, 1, size, size)
    for region in regions:
        logits[0, 0][region] = 1.0
    return logits


def test_small_holes_are_filled_and_islands_removed(model: SAM2VideoPredictor) -> None:
    """Up to the area in pixels of the low-resolution mask; larger ones stay."""
    object_, island, larger = np.s_[4:20, 4:20], np.s_[25:27, 25:29], np.s_[28:31, 4:7]
    logits = logits_of(object_, island, larger)
    logits[0, 0, 8:10, 8:12] = -1.0  # a hole of eight
    logits[0, 0, 14:17, 14:17] = -1.0  # a hole of nine
    tidied = make(model, hole_area=8, island_area=8)._tidy(logits) > 0
    expected = logits_of(object_, larger)
    expected[0, 0, 14:17, 14:17] = -1.0

    assert torch.equal(tidied, expected > 0)


def test_object_that_is_one_small_island_stays(model: SAM2VideoPredictor) -> None:
    """The annotator clicked it."""
    logits = logits_of(np.s_[4:6, 4:6])

    assert torch.equal(make(model, hole_area=8, island_area=8)._tidy(logits), logits)


def test_areas_of_zero_leave_the_scores_alone(model: SAM2VideoPredictor) -> None:
    """As SAM 2's image predictor does by default."""
    logits = logits_of(np.s_[4:6, 4:6], np.s_[10:20, 10:20])

    assert make(model)._tidy(logits) is logits
