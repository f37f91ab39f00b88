"""The masks of the interactor's handler equal those of SAM2ImagePredictor, pixel for pixel."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from interaction.protocol import Point, Prompt, extreme_box
from micro_training.clips import HELD_OUT_SEEDS, Script, make_clip
from shapes import Mask, decode_cvat_rle
from testbed.drawn_frames import base64_text, jpeg_frames
from testbed.functions import CONFIG, IMAGE_SIZE, Function
from tests.image_reference import ImageReference
from tests.reference import Reference, ReferenceObject, write_frames

AREA = 8  # the default of both settings
PROMPTS = {"random": 200, "micro": 50}
# wide, tall, smaller than the model's input, of the same size, larger
SIZES_HW = [(180, 320), (200, 90), (70, 100), (IMAGE_SIZE, IMAGE_SIZE), (360, 640)]


def frames() -> list[bytes]:
    """Return rendered frames of all sizes as files."""
    files = []
    for seed, size_hw in zip(HELD_OUT_SEEDS, SIZES_HW, strict=False):
        clip = make_clip(seed, frames=1, size_hw=size_hw, script=Script())
        picture = cv2.cvtColor(clip.frames[0], cv2.COLOR_RGB2BGR)
        files.append(cv2.imencode(".png", picture)[1].tobytes())
    return files


@pytest.fixture(scope="module", params=["random", "micro"])
def weights(request: pytest.FixtureRequest) -> str:
    """Which weights: random weights that react to everything, or the bundled ones."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def start(
    weights: str, start_interactor: Callable[[dict[str, str]], Function]
) -> Callable[[], Function]:
    """Start a replica with these weights."""
    micro = {"SAM2_CONFIG": "", "SAM2_CHECKPOINT": "", "SAM2_IMAGE_SIZE": ""}
    micro |= {"SAM2_MODEL_ID": "micro"}
    environment = micro if weights == "micro" else {}
    environment |= {"SAM2_FEATURE_CACHE_FRAMES": "8", "SAM2_INTERACTOR_EXTREME_POINTS": "on"}
    return lambda: start_interactor(environment)


@pytest.fixture(scope="module")
def reference(weights: str, checkpoint: Path) -> ImageReference:
    """The official predictor with the same weights."""
    if weights == "micro":
        return ImageReference("micro", None, 0, area=AREA)
    return ImageReference(CONFIG, checkpoint, IMAGE_SIZE, area=AREA)


def ask(interactor: Function, image: bytes, prompt: Prompt) -> tuple[Mask, float]:
    """Return mask and confidence of an answer, after a check that its two masks are equal."""
    body = {
        "image": base64_text(image),
        "pos_points": [list(point) for point in prompt.positive],
        "neg_points": [list(point) for point in prompt.negative],
        "obj_bbox": [] if prompt.box is None else [list(prompt.box[:2]), list(prompt.box[2:])],
    }
    status, answer = interactor.call(body)
    assert status == 200, answer
    mask = np.array(answer["mask"], dtype=np.bool_)
    confidence = math.nan
    if mask.any():
        (shape,) = answer["shapes"]
        assert np.array_equal(decode_cvat_rle(shape["points"], mask.shape), mask)
        confidence = float(shape["attributes"][0]["value"])
    return mask, confidence


def random_prompt(kind: str, size_hw: tuple[int, int], rng: np.random.Generator) -> Prompt:
    """Return a random prompt of a kind anywhere in a frame, its border included."""
    frame_wh = np.array(size_hw[::-1], dtype=float)

    def points(count: int) -> tuple[Point, ...]:
        drawn = np.clip(rng.uniform(-0.05, 1.05, (count, 2)), 0, 1) * frame_wh
        drawn = np.round(drawn) if rng.random() < 0.5 else drawn
        return tuple((float(x), float(y)) for x, y in drawn)

    low = rng.uniform(0, 0.7, 2) * frame_wh
    high = low + rng.uniform(0.05, 0.3, 2) * frame_wh
    box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
    match kind:
        case "click":
            return Prompt(points(1))
        case "clicks":
            return Prompt(points(int(rng.integers(2, 4))))
        case "negatives":
            return Prompt(points(int(rng.integers(1, 3))), points(int(rng.integers(1, 4))))
        case "box":
            return Prompt(box=box)
        case "box and clicks":
            return Prompt(points(int(rng.integers(1, 4))), points(int(rng.integers(0, 3))), box)
    x1, y1, x2, y2 = box
    middle = ((low + high) / 2).tolist()
    sides = [(x1, middle[1]), (x2, middle[1]), (middle[0], y1), (middle[0], y2)]
    return Prompt(tuple(sides[index] for index in rng.permutation(4)))


KINDS = ["click", "clicks", "negatives", "box", "box and clicks", "extreme points"]


def test_random_prompts_equal_the_image_predictor(
    weights: str, start: Callable[[], Function], reference: ImageReference
) -> None:
    """Many prompts of every kind, on frames of five sizes."""
    rng = np.random.default_rng(0)
    interactor = start()
    different, partial_masks, partial_kinds = [], 0, set()
    images = frames()
    for number, image in enumerate(images):
        picture = Image.open(io.BytesIO(image))
        reference.set_image(picture)
        for index in range(PROMPTS[weights] // len(images)):
            kind = KINDS[(index + number) % len(KINDS)]
            prompt = random_prompt(kind, picture.size[::-1], rng)
            mask, confidence = ask(interactor, image, prompt)
            if kind == "extreme points":
                prompt = Prompt(prompt.positive, (), extreme_box(prompt.positive))
                assert prompt.box is not None
            expected = reference.predict(prompt)
            if not np.array_equal(mask, expected.mask):
                different.append((number, prompt))
            if expected.mask.any():
                assert confidence == pytest.approx(min(1, max(0, expected.iou)), abs=0.006)
            if 0 < expected.mask.mean() < 1:
                partial_masks += 1
                partial_kinds.add(kind)

    assert different == []
    assert weights == "micro" or partial_masks > PROMPTS[weights] // 2
    assert weights == "micro" or partial_kinds == set(KINDS)


def test_every_further_click_refines_as_the_image_predictor_does(
    start: Callable[[], Function], reference: ImageReference
) -> None:
    """The logits of the previous answer are an input; another replica answers without them."""
    image = frames()[0]
    reference.set_image(Image.open(io.BytesIO(image)))
    clicks = random_prompt("negatives", (180, 320), np.random.default_rng(5))
    clicks = Prompt(
        (*clicks.positive, (160.0, 90.0), (100.0, 60.0)), (*clicks.negative, (5.0, 170.0))
    )
    steps = [Prompt(clicks.positive[:1])]
    steps += [Prompt(clicks.positive[:count]) for count in range(2, len(clicks.positive) + 1)]
    steps += [
        Prompt(clicks.positive, clicks.negative[:count])
        for count in range(1, len(clicks.negative) + 1)
    ]
    interactor, other_replica = start(), start()
    hint = None
    for prompt in steps:
        mask, _ = ask(interactor, image, prompt)
        expected = reference.predict(prompt, hint)
        hint = expected.low_res_logits

        assert np.array_equal(mask, expected.mask)

    alone, _ = ask(other_replica, image, steps[-1])
    assert np.array_equal(alone, reference.predict(steps[-1]).mask)


def test_mask_of_a_click_tracks_on(
    interactor: Function,
    start_function: Callable[[dict[str, str]], Function],
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    """SAM2VideoPredictor tracks the mask of SAM2ImagePredictor to the same masks."""
    function = start_function({"SAM2_BIT_EXACT": "on"})
    clip = jpeg_frames(16)
    image_reference = ImageReference(CONFIG, checkpoint, IMAGE_SIZE, area=AREA)
    image_reference.set_image(Image.open(io.BytesIO(clip[0])))
    click = Prompt(((60.0, 90.0),))
    start = image_reference.predict(click).mask
    followed = Reference(CONFIG, checkpoint, IMAGE_SIZE, write_frames(tmp_path, clip)).track(
        ReferenceObject(start), 4
    )
    images = [base64_text(frame) for frame in clip]
    _, answer = interactor.call({"image": images[0], "pos_points": [[60, 90]], "neg_points": []})
    shape = {key: answer["shapes"][0][key] for key in ("type", "points")}
    states = function.track(images[0], [shape], [])["states"]
    tracked: list[Any] = []
    for image in images[1:5]:
        answer = function.track(image, [None], states)
        states = answer["states"]
        tracked += answer["shapes"]

    assert np.array_equal(decode_cvat_rle(shape["points"], start.shape), start)
    for frame, tracked_shape in enumerate(tracked, start=1):
        mask = decode_cvat_rle(tracked_shape["points"], start.shape)
        assert np.array_equal(mask, followed[frame])
