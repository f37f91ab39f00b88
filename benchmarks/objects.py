"""Time per frame by the number of objects on it, through HTTP and Redis.

    python -m benchmarks.objects --config sam2.1_hiera_t --random --image-size 512 --device cpu

The function, SAM 2's own predictor and a loop over objects whose states lie in Redis find the same
objects on the same frames, in turn, with full memory banks (see `contenders`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.clip import Clip, make_clip
from benchmarks.contenders import open_contenders
from benchmarks.harness import (
    Panel,
    Row,
    add_common_options,
    describe,
    draw,
    report,
    result,
    set_up,
)
from benchmarks.turns import Contender, compare, median, take_turns
from micro_training.metrics import region_iou
from shapes import decode_cvat_rle

COLUMNS = [
    "objects", "ours_ms", "predictor_ms", "loop_ms", "ours_over_predictor", "ours_over_loop",
    "not_network_ms", "not_network_share", "written_bytes", "read_bytes", "loop_written_bytes",
    "loop_read_bytes", "iou_predictor", "iou_loop",
]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what is asked for."""
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
        contenders = open_contenders(
            ("ours", "predictor", "loop"), bench.environment, bench.server, bench.folder, stack
        )
        rows = [measure(contenders, clip, count, options.frames) for count in options.objects]
        found = result("objects", options, bench.environment, rows)
    report(found, options, COLUMNS, plot)


def measure(
    contenders: Mapping[str, Contender], clip: Clip, objects: int, frames: int, warm_up: int = 1
) -> Row:
    """Return the row of one number of objects.

    Bytes are per object and step; how many objects were found, and the mean IoU of our masks with
    the others', tell of the last frame.
    """
    for contender in contenders.values():
        contender.start(clip, objects)
    steps = take_turns(contenders, frames=frames, warm_up=warm_up, name=f"{objects} objects")
    row: Row = {"objects": objects, **compare(steps)}
    for who, prefix in (("ours", ""), ("loop", "loop_")):
        row[f"{prefix}written_bytes"] = round(median(s.written / objects for s in steps[who]))
        row[f"{prefix}read_bytes"] = round(median(s.read / objects for s in steps[who]))
    masks = [
        np.zeros(clip.size_hw, np.bool_)
        if shape is None
        else decode_cvat_rle(shape["points"], clip.size_hw)
        for shape in steps["ours"][-1].answer
    ]
    row["found"] = sum(bool(mask.any()) for mask in masks)
    for who in ("predictor", "loop"):
        pairs = zip(masks, steps[who][-1].answer, strict=True)
        row[f"iou_{who}"] = round(float(np.mean([region_iou(*pair) for pair in pairs])), 6)
    return row


def plot(found: Row, path: Path) -> None:
    """Draw times, ratios and the traffic with Redis."""
    rows = found["rows"]
    draw(
        path,
        title=f"Time per frame by objects, {found['model']['name']}",
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
        caption=describe(found),
    )


if __name__ == "__main__":
    main()
