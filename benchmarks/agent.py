"""Time per frame with several objects through cvat-cli's agents: this tracker, and a loop.

    python -m benchmarks.agent --model-id facebook/sam2.1-hiera-tiny --device cuda

Both run as `cvat-cli function run-agent` against a stub of CVAT's server and track the same frames
alternately; a time lasts from the request to the answer, frames travelling as PNG. The loop is
`references.PerObjectLoop`, the way CVAT's own SAM 2 function tracks. Ours keeps its tracks in a
Redis server, as several agents need it. The ratio is our time divided by the loop's: below 1 we are
faster. Other settings come from the environment.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2

from benchmarks.clip import draw_discs
from benchmarks.comparison import median
from benchmarks.harness import add_common_options, make_result, report, set_up
from shapes import encode_cvat_rle
from testbed.cvat_agent_stub import TOKEN, CvatStub

FUNCTIONS = {"ours": "agent/func.py", "loop": "benchmarks/reference_function.py"}
COLUMNS = ["objects", "ours_ms", "loop_ms", "ours_over_loop"]
REPOSITORY = Path(__file__).parent.parent
WARM_UP_FRAMES = 8  # until every object's memory bank is full
TASK = 1


def start_agent(cvat: CvatStub, file: str, environment: dict[str, str]) -> tuple[int, Any]:
    """Register a function that tracks masks, and start its agent."""
    function = cvat.register(
        {"provider": "native", "kind": "tracker", "supported_shape_types": ["mask"]}
    )
    command = [sys.executable, "-m", "cvat_cli", "--server-host", cvat.url, "function"]
    command += ["run-agent", str(function), "--function-file", str(REPOSITORY / file)]
    return function, subprocess.Popen(  # noqa: S603  # our own program
        command, env=os.environ | environment, stderr=subprocess.DEVNULL, start_new_session=True
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the files that the options name."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument("--frames", type=int, default=20, help="frames to measure")
    parser.add_argument("--size", type=int, nargs=2, default=(720, 1280), metavar=("H", "W"))
    options = parser.parse_args(arguments)

    count = 1 + WARM_UP_FRAMES + options.frames
    pictures, masks = draw_discs(count, options.objects, tuple(options.size))
    frames = [cv2.imencode(".png", picture)[1].tobytes() for picture in pictures]
    shapes = [{"type": "mask", "points": encode_cvat_rle(mask)} for mask in masks]
    cvat = CvatStub({TASK: frames})
    all_ms: dict[str, list[float]] = {name: [] for name in FUNCTIONS}
    with set_up(options) as bench:
        environment = bench.environment | bench.server.environment | {"CVAT_ACCESS_TOKEN": TOKEN}
        agents = {name: start_agent(cvat, file, environment) for name, file in FUNCTIONS.items()}
        try:
            states = {}
            for name, (function, _) in agents.items():
                start = {"type": "init_tracking", "task": TASK, "frame": 0, "shapes": shapes}
                states[name] = cvat.submit(function, **start).result(600)["states"]
            for frame in range(1, count):
                for name, (function, _) in agents.items():
                    begin = time.perf_counter()
                    step = {"type": "track", "task": TASK, "frame": frame, "states": states[name]}
                    cvat.submit(function, **step).result(600)
                    if frame > WARM_UP_FRAMES:
                        all_ms[name].append(round((time.perf_counter() - begin) * 1000, 2))
        finally:
            for _, process in agents.values():
                os.killpg(process.pid, signal.SIGKILL)  # the agent and its worker process
                process.wait()
            cvat.close()
        ours_ms, loop_ms = (median(times) for times in all_ms.values())
        row = {
            "objects": options.objects,
            "ours_ms": ours_ms,
            "loop_ms": loop_ms,
            "ours_over_loop": round(ours_ms / loop_ms, 4),
            "all_ms": all_ms,
        }
        result = make_result("agent", options, bench.environment, [row])
    report(result, options, COLUMNS)


if __name__ == "__main__":
    main()
