"""Time per frame by the number of objects on it, through HTTP and Redis.

    python -m benchmarks.objects --config sam2.1_hiera_t --random --image-size 512 --device cpu

The function, SAM 2's own predictor and a loop over objects with its states in Redis track the same
objects on the same frames, alternately, with full memory banks (see `trackers`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.clip import Clip, make_clip
from benchmarks.comparison import TimedTracker, compare, median, step_alternately
from benchmarks.harness import (
    Panel,
    Row,
    add_common_options,
    describe,
    draw,
    make_result,
    report,
    set_up,
)
from benchmarks.trackers import open_trackers
from micro_training.metrics import region_iou
from shapes import decode_cvat_rle

COLUMNS = [
    "objects", "ours_ms", "predictor_ms", "loop_ms", "ours_over_predictor", "ours_over_loop",
    "not_network_ms", "not_network_share", "written_bytes", "read_bytes", "loop_written_bytes",
    "loop_read_bytes", "iou_predictor", "iou_loop",
]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the files that the options name."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--frames", type=int, default=5, help="frames to measure")
    parser.add_argument("--size", type=int, nargs=2, default=(1080, 1920), metavar=("H", "W"))
    options = parser.parse_args(arguments)
    with set_up(options) as bench, ExitStack() as stack:
        clip = make_clip(
            bench.folder / "clip", options.frames + 1, max(options.objects), tuple(options.size)
        )
        trackers = open_trackers(
            ("ours", "predictor", "loop"), bench.environment, bench.server, bench.folder, stack
        )
        rows = [measure(trackers, clip, count, options.frames) for count in options.objects]
        result = make_result("objects", options, bench.environment, rows)
    report(result, options, COLUMNS, plot)


def measure(
    trackers: Mapping[str, TimedTracker], clip: Clip, objects: int, frames: int, warm_up: int = 1
) -> Row:
    """Measure one number of objects and return its row.

    Bytes are per object and step. The number of objects found, and the mean IoU of our masks with
    those of the others, are of the last frame.
    """
    for tracker in trackers.values():
        tracker.start(clip, objects)
    steps = step_alternately(trackers, frames=frames, warm_up=warm_up, name=f"{objects} objects")
    row: Row = {"objects": objects, **compare(steps)}
    for name, prefix in (("ours", ""), ("loop", "loop_")):
        row[f"{prefix}written_bytes"] = round(median(s.written / objects for s in steps[name]))
        row[f"{prefix}read_bytes"] = round(median(s.read / objects for s in steps[name]))
    masks = [
        np.zeros(clip.size_hw, np.bool_)
        if shape is None
        else decode_cvat_rle(shape["points"], clip.size_hw)
        for shape in steps["ours"][-1].answer
    ]
    row["found"] = sum(bool(mask.any()) for mask in masks)
    for name in ("predictor", "loop"):
        pairs = zip(masks, steps[name][-1].answer, strict=True)
        row[f"iou_{name}"] = round(float(np.mean([region_iou(*pair) for pair in pairs])), 6)
    return row


def plot(result: Row, path: Path) -> None:
    """Draw times and ratios over the number of objects."""
    rows = result["rows"]
    draw(
        path,
        title=f"Time per frame by objects, {result['model']['name']}",
        x_label="objects on the frame",
        x=[row["objects"] for row in rows],
        log_x=True,
        panels=[
            Panel(
                "time per frame, ms",
                {
                    "this function, HTTP and Redis": [row["ours_ms"] for row in rows],
                    "SAM2VideoPredictor": [row["predictor_ms"] for row in rows],
                    "loop per object, Redis": [row["loop_ms"] for row in rows],
                },
                log=True,
            ),
            Panel(
                "ratio of times",
                {
                    "ours / SAM2VideoPredictor": [row["ours_over_predictor"] for row in rows],
                    "ours / loop per object": [row["ours_over_loop"] for row in rows],
                },
                level=1,
            ),
        ],
        caption=describe(result),
    )


if __name__ == "__main__":
    main()
