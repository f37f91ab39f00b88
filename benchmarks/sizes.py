"""Time per frame by the size of the frames, from 480p to 4K, beside SAM 2's predictor.

    python -m benchmarks.sizes --model-id micro --device cpu

The model's input keeps its size; decoding, resizing and masks at full size take longer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.clip import make_clip
from benchmarks.comparison import compare, median, step_alternately
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

SIZES_HW = {"480p": (480, 854), "720p": (720, 1280), "1080p": (1080, 1920), "4K": (2160, 3840)}
COLUMNS = ["size", "objects", "ours_ms", "predictor_ms", "ours_over_predictor", "not_network_ms",
           "not_network_share", "predictor_loading_ms", "jpeg_bytes"]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the files that the options name."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument("--sizes", nargs="+", choices=SIZES_HW, default=list(SIZES_HW))
    parser.add_argument("--objects", type=int, default=1)
    parser.add_argument("--frames", type=int, default=7, help="frames to measure")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    with set_up(options) as bench, ExitStack() as stack:
        trackers = open_trackers(
            ("ours", "predictor"), bench.environment, bench.server, bench.folder, stack
        )
        for size in options.sizes:
            clip = make_clip(
                bench.folder / size, options.frames + 1, options.objects, SIZES_HW[size]
            )
            for tracker in trackers.values():
                tracker.start(clip, options.objects)
            steps = step_alternately(trackers, frames=options.frames, name=size)
            rows.append(
                {
                    "size": size,
                    "pixels": SIZES_HW[size][0] * SIZES_HW[size][1],
                    "objects": options.objects,
                    "jpeg_bytes": round(median(map(len, clip.frames))),
                    "predictor_loading_ms": steps["predictor"][0].loading_ms,
                    **compare(steps),
                }
            )
        result = make_result("sizes", options, bench.environment, rows)
    report(result, options, COLUMNS, plot)


def plot(result: Row, path: Path) -> None:
    """Draw times over the number of pixels of a frame."""
    rows = result["rows"]
    draw(
        path,
        title=f"Time per frame by frame size, {result['model']['name']}",
        x_label=f"frame size; objects on the frame: {result['options']['objects']}",
        x=[row["pixels"] for row in rows],
        ticks={row["pixels"]: row["size"] for row in rows},
        log_x=True,
        panels=[
            Panel(
                "time per frame, ms",
                {
                    "this function, HTTP and Redis": [row["ours_ms"] for row in rows],
                    "of that, not the network": [row["not_network_ms"] for row in rows],
                    "SAM2VideoPredictor": [row["predictor_ms"] for row in rows],
                },
            ),
            Panel(
                "ratio of times",
                {"ours / SAM2VideoPredictor": [row["ours_over_predictor"] for row in rows]},
                level=1,
            ),
        ],
        caption=describe(result),
    )


if __name__ == "__main__":
    main()
