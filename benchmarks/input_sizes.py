"""Speed, and with trained weights mask quality, by the size of the model's input.

    python -m benchmarks.input_sizes --model-id micro --device cpu --clips 6
    python -m benchmarks.input_sizes --config sam2.1_hiera_t --random --sizes 512 1024 --clips 0

Speed is that of one object with a full memory bank through HTTP and Redis, measured alternately
with SAM 2's predictor at the same size and with all other sizes. J and F are measured as by
`micro_training.evaluate`: objects of held-out synthetic clips, each tracked from its true mask.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
from tqdm import tqdm

from benchmarks.clip import make_clip
from benchmarks.comparison import TimedTracker, compare, step_alternately
from benchmarks.harness import (
    Bench,
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
from micro_training.function_client import FunctionClient
from micro_training.held_out import choose_held_out
from micro_training.measures import ClipResult, measure_clip
from shapes import ShapeType

COLUMNS = ["image_size", "ours_ms", "over_largest", "predictor_ms", "ours_over_predictor", "j", "f",
           "objects_followed"]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the files that the options name."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 192, 256, 384])
    parser.add_argument("--frames", type=int, default=7, help="frames to time")
    parser.add_argument("--clips", type=int, default=6, help="held-out clips to measure J on")
    parser.add_argument("--size", type=int, nargs=2, default=(720, 1280), metavar=("H", "W"))
    options = parser.parse_args(arguments)
    with set_up(options) as bench:
        environments = {
            size: bench.environment | {"SAM2_IMAGE_SIZE": str(size)} for size in options.sizes
        }
        rows = time_sizes(bench, environments, options.frames, tuple(options.size))
        if options.clips:
            measured = follow_clips(environments, options.clips)
            rows = [row | measured[row["image_size"]] for row in rows]
        result = make_result("input_sizes", options, bench.environment, rows)
    report(result, options, COLUMNS, plot)


def time_sizes(
    bench: Bench,
    environments: Mapping[int, Mapping[str, str]],
    frames: int,
    size_hw: tuple[int, int],
) -> list[Row]:
    """Return a row with the times for each input size."""
    clip = make_clip(bench.folder / "clip", frames + 1, 1, size_hw)
    trackers: dict[str, TimedTracker] = {}
    with ExitStack() as stack:
        for size, environment in environments.items():
            opened = open_trackers(
                ("ours", "predictor"), environment, bench.server, bench.folder, stack
            )
            trackers |= {f"{name} {size}": tracker for name, tracker in opened.items()}
        for tracker in trackers.values():
            tracker.start(clip, 1)
        steps = step_alternately(trackers, frames=frames, name="speed")
    rows = []
    for size in environments:
        same_size = {name: steps[f"{name} {size}"] for name in ("ours", "predictor")}
        rows.append({"image_size": size, **compare(same_size)})
    largest = max(rows, key=lambda row: int(row["image_size"]))
    for row in rows:
        row["over_largest"] = round(row["ours_ms"] / largest["ours_ms"], 4)
    return rows


def follow_clips(environments: Mapping[int, Mapping[str, str]], count: int) -> dict[int, Row]:
    """Return mean J and F by input size, over all objects and frames after the first."""
    clients: dict[int, FunctionClient] = {}
    for size, environment in environments.items():
        with patch.dict(os.environ, environment):
            clients[size] = FunctionClient()
    all_results: dict[int, list[ClipResult]] = {size: [] for size in clients}
    for held_out in tqdm(choose_held_out(count), total=count, unit="clip", leave=False):
        clip = held_out.make()
        masks = [clip.mask(0, body) for body in held_out.bodies]
        for size, client in clients.items():
            answers = client.follow(clip.frames, masks, [ShapeType.MASK] * len(masks))
            all_results[size].append(measure_clip(held_out, clip, answers))
    return {
        size: {
            "j": round(float(np.concatenate([clip_result.j for clip_result in results]).mean()), 4),
            "f": round(float(np.concatenate([clip_result.f for clip_result in results]).mean()), 4),
            "objects_followed": sum(len(clip_result.j) for clip_result in results),
        }
        for size, results in all_results.items()
    }


def plot(result: Row, path: Path) -> None:
    """Draw speed and, where measured, J and F over the size of the input."""
    rows = result["rows"]
    sizes = ", ".join(str(row["image_size"]) for row in rows)
    panels = [
        Panel(
            "time per frame, ms",
            {
                "this function, HTTP and Redis": [row["ours_ms"] for row in rows],
                "SAM2VideoPredictor": [row["predictor_ms"] for row in rows],
            },
        ),
        Panel(
            "ratio of times",
            {"ours / SAM2VideoPredictor": [row["ours_over_predictor"] for row in rows]},
            level=1,
        ),
    ]
    if "j" in rows[0]:
        scores = {"mean J": [row["j"] for row in rows], "mean F": [row["f"] for row in rows]}
        panels.append(Panel(f"held-out clips, {rows[0]['objects_followed']} objects", scores))
    draw(
        path,
        title=f"Speed and masks by the model's input, {result['model']['name']}, 1 object",
        x_label="side of the model's input, px (SAM2_IMAGE_SIZE)",
        x=[row["image_size"] for row in rows],
        panels=panels,
        caption=describe(result | {"model": result["model"] | {"image_size": sizes}}),
    )


if __name__ == "__main__":
    main()
