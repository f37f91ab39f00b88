"""The clips, measures, losses and weights of the bundled model."""

import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from micro_training.batches import Batch
from micro_training.clips import DEMO_SEEDS, HELD_OUT_SEEDS, TRAINING_SEEDS, Script, make_clip
from micro_training.demo_clip import DEMO_FRAMES, DEMO_SEED, write_demo_clip
from micro_training.held_out import HIDDEN_FRAMES, HeldOut, choose_held_out, hidden_run
from micro_training.losses import compute_losses
from micro_training.metrics import boundary_f, region_iou
from micro_training.model import CHECKPOINT, build_model
from micro_training.unroll import Prediction, Unroller
from shapes import Shape, ShapeType, shape_to_mask

SMALL_HW = (90, 160)


@pytest.fixture(scope="module")
def held_out() -> list[HeldOut]:
    """The first held-out clip with each kind of occlusion."""
    return list(choose_held_out(2))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the demo clip."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo_clip(folder)
    return folder


def test_a_seed_gives_one_clip() -> None:
    """The same seed gives the same clip, another seed another clip."""
    first, again, other = (
        make_clip(seed, frames=4, size_hw=SMALL_HW, script=Script()) for seed in (7, 7, 8)
    )

    assert np.array_equal(first.frames, again.frames)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.frames, other.frames)


def test_training_evaluation_and_demo_share_no_seeds() -> None:
    """No clip of the training is evaluated or shown."""
    ranges = (TRAINING_SEEDS, HELD_OUT_SEEDS, DEMO_SEEDS)

    assert DEMO_SEED in DEMO_SEEDS
    for first, second in itertools.combinations(ranges, 2):
        assert first.stop <= second.start or second.stop <= first.start


@pytest.mark.parametrize("index", [0, 1])
def test_an_occlusion_hides_the_target_completely_for_some_frames(
    held_out: list[HeldOut], index: int
) -> None:
    """Held-out clips hide their target for 5 to 10 frames, by a body or a pillar."""
    clip = held_out[index].make(SMALL_HW)
    run = hidden_run((clip.labels == held_out[index].bodies[0] + 1).any(axis=(1, 2)))

    assert run is not None
    assert run[1] - run[0] in HIDDEN_FRAMES


def test_the_demo_clip_hides_one_of_its_three_objects(demo: Path) -> None:
    """The object that starts from a mask disappears for some frames, the others stay."""
    masks = np.load(demo / "truth.npz")["masks"]
    visible = masks.any(axis=(2, 3))
    frames = sorted((demo / "frames").glob("*.jpg"))
    first = cv2.imread(str(frames[0]))

    assert masks.shape == (DEMO_FRAMES, 3, 360, 640)
    assert first is not None
    assert first.shape == (360, 640, 3)
    assert len(frames) == DEMO_FRAMES
    assert hidden_run(visible[:, 0]) is not None
    assert visible[:, 1:].all()


def test_the_demo_shapes_fit_the_ground_truth_of_the_first_frame(demo: Path) -> None:
    """Mask, polygon and box in `shapes.json` agree with `truth.npz`."""
    shapes = json.loads((demo / "shapes.json").read_text())
    truth = np.load(demo / "truth.npz")["masks"][0]
    drawn = [
        shape_to_mask(Shape(ShapeType(shape["type"]), shape["points"]), (360, 640))
        for shape in shapes
    ]

    assert [shape["type"] for shape in shapes] == ["mask", "polygon", "rectangle"]
    assert region_iou(drawn[0], truth[0]) == 1.0
    assert region_iou(drawn[1], truth[1]) > 0.97
    assert drawn[2][truth[2]].all()


def _square(left: int, top: int, side: int) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    mask = np.zeros((100, 100), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_j_is_the_overlap() -> None:
    """J is intersection over union, and 1 where both masks are empty."""
    empty = np.zeros((100, 100), bool)

    assert region_iou(_square(10, 10, 20), _square(10, 10, 20)) == 1.0
    assert region_iou(_square(10, 10, 20), _square(20, 10, 20)) == pytest.approx(1 / 3)
    assert region_iou(_square(10, 10, 20), empty) == 0.0
    assert region_iou(empty, empty) == 1.0


def test_f_tolerates_only_a_small_shift() -> None:
    """At 100 x 100 pixels outlines may be 2 pixels apart, not more."""
    empty = np.zeros((100, 100), bool)

    assert boundary_f(_square(20, 20, 40), _square(20, 20, 40)) == 1.0
    assert boundary_f(_square(20, 20, 40), _square(22, 20, 40)) == 1.0
    assert boundary_f(_square(20, 20, 40), _square(30, 30, 40)) < 0.2
    assert boundary_f(empty, _square(20, 20, 40)) == 0.0
    assert boundary_f(empty, empty) == 1.0


def test_the_losses_prefer_the_ground_truth() -> None:
    """The loss is small for the right mask, large for a wrong mask or a wrong object score."""
    truth = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    truth[..., 16:48, 16:48] = True
    right = (truth.float() * 20 - 10).expand(1, 3, 64, 64)
    sure = torch.ones(1, 3)

    def loss(masks: torch.Tensor, score: float) -> float:
        prediction = Prediction(0, masks, sure, torch.tensor([[score]]))
        return float(compute_losses([prediction], truth, 64).total)

    assert loss(right, 10.0) < 0.01
    assert loss(-right, 10.0) > 1.0
    assert loss(right, -10.0) > 1.0


def test_an_untrained_model_copies_a_mask_to_the_next_frame() -> None:
    """The initial weights pass a mask through memory, attention and decoder."""
    clip = make_clip(7, frames=1, size_hw=(256, 256), script=Script(objects=3))
    bodies = [body for body in range(len(clip.roles)) if clip.mask(0, body).mean() > 0.01]
    masks = torch.from_numpy(np.stack([clip.mask(0, body) for body in bodies]))
    frames = torch.from_numpy(clip.frames).expand(2, -1, -1, -1)[None]
    torch.manual_seed(0)
    unroller = Unroller(build_model())
    with torch.no_grad():
        last = unroller(
            Batch(frames, masks[:, None].expand(-1, 2, -1, -1)),
            "mask",
            corrections=0,
            gap=0,
            burn_in=0,
            rng=np.random.default_rng(0),
        )[-1]
    copied = torch.nn.functional.interpolate(last.masks[:, :1], (256, 256), mode="bilinear") > 0

    assert len(bodies) >= 2
    assert all(
        region_iou(mask, truth) > 0.7
        for mask, truth in zip(copied[:, 0].numpy(), masks.numpy(), strict=True)
    )


def test_the_bundled_checkpoint_fits_its_config_and_its_size() -> None:
    """The weights load into the model of the config without a missing key, in at most 8 MB."""
    weights = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)["model"]
    model = build_model()
    model.load_state_dict(weights, strict=True)

    assert CHECKPOINT.stat().st_size <= 8_000_000
    assert all(value.isfinite().all() for value in model.state_dict().values())
