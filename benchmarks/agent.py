"""Time per frame with several objects through cvat-cli's agents: this tracker, and a loop.

    python -m benchmarks.agent --model-id facebook/sam2.1-hiera-tiny --device cuda

Both run as `cvat-cli function run-agent` against a stand-in for CVAT, and are asked for the same
frames in turn; a time lasts from the request to the answer, frames travelling as PNG. The loop is
`references.PerObjectLoop`, how CVAT's own SAM 2 function tracks. Ours keeps its tracks in a Redis
server, as several agents need it. Other settings come from the environment.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2

from benchmarks.clip import draw_discs
from benchmarks.harness import describe_machine, machine
from shapes import encode_cvat_rle
from tests.conftest import RedisServer
from tests.cvat_agent_stub import TOKEN, CvatStub

FUNCTIONS = {"tracker": "agent/func.py", "per-object loop": "benchmarks/reference_function.py"}
REPOSITORY = Path(__file__).parent.parent
WARM_UP_FRAMES = 8  # until every object's memory is full
TASK = 1


def start_agent(cvat: CvatStub, file: str, environment: dict[str, str]) -> tuple[int, Any]:
    """Register a function of masks and start its agent."""
    function = cvat.register(
        {"provider": "native", "kind": "tracker", "supported_shape_types": ["mask"]}
    )
    command = [sys.executable, "-m", "cvat_cli", "--server-host", cvat.url, "function"]
    command += ["run-agent", str(function), "--function-file", str(REPOSITORY / file)]
    return function, subprocess.Popen(  # noqa: S603  # our own program
        command, env=os.environ | environment, stderr=subprocess.DEVNULL, start_new_session=True
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print medians, their ratio and the machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-id", default="facebook/sam2.1-hiera-tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument("--frames", type=int, default=20, help="frames to measure")
    parser.add_argument("--size", type=int, nargs=2, default=(720, 1280), metavar=("H", "W"))
    options = parser.parse_args(arguments)

    count = 1 + WARM_UP_FRAMES + options.frames
    pictures, masks = draw_discs(count, options.objects, tuple(options.size))
    frames = [cv2.imencode(".png", picture)[1].tobytes() for picture in pictures]
    shapes = [{"type": "mask", "points": encode_cvat_rle(mask)} for mask in masks]
    cvat = CvatStub({TASK: frames})
    times: dict[str, list[float]] = {name: [] for name in FUNCTIONS}
    with tempfile.TemporaryDirectory() as folder:
        redis = RedisServer(Path(folder))
        environment = {
            **redis.environment,
            "CVAT_ACCESS_TOKEN": TOKEN,
            "SAM2_MODEL_ID": options.model_id,
            "SAM2_CONFIG": "",  # which would win over the model's id
            "SAM2_CHECKPOINT": "",
            "SAM2_DEVICE": options.device,
        }
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
                        times[name].append(time.perf_counter() - begin)
        finally:
            for _, process in agents.values():
                os.killpg(process.pid, signal.SIGKILL)  # with its worker
                process.wait()
            cvat.close()
            redis.stop()

    medians = {name: statistics.median(values) for name, values in times.items()}
    height, width = options.size
    print(f"{options.model_id}, device {options.device}, {options.objects} objects")
    print(f"{options.frames} frames of {width} x {height}; median per frame, request to answer")
    for name, seconds in medians.items():
        print(f"{name:16} {seconds * 1000:8.1f} ms")
    print(f"{'ratio':16} {medians['per-object loop'] / medians['tracker']:8.2f}")
    print(f"machine: {describe_machine(machine(options.device))}")


if __name__ == "__main__":
    main()
