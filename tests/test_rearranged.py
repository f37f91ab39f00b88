"""The faster CPU modules equal SAM 2's own but for rounding, in any order of requests."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sam2
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from sam2.modeling.backbones.hieradet import MultiScaleBlock
from sam2.modeling.sam2_base import SAM2Base

from micro_training.function_client import FunctionClient
from micro_training.held_out import choose_held_out
from micro_training.metrics import region_iou
from model_handler import FrameFeatures, ModelHandler, ObjectOutput
from model_loader import PREDICTOR_OPTIONS, load_model
from rearranged import RearrangedMemoryAttention, _OnlineSoftmax, _StripwiseBlock, rearrange
from settings import Settings
from shapes import ShapeType, mask_to_box
from testbed.drawn_frames import SIZE_HW, blob_mask, block_mask, jpeg_frames
from testbed.functions import CONFIG, IMAGE_SIZE
from testbed.random_weights import make_sensitive
from track_state import PastFrame, TrackState

FRAMES = 18  # more than SAM 2 remembers


def load(checkpoint: Path, *, bit_exact: bool) -> ModelHandler:
    """Load a test model with weights that amplify small differences."""
    return load_model(
        Settings(
            config=CONFIG,
            checkpoint=str(checkpoint),
            image_size=IMAGE_SIZE,
            device="cpu",
            bit_exact=bit_exact,
        )
    )


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> ModelHandler:
    """SAM 2's own modules."""
    return load(checkpoint, bit_exact=True)


@pytest.fixture(scope="module")
def rearranged(checkpoint: Path) -> ModelHandler:
    """The same weights in the faster modules."""
    return load(checkpoint, bit_exact=False)


@pytest.fixture(scope="module", params=["t", "s", "b+", "l"])
def both(request: pytest.FixtureRequest) -> tuple[ModelHandler, ModelHandler]:
    """Each size of SAM 2.1: its own modules, and the same weights in the faster modules."""
    config = OmegaConf.load(
        Path(sam2.__path__[0]) / f"configs/sam2.1/sam2.1_hiera_{request.param}.yaml"
    )
    options = OmegaConf.merge(config.model, PREDICTOR_OPTIONS, {"image_size": IMAGE_SIZE})
    torch.manual_seed(0)
    model = instantiate(options, _recursive_=True).eval()
    make_sensitive(model)
    own = ModelHandler(model, fingerprint="", batch_objects=1, feature_cache_frames=4)
    rearranged = copy.deepcopy(own)
    rearrange(rearranged._model)
    return own, rearranged


@pytest.fixture(scope="module")
def steps(exact: ModelHandler) -> tuple[list[TrackState], dict[str, torch.Tensor]]:
    """An object's states after each frame of the clip, and all its frame memories."""
    return states_along_the_clip(exact)


def features_of(model: ModelHandler, index: int) -> FrameFeatures:
    """Encode one frame of the test clip."""
    image = Image.open(io.BytesIO(jpeg_frames(FRAMES)[index])).convert("RGB")
    return model.encode_frame(str(index), SIZE_HW, lambda: model.pixels(image))


def states_along_the_clip(
    model: ModelHandler,
) -> tuple[list[TrackState], dict[str, torch.Tensor]]:
    """Return an object's states after each frame of the clip, and all its frame memories."""
    output = model.start_from_mask(features_of(model, 0), model.mask_prompt(blob_mask()))
    states = [
        TrackState("", SIZE_HW, ShapeType.MASK, None, (PastFrame("0", 0, output.obj_ptr),)),
    ]
    memories = {"0": output.memory}
    for index in range(1, FRAMES):
        (output,) = model.step(features_of(model, index), states[-1:], memories)
        memories[str(index)] = output.memory
        states.append(states[-1].advance(str(index), output.obj_ptr, None))
    return states, memories


def assert_close(output: ObjectOutput, expected: ObjectOutput) -> None:
    """Compare two models' outputs but for rounding."""
    assert torch.allclose(output.low_res_logits, expected.low_res_logits, rtol=0, atol=1e-4)
    assert torch.allclose(output.obj_ptr, expected.obj_ptr, rtol=0, atol=1e-4)
    assert abs(output.object_score - expected.object_score) < 1e-4


def assert_steps_alike(
    exact: ModelHandler,
    rearranged: ModelHandler,
    state: TrackState,
    memories: dict[str, torch.Tensor],
) -> ObjectOutput:
    """Compare two models' outputs on the frame after a state's; return the exact one."""
    expected, output = (
        model.step(features_of(model, state.newest.step + 1), [state], memories)[0]
        for model in (exact, rearranged)
    )
    assert expected.low_res_logits.std() > 0.1  # something to tell apart
    assert_close(output, expected)
    return expected


def test_the_default_is_rearranged(exact: ModelHandler, rearranged: ModelHandler) -> None:
    """`SAM2_BIT_EXACT` leaves SAM 2's own modules in place."""
    settings = Settings.from_env({})

    assert not settings.bit_exact
    assert Settings.from_env({"SAM2_BIT_EXACT": "on"}).bit_exact
    assert isinstance(rearranged._model.memory_attention, RearrangedMemoryAttention)
    assert not isinstance(exact._model.memory_attention, RearrangedMemoryAttention)
    assert exact.fingerprint == rearranged.fingerprint  # their states are the same


def test_frames_are_encoded_alike(
    both: tuple[ModelHandler, ModelHandler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All levels and the position encoding, also in strips, which small frames do not need."""
    monkeypatch.setattr("rearranged._STRIP_TOKENS", 16)
    both[1]._features.clear()  # of frames that were encoded whole
    expected, features = (features_of(model, 0) for model in both)

    assert torch.equal(features.position_encoding, expected.position_encoding)
    for level, expected_level in zip(features.feature_maps, expected.feature_maps, strict=True):
        assert expected_level.std() > 0.01  # something to tell apart
        assert torch.allclose(level, expected_level, rtol=1e-4, atol=1e-4)


def test_starts_and_the_step_after_are_alike(both: tuple[ModelHandler, ModelHandler]) -> None:
    """From a box and from a mask, down to the memory, which is rounded to bfloat16."""
    exact, rearranged = both
    box = mask_to_box(blob_mask())
    assert box is not None
    starts = (
        (
            model.start_from_box(features_of(model, 0), box),
            model.start_from_mask(features_of(model, 0), model.mask_prompt(blob_mask())),
        )
        for model in both
    )
    for expected, output in zip(*starts, strict=True):
        assert expected.low_res_logits.std() > 0.1
        assert_close(output, expected)
        assert torch.allclose(output.memory, expected.memory, rtol=2**-6, atol=1e-3)
        first = PastFrame("0", 0, expected.obj_ptr)
        state = TrackState("", SIZE_HW, ShapeType.MASK, None, (first,))
        assert_steps_alike(exact, rearranged, state, {"0": expected.memory})


def test_steps_from_equal_states_are_alike(
    exact: ModelHandler,
    rearranged: ModelHandler,
    steps: tuple[list[TrackState], dict[str, torch.Tensor]],
) -> None:
    """With one memory, with some, and with a full memory bank and all object pointers."""
    states, memories = steps
    for index in (1, 3, 9, FRAMES - 1):
        assert_steps_alike(exact, rearranged, states[index - 1], memories)


def test_a_second_conditioning_frame_is_attended_to(
    exact: ModelHandler,
    rearranged: ModelHandler,
    steps: tuple[list[TrackState], dict[str, torch.Tensor]],
) -> None:
    """The memory bank then holds one frame memory more."""
    states, memories = steps
    state = states[9]
    second = replace(state, conditioning=(*state.conditioning, state.past[0]), past=state.past[1:])
    assert len(second.memory_ids) == len(state.memory_ids) + 1

    without = assert_steps_alike(exact, rearranged, state, memories)
    with_second = assert_steps_alike(exact, rearranged, second, memories)
    assert not torch.allclose(without.low_res_logits, with_second.low_res_logits, atol=0.01)


def test_the_shared_self_attention_is_of_the_objects_frame(
    exact: ModelHandler,
    rearranged: ModelHandler,
    steps: tuple[list[TrackState], dict[str, torch.Tensor]],
) -> None:
    """Objects on alternating frames get what each gets alone."""
    states, memories = steps
    for index, repeated in ((4, 2), (5, 1), (4, 1)):
        expected = exact.step(features_of(exact, index), [states[3]], memories)
        outputs = rearranged.step(features_of(rearranged, index), [states[3]] * repeated, memories)

        for output in outputs:
            assert_close(output, expected[0])
            assert torch.equal(output.low_res_logits, outputs[0].low_res_logits)


def test_objects_in_a_batch_keep_their_own_memories(
    exact: ModelHandler, rearranged: ModelHandler
) -> None:
    """One forward pass for several objects equals one pass each."""
    states, memories = [], {}
    for name, mask in (("blob", blob_mask()), ("block", block_mask())):
        output = exact.start_from_mask(features_of(exact, 0), exact.mask_prompt(mask))
        memories[name] = output.memory
        frame = PastFrame(name, 0, output.obj_ptr)
        states.append(TrackState("", SIZE_HW, ShapeType.MASK, None, (frame,)))
    expected = exact.step(features_of(exact, 1), states, memories)
    outputs = rearranged._step_batch(features_of(rearranged, 1), states, memories)

    assert not torch.allclose(expected[0].low_res_logits, expected[1].low_res_logits, atol=0.1)
    for output, expected_output in zip(outputs, expected, strict=True):
        assert_close(output, expected_output)


def test_thirty_frames_on_trained_weights_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding does not grow: IoU of at least 0.9999 with SAM 2's own modules to the end."""
    (held_out,) = choose_held_out(1)
    clip = held_out.make()
    masks = [clip.mask(0, body) for body in held_out.bodies]
    kinds = [ShapeType.MASK] * len(masks)
    answers = []
    for value in ("on", "off"):
        monkeypatch.setenv("SAM2_BIT_EXACT", value)
        answers.append(FunctionClient().follow(clip.frames[:31], masks, kinds))

    for exact_row, row in zip(*answers, strict=True):
        for expected, answer in zip(exact_row, row, strict=True):
            assert region_iou(expected.mask, answer.mask) >= 0.9999
    assert np.mean([answer.mask.any() for row in answers[0] for answer in row]) > 0.5


@pytest.mark.parametrize("q_stride", [None, (2, 2)])
@pytest.mark.parametrize("window_size", [4, 14])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_in_strips_is_the_block(
    window_size: int, q_stride: tuple[int, int] | None, batch: int
) -> None:
    """Also if windows reach beyond the edges."""
    torch.manual_seed(0)
    block = MultiScaleBlock(16, 32, 2, q_stride=q_stride, window_size=window_size).eval()
    tokens = torch.randn(batch, 66, 70, 16)
    pieces: list[int] = []
    block.register_forward_pre_hook(lambda _, given: pieces.append(given[0].shape[1]))
    with torch.inference_mode():
        strips = _StripwiseBlock(block)(tokens)
        assert len(pieces) > 1
        assert torch.allclose(strips, block(tokens), rtol=0, atol=1e-5)


def test_a_softmax_in_parts_is_the_softmax() -> None:
    """Also if scores are so large that their powers alone would overflow."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(5, 8, generator=generator) * 40
    keys, values = torch.randn(2, 12, 8, generator=generator)
    values, shifts = values[:, :3], torch.randn(5, 3, generator=generator) * 100
    running = _OnlineSoftmax(5, 3)
    for part in range(3):
        few = slice(4 * part, 4 * part + 4)
        running.add(queries, keys[few], values[few], shifts[:, part : part + 1])

    scores = (queries.double() @ keys.double().T) + shifts.repeat_interleave(4, 1).double()
    weights = torch.softmax(scores * np.log(2), dim=1)
    assert scores.abs().max() > 150
    assert torch.allclose(running.mean().double(), weights @ values.double(), atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"memory_attention.layer.cross_attention.num_heads": 2},
        {"memory_attention.pos_enc_at_input": False},
        {"use_obj_ptrs_in_encoder": False, "fixed_no_obj_ptr": False},
    ],
)
def test_nonstandard_attention_is_not_replaced(options: dict[str, object]) -> None:
    """Configs other than SAM 2's own keep working."""
    model = build(options)
    before = model.memory_attention
    rearrange(model)

    assert model.memory_attention is before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_high_res_features_in_sam", False),
        ("image_encoder.neck.fpn_top_down_levels", [0, 2, 3]),
        ("image_encoder.neck.fpn_top_down_levels", [2, 3]),
    ],
)
def test_fine_levels_are_folded_only_if_nothing_else_uses_them(option: str, value: object) -> None:
    """Features of nonstandard necks stay the same, too."""
    model = build({option: value})
    pixels = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model.forward_image(pixels)["backbone_fpn"]
        rearrange(model)
        after = model.forward_image(pixels)["backbone_fpn"]

    for level, expected in zip(after, before, strict=True):
        assert torch.allclose(level, expected, rtol=1e-4, atol=1e-5)


def build(options: dict[str, object]) -> SAM2Base:
    """Build the tiny model with changed options and PyTorch's initial weights."""
    config = OmegaConf.load(Path(sam2.__path__[0]) / CONFIG)
    for option, value in (options | {"image_size": IMAGE_SIZE}).items():
        OmegaConf.update(config.model, option, value)
    torch.manual_seed(0)
    model = instantiate(config.model, _recursive_=True).eval()
    assert isinstance(model, SAM2Base)
    return model
