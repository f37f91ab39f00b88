"""Seconds per frame of `track_task.py` beside one call per frame with a PNG image.

    SAM2_MODEL_ID=micro python -m benchmarks.task_frames --frames 60

Both follow the same polygon through the same clip on a stand-in for CVAT's server, in turn, with
the same engine: once one that answers at once (model excluded), once SAM 2 (model included). One
call per frame is what CVAT does when it tracks through a function: the server makes a PNG of the
frame, and base64 in JSON takes it to the function, which decodes it. Left out there, though CVAT
does it too: finding the frame inside its chunk, the browser, writing the result. So the real gap is
wider. `track_task.py` is measured whole, with reading the task, decoding and writing.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import cv2
import httpx
import numpy as np
import torch
from PIL import Image

from clip_reader import open_clip
from cvat_task.connection import CvatConnection
from cvat_task.job_writer import Journal
from cvat_task.loop import run
from cvat_task.plan import Request, make_plan
from engine import Engine, open_engine
from protocol import Continue, Start, decode_image, format_tracker_answer, parse_tracker_request
from settings import Limits
from state_token import StateToken, new_id
from tests.cvat_server import TOKEN, CvatServer, Picture, Task, encode_video
from tracker import TrackedObject

JOB = 6
CHUNK_FRAMES = 36  # what CVAT chooses for 720p


class NoModel:
    """Answers every object where it began."""

    def __init__(self) -> None:
        self._began: dict[StateToken, Start] = {}

    def close(self) -> None:
        """Hold nothing."""

    def track(self, frame: Image.Image, items: Sequence[Start | Continue]) -> list[TrackedObject]:
        """See `Engine.track`."""
        frame.load()
        answers = []
        for item in items:
            token = StateToken(new_id(), new_id())
            start = item if isinstance(item, Start) else self._began[item.token]
            self._began[token] = start
            answers.append(TrackedObject(token, start.shape, lost=False))
        return answers


def make_clip(count: int, size_hw: tuple[int, int]) -> tuple[list[Picture], list[bytes]]:
    """Return frames of a disc that drifts over a grainy ground, and the chunks they are read from.

    Chunks are MPEG-4, which takes about as long to decode as CVAT's H.264.
    """
    height, width = size_hw
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (18, 32, 3), dtype=np.uint8)
    ground = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    frames = []
    for index in range(count):
        grain = rng.normal(0, 2, (height, width, 1)).astype(np.int16)
        frame = np.clip(ground + grain, 0, 255).astype(np.uint8)
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
    """Return the disc on frame 0."""
    height, width = size_hw
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1) * (height / 6)
    points: list[float] = (ring + np.array([width / 3, height / 2])).ravel().tolist()
    return points


def by_the_chunk(server: CvatServer, engine: Engine, points: list[float]) -> float:
    """Return seconds for the whole clip through `track_task.py`, with planning and writing."""
    server.data[JOB] = {"version": 0, "tags": [], "shapes": [], "tracks": []}
    server.add(JOB, "shapes", type="polygon", frame=0, points=points, label_id=JOB)
    options = argparse.Namespace(server_host=server.url)  # as the command line gives it
    begin = time.perf_counter()
    with closing(CvatConnection(options)) as connection, tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), {})
        plan = make_plan(connection, [JOB], Request(), journal)
        run(connection, plan, Request(), engine, journal)
    return time.perf_counter() - begin


def frame_by_frame(server: CvatServer, engine: Engine, points: list[float], count: int) -> float:
    """Return seconds for the whole clip with a PNG and a call per frame."""

    class Function(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = parse_tracker_request(body, Limits())
            found = engine.track(decode_image(request.image, Limits()), request.items)
            answer = format_tracker_answer(
                request, [(one.token, one.shape, one.lost) for one in found]
            )
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Stay quiet."""

    function = HTTPServer(("127.0.0.1", 0), Function)
    thread = Thread(target=function.serve_forever, args=(0.02,))
    thread.start()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    states: list[str] = []
    shapes: list[object] = [{"type": "polygon", "points": points}]
    begin = time.perf_counter()
    with httpx.Client(timeout=600) as client:
        for number in range(count):
            query: dict[str, str | int] = {"type": "frame", "quality": "original", "number": number}
            frame = client.get(f"{server.url}/api/jobs/{JOB}/data", params=query, headers=headers)
            image = base64.b64encode(frame.content).decode()
            url = f"http://127.0.0.1:{function.server_address[1]}"
            answer = client.post(url, json={"image": image, "shapes": shapes, "states": states})
            states, shapes = answer.json()["states"], [None]
    seconds = time.perf_counter() - begin
    function.shutdown()
    thread.join()
    function.server_close()
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both, their ratio and the machine; the last line is all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=72)
    parser.add_argument("--size", type=int, nargs=2, default=(720, 1280), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    os.environ["CVAT_ACCESS_TOKEN"] = TOKEN
    size_hw = tuple(options.size)
    points = polygon(size_hw)
    frames, chunks = make_clip(options.frames, size_hw)
    task = Task(frames, chunk_size=CHUNK_FRAMES, job_ids=[JOB])
    engines: dict[str, Callable[[], Engine]] = {
        "model excluded": NoModel,
        "model included": lambda: open_engine(None, os.environ),
    }
    height, width = size_hw
    report: dict[str, object] = {
        "frames": options.frames,
        "size": f"{width} x {height}",
        "model": os.environ.get("SAM2_MODEL_ID", "the default"),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}"
        f"{', ' + torch.cuda.get_device_name() if torch.cuda.is_available() else ''}",
    }
    with CvatServer(task) as server:
        server.chunks |= {(JOB, index): chunk for index, chunk in enumerate(chunks)}
        for name, make in engines.items():
            times: dict[str, list[float]] = {"chunk": [], "frame": []}
            with closing(make()) as engine:
                by_the_chunk(server, engine, points)  # caches are warm
                for _ in range(options.rounds):
                    times["chunk"].append(by_the_chunk(server, engine, points))
                    times["frame"].append(frame_by_frame(server, engine, points, options.frames))
            chunk, frame = (statistics.median(each) / options.frames for each in times.values())
            print(
                f"{name}: {chunk:.4f} s/frame by the chunk, {frame:.4f} frame by frame, "
                f"{frame / chunk:.1f} times as long"
            )
            report[name] = {
                "track_task_s_per_frame": round(chunk, 4),
                "call_per_frame_s_per_frame": round(frame, 4),
                "ratio": round(frame / chunk, 2),
            }
    print(f"machine: {report['machine']}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
