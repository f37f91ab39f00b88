"""Evaluate the bundled model on held-out clips, through the function's handler.

    python -m micro_training.evaluate --out DIR

Prints a table and writes `results.json` and `j.png`.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from micro_training.clips import Clip
from micro_training.function_client import FunctionClient
from micro_training.held_out import CLIPS, FRAMES, HeldOut, choose_held_out
from micro_training.measures import ClipResult, j_over_time, measure_clip, summarise
from micro_training.model import CHECKPOINT
from micro_training.plot import draw_curves
from shapes import ShapeType

# Bars by name in the table: the least value to reach, or the most for `LESS_IS_BETTER`.
BARS = {
    "mask prompt": {"j": 0.80, "found_again": 0.70, "hidden_null": 0.80, "swapped": 0.15},
    "box prompt": {"j": 0.75},
}
LESS_IS_BETTER = ("swapped",)
KINDS = {"mask prompt": ShapeType.MASK, "box prompt": ShapeType.RECTANGLE}


def track_clip(client: FunctionClient, held_out: HeldOut, clip: Clip) -> dict[str, ClipResult]:
    """Track each object twice, once per kind of prompt, in the same requests."""
    masks = [clip.mask(0, body) for body in held_out.bodies]
    kinds = [kind for kind in KINDS.values() for _ in masks]
    answers = client.follow(clip.frames, masks * len(KINDS), kinds)
    count = len(masks)
    return {
        name: measure_clip(held_out, clip, [row[i * count : (i + 1) * count] for row in answers])
        for i, name in enumerate(KINDS)
    }


def time_steps(client: FunctionClient, clip: Clip, body: int) -> float:
    """Return the median time of a request that tracks one object, in milliseconds."""
    client.request_ms.clear()
    client.follow(clip.frames, [clip.mask(0, body)], [ShapeType.MASK])
    return statistics.median(client.request_ms[1:])


def print_table(summaries: dict[str, dict[str, float]]) -> None:
    """Print every value, and its bar where it has one."""
    for name, summary in summaries.items():
        print(f"\n{name}")
        for key, value in summary.items():
            bar = BARS[name].get(key)
            if bar is None:
                print(f"  {key:<14}{value:8.3f}")
                continue
            sign, met = ("<=", value <= bar) if key in LESS_IS_BETTER else (">=", value >= bar)
            print(f"  {key:<14}{value:8.3f}   bar {sign} {bar:.2f} {'met' if met else 'MISSED'}")


def main() -> None:
    """Evaluate, print, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=CLIPS, help="fewer for a quick look")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    client = FunctionClient()
    results: dict[str, list[ClipResult]] = {name: [] for name in KINDS}
    for held_out in tqdm(choose_held_out(arguments.clips), total=arguments.clips, unit="clip"):
        clip = held_out.make()
        for name, result in track_clip(client, held_out, clip).items():
            results[name].append(result)
    step_ms = time_steps(client, clip, held_out.bodies[0])
    summaries = {name: summarise(rows) for name, rows in results.items()}
    curves = {name: j_over_time(rows) for name, rows in results.items()}
    checkpoint = Path(os.environ.get("SAM2_CHECKPOINT", CHECKPOINT))
    machine = {
        "checkpoint_mb": checkpoint.stat().st_size / 1e6,
        "load_s": client.load_s,
        "step_ms": step_ms,
        "minutes": (time.perf_counter() - begin) / 60,
    }
    print_table(summaries)
    print("\n" + "\n".join(f"{key:<16}{value:8.2f}" for key, value in machine.items()))
    for name, curve in curves.items():
        points = "  ".join(f"{t}: {curve[t - 1]:.2f}" for t in (1, 5, 10, 20, 30, FRAMES - 1))
        print(f"J at frame, {name}: {points}")
    per_clip = {
        name: [
            {"j": float(np.mean(r.j)), "hidden_null": r.hidden_null, "found": r.found,
             "swapped": r.swapped}
            for r in rows
        ]
        for name, rows in results.items()
    }  # fmt: skip
    (arguments.out / "results.json").write_text(
        json.dumps(
            {"summaries": summaries, "machine": machine, "j_over_time": curves, "clips": per_clip},
            indent=1,
        )
        + "\n"
    )
    draw_curves(curves, f"mean J, {arguments.clips} held-out clips", arguments.out / "j.png")


if __name__ == "__main__":
    main()
