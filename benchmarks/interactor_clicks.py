"""Times the clicks on one frame, as JSON.

    python -m benchmarks.interactor_clicks

The first click on a frame encodes it, every further one costs the prompt encoder, the mask decoder
and the answer only. Whole requests through the interactor's handler, at the model's full input
size. Time does not depend on the weights: without a checkpoint, random ones are used.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from nuclio_sdk import Context, Event, Logger

import interactor_main as function
from benchmarks.harness import machine
from tests.random_weights import write_checkpoint

CONFIG = "configs/sam2.1/sam2.1_hiera_t.yaml"
FRAME_HW = (720, 1280)
CLICKS = 8
BAR = 0.05


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="weights of the tiny config")
    parser.add_argument("--frames", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or write_checkpoint(CONFIG, Path(folder, "tiny.pt"))
        os.environ |= {"SAM2_CONFIG": CONFIG, "SAM2_CHECKPOINT": str(checkpoint)}
        os.environ.setdefault("SAM2_DEVICE", "cpu")
        context = Context(logger=Logger(level="INFO"), worker_id=0)
        function.init_context(context)
    rows = [time_clicks(context, seed) for seed in range(options.frames)]
    first_ms = statistics.median(row[0] for row in rows)
    further_ms = statistics.median(ms for row in rows for ms in row[1:])
    result = {
        "first_click_ms": round(first_ms),
        "further_click_ms": round(further_ms),
        "ratio": round(further_ms / first_ms, 4),
        "bar": BAR,
        "met": further_ms <= BAR * first_ms,
        "frame": f"{FRAME_HW[1]} x {FRAME_HW[0]} PNG",
        "model": f"{CONFIG}, 1024 px",
        "machine": machine(os.environ["SAM2_DEVICE"]),
    }
    print(json.dumps(result, indent=1))


def time_clicks(context: Context, seed: int) -> list[float]:
    """Return the milliseconds of each click on a frame that the function has not seen."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (9, 16, 3), dtype=np.uint8)
    frame = cv2.resize(coarse, FRAME_HW[::-1], interpolation=cv2.INTER_CUBIC)
    image = base64.b64encode(cv2.imencode(".png", frame)[1].tobytes()).decode()
    points = rng.uniform(0, FRAME_HW[0], (CLICKS, 2)).tolist()
    times = []
    for count in range(1, CLICKS + 1):
        body = {"image": image, "pos_points": points[:count], "neg_points": [], "obj_bbox": []}
        begin = time.perf_counter()
        response = function.handler(context, Event(body=body, method="POST"))
        times.append((time.perf_counter() - begin) * 1000)
        assert response.status_code == 200, response.body
    return times


if __name__ == "__main__":
    main()
