"""Profile one request: time per stage of the function and per operator of the network.

    python -m benchmarks.profile_request --config sam2.1_hiera_t --random --device cpu --out FILE

One 1080p frame with 1 and with 8 objects and full memory banks. The function's handler runs in this
process, on a Redis server. `SAM2_BIT_EXACT` on (SAM 2's own modules) and off are measured
alternately.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from nuclio_sdk.logger import HumanReadableFormatter
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.clip import FIRST_NEW_FRAME, Clip, make_clip
from benchmarks.comparison import median, median_stages
from benchmarks.harness import (
    Bench,
    Row,
    add_common_options,
    describe,
    make_result,
    report,
    set_up,
    table,
)
from benchmarks.memory_banks import fill_memory_banks, open_store
from benchmarks.trackers import last_report
from shapes import encode_cvat_rle
from testbed.drawn_frames import base64_text
from testbed.functions import Function

OPERATORS = 20  # the costliest, in the result
SHOWN = 10  # of these, on the screen
COLUMNS = ["objects", "bit_exact", "ms", "over_bit_exact"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile, print, and write the files that the options name."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--frames", type=int, default=5, help="frames to time before the profile")
    parser.add_argument("--size", type=int, nargs=2, default=(1080, 1920), metavar=("H", "W"))
    parser.add_argument("--out", type=Path, help="where to write the full profiles, as text")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    full_profiles = []
    with set_up(options) as bench, ExitStack() as stack:
        clip = make_clip(
            bench.folder / "clip", options.frames + 2, max(options.objects), tuple(options.size)
        )
        log = io.StringIO()
        workers = {
            setting: stack.enter_context(closing(Worker(bench, {"SAM2_BIT_EXACT": setting}, log)))
            for setting in ("on", "off")
        }
        for objects in options.objects:
            for worker in workers.values():
                worker.start(clip, objects)
            steps = [
                {setting: worker.step() for setting, worker in workers.items()}
                for _ in tqdm(range(options.frames), unit="frame", leave=False)
            ]
            for setting, worker in workers.items():
                times = [step[setting] for step in steps]
                row: Row = {
                    "objects": objects,
                    "bit_exact": setting,
                    "ms": median(sum(stages.values()) for stages in times),
                    "stages_ms": median_stages(times),
                }
                operators, full_profile = worker.profile()
                full_profiles.append(f"{heading(row)}\n{full_profile}")
                rows.append(row | {"operators": operators})
            on, off = rows[-2:]
            off["over_bit_exact"] = round(off["ms"] / on["ms"], 4)
        result = make_result("profile_request", options, bench.environment, rows)
    report(result, options, COLUMNS)
    for on, off in zip(rows[::2], rows[1::2], strict=True):
        print(f"\n{heading(on)}\n{heading(off)}\n{side_by_side(on, off)}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n\n".join([describe(result), *full_profiles]) + "\n")


def heading(row: Row) -> str:
    """Describe a profiled setting, with the milliseconds of a request's stages."""
    stages = ", ".join(f"{name} {ms:.1f}" for name, ms in row["stages_ms"].items())
    setting, count = f"SAM2_BIT_EXACT={row['bit_exact']}", row["objects"]
    return f"{setting}, objects: {count}; without profiler {row['ms']:.1f} ms ({stages})"


def side_by_side(on: Row, off: Row) -> str:
    """Return a table of the costliest operators in milliseconds, bit-exact on and off."""
    on_ms, off_ms = ({op["name"]: op["self_ms"] for op in row["operators"]} for row in (on, off))
    costs = {name: max(on_ms.get(name, 0), off_ms.get(name, 0)) for name in on_ms | off_ms}
    names = sorted(costs, key=lambda name: -costs[name])[:SHOWN]
    columns = ["operator", "on", "off"]
    shown = [{"operator": n, "on": on_ms.get(n), "off": off_ms.get(n)} for n in names]
    return table(shown, columns)


class Worker:
    """The function's handler in this process.

    Args:
        bench: Model and Redis server.
        settings: Further settings.
        log: Collects the log; all workers share one, as a process has only one logger.
    """

    def __init__(self, bench: Bench, settings: dict[str, str], log: io.StringIO) -> None:
        environment = bench.environment | bench.server.environment | settings
        self._function = Function("main", environment | {"SAM2_REQUEST_LIMIT": "86400"})
        self._log = log
        self._function.context.logger.set_handler("default", self._log, HumanReadableFormatter())
        self._store = open_store(bench.server)

    def start(self, clip: Clip, objects: int) -> None:
        """Start objects on a clip's first frame, with full memory banks."""
        self._frames = iter([base64_text(frame) for frame in clip.frames[FIRST_NEW_FRAME:]])
        shapes = [
            {"type": "mask", "points": encode_cvat_rle(mask)} for mask in clip.masks[:objects]
        ]
        answer = self._function.track(base64_text(clip.frames[0]), shapes, [])
        self._states = fill_memory_banks(self._store, answer["states"])
        self.step()  # reads the memories from Redis, so that later steps find them in the cache

    def step(self) -> dict[str, float]:
        """Track the objects to the next frame; return the stages' times in milliseconds."""
        answer = self._function.track(next(self._frames), [None] * len(self._states), self._states)
        self._states = answer["states"]
        times: dict[str, Any] = last_report(self._log.getvalue())["times_ms"]
        return times

    def profile(self) -> tuple[list[Row], str]:
        """Profile a request; return its costliest operators, as rows and as a table."""
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        with profile(activities=activities) as profiler:
            self.step()
        averages = profiler.key_averages()
        operators = [
            {"name": event.key, "calls": event.count, "self_ms": event.self_cpu_time_total / 1000}
            for event in sorted(averages, key=lambda event: -event.self_cpu_time_total)[:OPERATORS]
        ]
        full_profile = averages.table(
            sort_by="self_cpu_time_total", row_limit=OPERATORS, max_name_column_width=48
        )
        return operators, str(full_profile)

    def close(self) -> None:
        """Close the connections."""
        self._store.close()
        self._function.context.user_data.service.store.close()


if __name__ == "__main__":
    main()
