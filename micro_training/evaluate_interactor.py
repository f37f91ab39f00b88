"""Measures the interactor with the bundled model on held-out frames, through its own handler.

`python -m micro_training.evaluate_interactor --out DIR` prints two tables and writes
`interactor.json`: mean IoU by kind of prompt, and by number of clicks of a simulated annotator.
"""

import argparse
import base64
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from unittest.mock import patch

import cv2
import numpy as np
import numpy.typing as npt
from nuclio_sdk import Context, Event, Logger
from tqdm import tqdm

from interaction import main as function
from interaction.protocol import Point, Prompt
from micro_training.clips import HELD_OUT_SEEDS, Script, make_clip
from micro_training.function_client import micro_environment
from micro_training.metrics import region_iou
from shapes import Mask, decode_cvat_rle, mask_to_box

FRAMES = 40
SIZE_HW = (360, 640)
MAX_OBJECTS = 3
_MIN_SHARE = 0.004  # smaller objects are left out, as for the tracker

KINDS = ("1 click", "3 clicks", "clicks with negatives", "box", "box + clicks", "4 extreme points")
CURVE_CLICKS = 8
NOC_IOU = 0.80
NOC_CLICKS = 20  # objects that are not there by then count as this, as in f-BRS


class Segments(Protocol):
    """What the simulated annotator talks to."""

    def ask(self, prompt: Prompt) -> Mask:
        """Return the mask for a prompt, `(H, W)`."""


class InteractorClient:
    """Starts the interactor as Nuclio does and sends it one frame after another."""

    def __init__(self) -> None:
        """Start the interactor; `request_ms` collects the time of each request."""
        self._context = Context(logger=Logger(level="INFO"), worker_id=0)
        with micro_environment(), patch.dict(os.environ, SAM2_INTERACTOR_EXTREME_POINTS="on"):
            function.init_context(self._context)
        self.request_ms: list[float] = []

    def show(self, frame: npt.NDArray[np.uint8]) -> None:
        """Send an `(H, W, 3)` RGB frame with all prompts from here on."""
        self._size_hw = frame.shape[:2]
        _, png = cv2.imencode(".png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        self._image = base64.b64encode(png.tobytes()).decode()

    def ask(self, prompt: Prompt) -> Mask:
        """Return the answered mask, `(H, W)`."""
        body = {
            "image": self._image,
            "pos_points": [list(point) for point in prompt.positive],
            "neg_points": [list(point) for point in prompt.negative],
            "obj_bbox": list(prompt.box or ()),
        }
        begin = time.perf_counter()
        response = function.handler(self._context, Event(body=body, method="POST"))
        self.request_ms.append((time.perf_counter() - begin) * 1000)
        assert response.status_code == 200, response.body
        shapes = json.loads(response.body)["shapes"]
        if not shapes:
            return np.zeros(self._size_hw, np.bool_)
        return decode_cvat_rle(shapes[0]["points"], self._size_hw)


def held_out_objects(count: int) -> Iterator[tuple[npt.NDArray[np.uint8], list[Mask]]]:
    """Yield frames that training never saw, each with the masks of the objects to segment."""
    seeds = iter(HELD_OUT_SEEDS)
    while count:
        clip = make_clip(next(seeds), frames=1, size_hw=SIZE_HW, script=Script(event="none"))
        bodies = [body for body, role in enumerate(clip.roles) if role == "object"]
        masks = [mask for mask in (clip.mask(0, body) for body in bodies)
                 if mask.mean() >= _MIN_SHARE][:MAX_OBJECTS]  # fmt: skip
        if masks:
            count -= 1
            yield clip.frames[0], masks


def prompts_of(mask: Mask, rng: np.random.Generator) -> dict[str, Prompt]:
    """Return one prompt of each kind, those with more clicks before those they begin with.

    The interactor refines the answer to an earlier prompt that a later one continues: in this order
    each kind is answered by itself.
    """
    positive = spread_clicks(mask, 3)
    beside = background_near(mask)
    negative = spread_clicks(beside, 2)
    box = draw_box(mask, rng)
    return {
        "clicks with negatives": Prompt(positive[:2], negative),
        "3 clicks": Prompt(positive),
        "1 click": Prompt(positive[:1]),
        "box + clicks": Prompt(positive[:1], negative[:1], box),
        "box": Prompt(box=box),
        "4 extreme points": Prompt(extreme_points(mask)),
    }


def spread_clicks(region: Mask, count: int) -> tuple[Point, ...]:
    """Click the pixel deepest inside a region, then where it is deepest apart from the clicks."""
    region = region.copy()
    points = []
    for _ in range(count):
        if not region.any():
            break
        depth, (x, y) = deepest(region)
        points.append((x, y))
        cv2.circle(region.view(np.uint8), (int(x), int(y)), max(2, int(depth * 0.8)), 0, -1)
    return tuple(points)


def background_near(mask: Mask) -> Mask:
    """Return what is not the object in its box with a margin of a fifth of the box's sides."""
    x1, y1, x2, y2 = mask_to_box(mask) or (0, 0, 0, 0)
    margin_x, margin_y = (x2 - x1) // 5 + 2, (y2 - y1) // 5 + 2
    near = np.zeros_like(mask)
    near[max(0, y1 - margin_y) : y2 + margin_y, max(0, x1 - margin_x) : x2 + margin_x] = True
    return near & ~mask


def draw_box(mask: Mask, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Draw the object's box, each corner moved as people do.

    Source:
        The jitter (a tenth of the side, at most 20 of 1024 pixels) is SAM's, appendix A.
    """
    x1, y1, x2, y2 = mask_to_box(mask) or (0, 0, 0, 0)
    bound = np.minimum(0.1 * np.array([x2 - x1, y2 - y1]), 20 / 1024 * max(mask.shape))
    corners = np.array([[x1, y1], [x2, y2]]) + rng.uniform(-1, 1, (2, 2)) * bound
    left, top, right, bottom = np.clip(corners, 0, mask.shape[::-1]).ravel().tolist()
    return left, top, right, bottom


def extreme_points(mask: Mask) -> tuple[Point, ...]:
    """Click the middle of the object's left-most, top-most, right-most and bottom-most pixels."""
    rows, columns = np.nonzero(mask)
    sides = (columns == columns.min(), rows == rows.min(),
             columns == columns.max(), rows == rows.max())  # fmt: skip
    return tuple((float(np.median(columns[side])), float(np.median(rows[side]))) for side in sides)


def deepest(region: Mask) -> tuple[float, Point]:
    """Return how far the pixel deepest inside lies from the region's edge, and where it is."""
    padded = np.pad(region, 1).astype(np.uint8)  # the frame's border is an edge
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, 0)[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return float(depth[row, column]), (float(column), float(row))


def next_click(truth: Mask, answered: Mask, prompt: Prompt) -> Prompt:
    """Add a click in the middle of the largest wrong region.

    Source: `Clicker._get_next_click` of f-BRS (saic-vul/fbrs_interactive_segmentation): the region
        is the one whose middle lies deepest; a pixel is not clicked twice.
    """
    unclicked = np.ones_like(truth)
    for x, y in (*prompt.positive, *prompt.negative):
        unclicked[int(y), int(x)] = False
    missed, at_missed = deepest(truth & ~answered & unclicked)
    extra, at_extra = deepest(~truth & answered & unclicked)
    if missed > extra:
        return Prompt((*prompt.positive, at_missed), prompt.negative)
    if extra > 0:
        return Prompt(prompt.positive, (*prompt.negative, at_extra))
    return prompt  # nothing is wrong


def annotate(client: Segments, truth: Mask) -> list[float]:
    """Click until IoU reaches `NOC_IOU`, and in any case `CURVE_CLICKS` times; return the IoUs."""
    ious: list[float] = []
    prompt, answered = Prompt(), np.zeros_like(truth)
    while len(ious) < CURVE_CLICKS or (max(ious) < NOC_IOU and len(ious) < NOC_CLICKS):
        prompt = next_click(truth, answered, prompt)
        answered = client.ask(prompt)
        ious.append(region_iou(answered, truth))
    return ious


def clicks_needed(ious: list[float]) -> int:
    """Return the number of clicks to `NOC_IOU`."""
    reached = [count for count, iou in enumerate(ious, start=1) if iou >= NOC_IOU]
    return min([*reached, NOC_CLICKS])


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=FRAMES, help="fewer for a quick look")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    client = InteractorClient()
    rng = np.random.default_rng(0)
    by_kind: dict[str, list[float]] = {kind: [] for kind in KINDS}
    loops: list[list[float]] = []
    for frame, masks in tqdm(held_out_objects(arguments.frames), total=arguments.frames):
        client.show(frame)
        for mask in masks:
            for kind, prompt in prompts_of(mask, rng).items():
                by_kind[kind].append(region_iou(client.ask(prompt), mask))
            loops.append(annotate(client, mask))
    needed = [clicks_needed(ious) for ious in loops]
    results = {
        "objects": len(loops),
        "iou_by_kind": {kind: float(np.mean(ious)) for kind, ious in by_kind.items()},
        "iou_by_clicks": np.mean([ious[:CURVE_CLICKS] for ious in loops], axis=0).tolist(),
        "noc": float(np.mean(needed)),
        "reached": float(np.mean([max(ious) >= NOC_IOU for ious in loops])),
        "median_request_ms": float(np.median(client.request_ms)),
        "minutes": (time.perf_counter() - begin) / 60,
    }
    print_tables(results)
    (arguments.out / "interactor.json").write_text(json.dumps(results, indent=1) + "\n")


def print_tables(results: dict[str, object]) -> None:
    """Print what was measured as the model card shows it."""
    by_kind, by_clicks = results["iou_by_kind"], results["iou_by_clicks"]
    assert isinstance(by_kind, dict)
    assert isinstance(by_clicks, list)
    print(f"\n{results['objects']} objects\n\n| prompt | mean IoU |\n| --- | --- |")
    for kind, iou in by_kind.items():
        print(f"| {kind} | {iou:.2f} |")
    print("\n| clicks | " + " | ".join(str(count + 1) for count in range(len(by_clicks))) + " |")
    print("| --- " * (len(by_clicks) + 1) + "|")
    print("| mean IoU | " + " | ".join(f"{iou:.2f}" for iou in by_clicks) + " |")
    print(
        f"\nNoC@{NOC_IOU:.2f} (at most {NOC_CLICKS}): {results['noc']:.1f}; "
        f"reached by {results['reached']:.0%} of the objects; "
        f"{results['median_request_ms']:.0f} ms a request; {results['minutes']:.1f} minutes"
    )


if __name__ == "__main__":
    main()
