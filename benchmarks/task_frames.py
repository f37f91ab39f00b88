"""Time per frame of `track_task.py` beside one call per frame with a PNG image.

    python -m benchmarks.task_frames --model-id micro --device cpu

Both track the same polygon through the same clip on a test server that speaks CVAT's API,
alternately, with the same tracking client: once a client that answers at once (model excluded),
once SAM 2 (model included). CVAT makes one call per frame when it tracks through a function: the
server encodes the frame as PNG and sends it as base64 in JSON, and the function decodes it. The
measured calls leave out what else CVAT does: finding the frame inside its chunk, the browser,
writing the result. So the real difference is larger. `track_task.py` is measured completely, with
reading the task, decoding and writing; the ratio is its time divided by that of the calls.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from unittest import mock

import cv2
import httpx
import numpy as np
from PIL import Image

from benchmarks.comparison import median
from benchmarks.harness import add_common_options, make_result, model_environment, report
from clips.reader import open_clip
from clips.tracking_client import TrackingClient, open_tracking_client
from cvat_task.connection import CvatConnection
from cvat_task.journal import Journal
from cvat_task.loop import run
from cvat_task.plan import RunOptions, make_plan
from images import decode_image
from object_requests import Continue, Start
from protocol import format_tracker_answer, parse_tracker_request
from settings import Limits
from state_token import StateToken, new_id
from testbed.cvat_server import TOKEN, CvatServer, Picture, Task, encode_video
from tracker import TrackedObject

JOB = 6
CHUNK_FRAMES = 36  # CVAT's choice for 720p
COLUMNS = ["model", "ours_ms", "calls_ms", "ours_over_calls"]


class NoModel:
    """A tracking client that returns every object's first shape."""

    def __init__(self) -> None:
        self._starts: dict[StateToken, Start] = {}

    def close(self) -> None:
        """Do nothing."""

    def track(self, frame: Image.Image, items: Sequence[Start | Continue]) -> list[TrackedObject]:
        """See `TrackingClient.track`."""
        frame.load()
        answers = []
        for item in items:
            token = StateToken(new_id(), new_id())
            start = item if isinstance(item, Start) else self._starts[item.token]
            self._starts[token] = start
            answers.append(TrackedObject(token, start.shape, lost=False))
        return answers


def make_clip(count: int, size_hw: tuple[int, int]) -> tuple[list[Picture], list[bytes]]:
    """Return frames of a disc that drifts over a grainy background, and the chunks that hold them.

    Chunks are MPEG-4, which takes about as long to decode as CVAT's H.264.
    """
    height, width = size_hw
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (18, 32, 3), dtype=np.uint8)
    background = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    frames = []
    for index in range(count):
        grain = rng.normal(0, 2, (height, width, 1)).astype(np.int16)
        frame = np.clip(background + grain, 0, 255).astype(np.uint8)
        cv2.circle(frame, (width // 3 + 2 * index, height // 2), height // 6, (40, 200, 230), -1)
        frames.append(frame)
    chunks = [
        encode_video(frames[first : first + CHUNK_FRAMES], "mp4v")
        for first in range(0, count, CHUNK_FRAMES)
    ]
    decoded: list[Picture] = []
    for chunk in chunks:
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            Path(file.name).write_bytes(chunk)
            clip = open_clip(Path(file.name))
            decoded += [np.asarray(frame) for _, frame in clip.frames(0, clip.frame_count - 1)]
    return decoded, chunks


def polygon(size_hw: tuple[int, int]) -> list[float]:
    """Return the disc's outline on frame 0."""
    height, width = size_hw
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1) * (height / 6)
    points: list[float] = (ring + np.array([width / 3, height / 2])).ravel().tolist()
    return points


def by_the_chunk(server: CvatServer, client: TrackingClient, points: list[float]) -> float:
    """Track the clip as `track_task.py` does; return the seconds, with planning and writing."""
    server.data[JOB] = {"version": 0, "tags": [], "shapes": [], "tracks": []}
    server.add(JOB, "shapes", type="polygon", frame=0, points=points, label_id=JOB)
    options = argparse.Namespace(server_host=server.url)  # as the command line gives it
    begin = time.perf_counter()
    with closing(CvatConnection(options)) as connection, tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), {})
        plan = make_plan(connection, [JOB], RunOptions(), journal)
        run(connection, plan, RunOptions(), client, journal)
    return time.perf_counter() - begin


def frame_by_frame(
    server: CvatServer, client: TrackingClient, points: list[float], count: int
) -> float:
    """Track the clip with a PNG and a call per frame; return the seconds."""

    class Function(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = parse_tracker_request(body, Limits())
            objects = client.track(decode_image(request.image, Limits()), request.items)
            answer = format_tracker_answer(
                request, [(obj.token, obj.shape, obj.lost) for obj in objects]
            )
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Do not log."""

    function = HTTPServer(("127.0.0.1", 0), Function)
    thread = Thread(target=function.serve_forever, args=(0.02,))
    thread.start()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    states: list[str] = []
    shapes: list[object] = [{"type": "polygon", "points": points}]
    begin = time.perf_counter()
    with httpx.Client(timeout=600) as http:
        for number in range(count):
            query: dict[str, str | int] = {"type": "frame", "quality": "original", "number": number}
            frame = http.get(f"{server.url}/api/jobs/{JOB}/data", params=query, headers=headers)
            image = base64.b64encode(frame.content).decode()
            url = f"http://127.0.0.1:{function.server_address[1]}"
            answer = http.post(url, json={"image": image, "shapes": shapes, "states": states})
            states, shapes = answer.json()["states"], [None]
    seconds = time.perf_counter() - begin
    function.shutdown()
    thread.join()
    function.server_close()
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the files that the options name."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument("--frames", type=int, default=72)
    parser.add_argument("--size", type=int, nargs=2, default=(720, 1280), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    size_hw = tuple(options.size)
    points = polygon(size_hw)
    frames, chunks = make_clip(options.frames, size_hw)
    task = Task(frames, chunk_size=CHUNK_FRAMES, job_ids=[JOB])
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, CVAT_ACCESS_TOKEN=TOKEN),
        CvatServer(task) as server,
    ):
        environment = model_environment(options, Path(folder))
        clients: dict[str, Callable[[], TrackingClient]] = {
            "excluded": NoModel,
            "included": lambda: open_tracking_client(None, environment),
        }
        server.chunks |= {(JOB, index): chunk for index, chunk in enumerate(chunks)}
        for name, open_client in clients.items():
            all_ms: dict[str, list[float]] = {"ours": [], "calls": []}
            with closing(open_client()) as client:
                by_the_chunk(server, client, points)  # warms caches
                for _ in range(options.rounds):
                    seconds = (
                        by_the_chunk(server, client, points),
                        frame_by_frame(server, client, points, options.frames),
                    )
                    for times, clip_s in zip(all_ms.values(), seconds, strict=True):
                        times.append(round(clip_s * 1000 / options.frames, 2))
            ours_ms, calls_ms = (median(times) for times in all_ms.values())
            rows.append({
                "model": name,
                "ours_ms": ours_ms,
                "calls_ms": calls_ms,
                "ours_over_calls": round(ours_ms / calls_ms, 4),
                "all_ms": all_ms,
            })  # fmt: skip
        result = make_result("task_frames", options, environment, rows)
    report(result, options, COLUMNS)


if __name__ == "__main__":
    main()
