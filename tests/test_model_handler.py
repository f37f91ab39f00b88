"""The model without store and requests: batches, small holes, immutable states, input pixels."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mask_regions import fill_holes
from model_handler import IMAGE_MEAN, IMAGE_STD, FrameFeatures, ModelHandler, ObjectOutput
from model_loader import compile_network, load_model
from settings import Settings
from shapes import ShapeType
from testbed.drawn_frames import SIZE_HW, blob_mask, block_mask, jpeg_frames
from testbed.functions import CONFIG, IMAGE_SIZE
from track_state import PastFrame, TrackState

FRAMES = 6


@pytest.fixture(scope="module")
def load(checkpoint: Path) -> Callable[[int], ModelHandler]:
    """Load the test model with a batch limit."""

    def load_with(batch_objects: int) -> ModelHandler:
        return load_model(
            Settings(
                config=CONFIG,
                checkpoint=str(checkpoint),
                image_size=IMAGE_SIZE,
                device="cpu",
                batch_objects=batch_objects,
                bit_exact=True,
            )
        )

    return load_with


class Track:
    """Objects of one model, tracked without a store."""

    def __init__(self, model: ModelHandler) -> None:
        self.model = model
        self.memories: dict[str, torch.Tensor] = {}

    def start(self, name: str, output: ObjectOutput) -> TrackState:
        """Return the state after the object's first frame."""
        frame = PastFrame(f"{name}0", 0, output.obj_ptr)
        self.memories[frame.id] = output.memory
        return TrackState(self.model.fingerprint, SIZE_HW, ShapeType.MASK, None, (frame,))

    def step(
        self, features: FrameFeatures, states: Sequence[TrackState]
    ) -> tuple[list[ObjectOutput], list[TrackState]]:
        """Return the model's outputs on the next frame, and the states after it."""
        outputs = self.model.step(features, states, self.memories)
        after = []
        for state, output in zip(states, outputs, strict=True):
            frame_id = f"{state.newest.id}+"
            self.memories[frame_id] = output.memory
            after.append(state.advance(frame_id, output.obj_ptr, None))
        return outputs, after


def features_of(model: ModelHandler, index: int) -> FrameFeatures:
    """Encode one frame of the test clip."""
    image = Image.open(io.BytesIO(jpeg_frames(FRAMES)[index])).convert("RGB")
    return model.encode_frame(str(index), SIZE_HW, lambda: model.pixels(image))


def test_a_batch_computes_what_one_at_a_time_computes(
    load: Callable[[int], ModelHandler],
) -> None:
    """One step from equal states differs by rounding only, whatever the objects' ages."""
    single, batched = load(1), load(8)
    track = Track(single)
    older = track.start(
        "a", single.start_from_mask(features_of(single, 0), single.mask_prompt(blob_mask()))
    )
    _, (older,) = track.step(features_of(single, 1), [older])
    first = track.start(
        "b", single.start_from_mask(features_of(single, 1), single.mask_prompt(blob_mask()))
    )
    second = track.start(
        "c", single.start_from_mask(features_of(single, 1), single.mask_prompt(block_mask()))
    )
    third = track.start("d", single.start_from_box(features_of(single, 1), (30, 60, 90, 120)))
    states = [first, older, second, third]

    alone = single.step(features_of(single, 2), states, track.memories)
    together = batched.step(features_of(batched, 2), states, track.memories)

    for output, expected in zip(together, alone, strict=True):
        assert torch.allclose(output.low_res_logits, expected.low_res_logits, rtol=0, atol=1e-4)
        assert torch.allclose(output.obj_ptr, expected.obj_ptr, rtol=0, atol=1e-4)
        assert output.memory.shape == expected.memory.shape == single.memory_shape


def test_a_compiled_network_computes_the_same() -> None:
    """Every part can be traced as a whole; only rounding may change."""
    plain, compiled = (
        load_model(Settings(model_id="micro", device="cpu", batch_objects=2, bit_exact=True))
        for _ in range(2)
    )
    compile_network(compiled._model, backend="eager", fullgraph=True)  # builds no kernels
    track = Track(plain)
    states = [
        track.start(name, plain.start_from_mask(features_of(plain, 0), plain.mask_prompt(mask)))
        for name, mask in (("a", blob_mask()), ("b", block_mask()))
    ]
    outputs = compiled.step(features_of(compiled, 1), states, track.memories)

    for output, expected in zip(
        outputs, plain.step(features_of(plain, 1), states, track.memories), strict=True
    ):
        assert torch.allclose(output.low_res_logits, expected.low_res_logits, rtol=0, atol=1e-4)


def test_answers_come_in_the_order_of_the_states(load: Callable[[int], ModelHandler]) -> None:
    """Grouping by layout does not shuffle objects."""
    model = load(8)
    track = Track(model)
    old = track.start(
        "a", model.start_from_mask(features_of(model, 0), model.mask_prompt(blob_mask()))
    )
    _, (old,) = track.step(features_of(model, 1), [old])
    young = track.start(
        "b", model.start_from_mask(features_of(model, 1), model.mask_prompt(block_mask()))
    )
    features = features_of(model, 2)

    old_first = model.step(features, [old, young], track.memories)
    young_first = model.step(features, [young, old], track.memories)

    assert torch.equal(old_first[0].low_res_logits, young_first[1].low_res_logits)
    assert torch.equal(old_first[1].low_res_logits, young_first[0].low_res_logits)


def test_a_step_leaves_its_state_as_it_was(load: Callable[[int], ModelHandler]) -> None:
    """The same state steps twice to the same bits."""
    model = load(1)
    track = Track(model)
    state = track.start(
        "a", model.start_from_mask(features_of(model, 0), model.mask_prompt(blob_mask()))
    )
    before = track.memories["a0"].clone()
    (once,) = model.step(features_of(model, 1), [state], track.memories)
    (again,) = model.step(features_of(model, 1), [state], track.memories)

    assert torch.equal(once.low_res_logits, again.low_res_logits)
    assert torch.equal(once.memory, again.memory)
    assert torch.equal(before, track.memories["a0"])


def test_a_known_frame_is_not_encoded_again(load: Callable[[int], ModelHandler]) -> None:
    """The second request on a frame uses the cached features."""
    model = load(1)
    features = features_of(model, 0)

    def fail() -> torch.Tensor:
        raise AssertionError("decoded again")

    assert model.encode_frame("0", SIZE_HW, fail) is features


def test_small_holes_become_foreground() -> None:
    """Regions of at most `max_area` pixels, touching by corners included, turn to 0.1."""
    logits = torch.ones(2, 1, 16, 16)
    logits[0, 0, 2, 2] = logits[0, 0, 3, 3] = -1.0  # one hole of two pixels, over the corner
    logits[0, 0, 8:11, 8:11] = -1.0  # nine pixels
    logits[1, 0, 0, :] = -1.0  # sixteen pixels
    filled = fill_holes(logits, 8)

    assert torch.equal(filled[0, 0, [2, 3], [2, 3]], torch.tensor([0.1, 0.1]))
    assert torch.equal(filled[0, 0, 8:11, 8:11], -torch.ones(3, 3))
    assert torch.equal(filled[1], logits[1])


def test_no_hole_leaves_the_logits_alone() -> None:
    """They are not copied if there is nothing to fill."""
    logits = torch.ones(1, 1, 8, 8)

    assert fill_holes(logits, 8) is logits


def test_an_area_of_zero_fills_nothing() -> None:
    """As SAM 2's own setting."""
    logits = torch.ones(1, 1, 8, 8)
    logits[0, 0, 4, 4] = -1.0

    assert fill_holes(logits, 0) is logits


def test_full_size_masks_have_the_size_of_the_frame(load: Callable[[int], ModelHandler]) -> None:
    """Whatever the model's input size."""
    model = load(1)
    features = features_of(model, 0)
    mask = model.full_size_mask(
        features, model.start_from_mask(features, model.mask_prompt(blob_mask()))
    )

    assert mask.shape == SIZE_HW
    assert mask.dtype == np.bool_
    assert np.count_nonzero(mask & blob_mask()) / np.count_nonzero(mask | blob_mask()) > 0.9


def test_pixels_enter_the_network_as_in_sam2(load: Callable[[int], ModelHandler]) -> None:
    """Every value of every channel, to the bit and with the same strides."""
    model = load(1)
    noise = np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    encode = model._model.forward_image
    inputs = []

    def record(pixels: torch.Tensor) -> Any:
        inputs.append(pixels)
        return encode(pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model._model, "forward_image", record)
        model.encode_frame("", noise.shape[:2], lambda: model.pixels(Image.fromarray(noise)))
    expected = torch.from_numpy(noise / 255.0).permute(2, 0, 1).float()
    expected -= torch.tensor(IMAGE_MEAN)[:, None, None]
    expected /= torch.tensor(IMAGE_STD)[:, None, None]

    assert torch.equal(inputs[0][0], expected)
    assert inputs[0][0].stride() == expected.stride()
