"""Time of the first click on a frame, and of further clicks on it.

    python -m benchmarks.interactor_clicks --config sam2.1_hiera_t --random --device cpu

The first click on a frame encodes it; a further click needs only the prompt encoder, the mask
decoder and the answer. Requests go through the interactor's handler. Time does not depend on the
weights. The ratio is a further click's time divided by the first click's; `reached` compares it
with the largest ratio allowed.
"""

from __future__ import annotations

import argparse
import base64
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
from nuclio_sdk import Context, Event, Logger

from benchmarks.comparison import median
from benchmarks.harness import (
    add_common_options,
    against_bar,
    make_result,
    model_environment,
    report,
)
from interaction import main as function

FRAME_HW = (720, 1280)
CLICKS = 8
BAR = 0.05  # the largest ratio allowed
COLUMNS = ["frames", "first_ms", "further_ms", "further_over_first"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the files that the options name."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument("--frames", type=int, default=3)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        environment = model_environment(options, Path(folder))
        context = Context(logger=Logger(level="INFO"), worker_id=0)
        with mock.patch.dict(os.environ, environment):
            function.init_context(context)
        all_ms = [time_clicks(context, seed) for seed in range(options.frames)]
        first_ms = median(times[0] for times in all_ms)
        further_ms = median(ms for times in all_ms for ms in times[1:])
        ratio = round(further_ms / first_ms, 4)
        row = {
            "frames": options.frames,
            "first_ms": first_ms,
            "further_ms": further_ms,
            "further_over_first": ratio,
            "all_ms": all_ms,
        }
        result = make_result("interactor_clicks", options, environment, [row])
    result["reached"] = {"further_over_first": against_bar(ratio, BAR)}
    report(result, options, COLUMNS)
    print(f"at most {BAR}: {'met' if ratio <= BAR else 'MISSED'}")


def time_clicks(context: Context, seed: int) -> list[float]:
    """Return the milliseconds of each click on a new frame."""
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
        times.append(round((time.perf_counter() - begin) * 1000, 2))
        assert response.status_code == 200, response.body
    return times


if __name__ == "__main__":
    main()
