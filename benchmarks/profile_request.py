"""Where the time of one request goes: the network's operators and the function's own stages.

    python -m benchmarks.profile_request --config sam2.1_hiera_t --random --device cpu --out FILE

One 1080p frame with 1 and with 8 objects, full memory banks, the function's handler in this process
and a Redis server beside it; with `SAM2_BIT_EXACT` on, which is SAM 2's own modules, and off.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from nuclio_sdk.logger import HumanReadableFormatter
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.clip import FIRST_NEW_FRAME, Clip, make_clip
from benchmarks.contenders import fill_banks, last_report, open_store
from benchmarks.harness import Bench, Row, add_common_options, describe, report, result, set_up
from benchmarks.turns import median
from shapes import encode_cvat_rle
from tests.clips import base64_text
from tests.conftest import Function

OPERATORS = 20
COLUMNS = ["bit_exact", "objects", "ours_ms"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--frames", type=int, default=5, help="frames to time before the profile")
    parser.add_argument("--size", type=int, nargs=2, default=(1080, 1920), metavar=("H", "W"))
    parser.add_argument("--out", type=Path, help="where to write the profile, as text")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    text = []
    with set_up(options) as bench:
        clip = make_clip(
            bench.folder / "clip", options.frames + 2, max(options.objects), tuple(options.size)
        )
        for bit_exact in ("on", "off"):
            worker = Worker(bench, {"SAM2_BIT_EXACT": bit_exact})
            with closing(worker):
                for objects in options.objects:
                    worker.start(clip, objects)
                    row, table = worker.profile(options.frames)
                    rows.append({"bit_exact": bit_exact, "objects": objects, **row})
                    text.append(f"{heading(rows[-1])}\n{table}")
        found = result("profile_request", options, bench.environment, rows)
    report(found, options, COLUMNS)
    whole = "\n\n".join([describe(found), *text]) + "\n"
    print(whole)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(whole)


def heading(row: Row) -> str:
    """Return what was profiled and the stages of a request, in milliseconds."""
    stages = ", ".join(f"{name} {ms:.1f}" for name, ms in row["stages_ms"].items())
    setting, count = f"SAM2_BIT_EXACT={row['bit_exact']}", row["objects"]
    return f"{setting}, objects: {count}; without profiler {row['ours_ms']:.1f} ms ({stages})"


class Worker:
    """The function's handler in this process.

    Args:
        bench: Model and Redis server.
        settings: Further variables.
    """

    def __init__(self, bench: Bench, settings: dict[str, str]) -> None:
        environment = bench.environment | bench.server.environment | settings
        self._function = Function("main", environment | {"SAM2_REQUEST_LIMIT": "86400"})
        self._log = io.StringIO()
        self._function.context.logger.set_handler("default", self._log, HumanReadableFormatter())
        self._store = open_store(bench.server)

    def start(self, clip: Clip, objects: int) -> None:
        """Begin objects on a clip's first frame, with full memory banks."""
        self._frames = iter([base64_text(frame) for frame in clip.frames[FIRST_NEW_FRAME:]])
        shapes = [
            {"type": "mask", "points": encode_cvat_rle(mask)} for mask in clip.masks[:objects]
        ]
        answer = self._function.track(base64_text(clip.frames[0]), shapes, [])
        self._states = fill_banks(self._store, answer["states"])
        self._step()  # reads the memories

    def profile(self, frames: int) -> tuple[Row, str]:
        """Time requests, profile one more, and return both and its operators as a table."""
        times = [self._step() for _ in tqdm(range(frames), unit="frame", leave=False)]
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        with profile(activities=activities) as profiler:
            self._step()
        averages = profiler.key_averages()
        row: Row = {
            "ours_ms": median(sum(spent.values()) for spent in times),
            "stages_ms": {name: median(spent[name] for spent in times) for name in times[0]},
            "operators": [
                {"name": one.key, "calls": one.count, "self_ms": one.self_cpu_time_total / 1000}
                for one in sorted(averages, key=lambda one: -one.self_cpu_time_total)[:OPERATORS]
            ],
        }
        table = averages.table(
            sort_by="self_cpu_time_total", row_limit=OPERATORS, max_name_column_width=48
        )
        return row, str(table)

    def close(self) -> None:
        """Let go of the connections."""
        self._store.close()
        self._function.context.user_data.service.store.close()

    def _step(self) -> dict[str, float]:
        """Find the objects on the next frame; return the stages' times in milliseconds."""
        answer = self._function.track(next(self._frames), [None] * len(self._states), self._states)
        self._states = answer["states"]
        times: dict[str, Any] = last_report(self._log.getvalue())["times_ms"]
        return times


if __name__ == "__main__":
    main()
