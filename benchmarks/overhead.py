"""Time of a request outside the network, part by part, and its bytes to and from Redis.

    python -m benchmarks.overhead --objects 1 8 16 --json FILE

The function runs in a separate process behind `local_server.py`, with a Redis server. One client
sends different 1080p frames and objects with full memory banks. Only the network is replaced: SAM
2's passes return drawn masks at once, in the tensor shapes of tiny at 1024 px. The parts are timed
inside the function and sent in HTTP's `Server-Timing` header; the remainder of a request is the row
"HTTP and the rest". The client's own encoding of a request is not counted. CPU only.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import httpx
import numpy as np
import torch
import uvicorn

import local_server
import main as entry_point
import track_storage
import tracker
from benchmarks.clip import JPEG_QUALITY, draw_discs
from benchmarks.harness import describe_machine, machine, write_json
from benchmarks.redis_traffic import RedisTraffic
from model_handler import ModelHandler
from model_loader import load_model
from settings import Settings
from shapes import SizeHW, encode_cvat_rle
from state_store import RedisStateStore
from testbed.functions import CONFIG, without_settings
from testbed.random_weights import write_checkpoint
from testbed.redis_server import RedisServer, free_port
from track_state import POINTER_REACH

SIZE_HW: SizeHW = (1080, 1920)
PICTURES = 8  # more than the function's feature cache holds
WARM_UP = POINTER_REACH + 1  # requests until every object's memory bank is full

# The rows of the table, and the functions whose time they add up; none calls another.
PARTS: dict[str, list[tuple[object, str]]] = {
    "read the body": [(local_server, "_read_body")],
    "request JSON": [(local_server, "_event")],
    "base64, checks": [(entry_point, "parse_tracker_request")],
    "image header": [(entry_point, "read_image_size")],
    "content hash": [(hashlib, "blake2b")],
    "decode": [(entry_point, "decode_image")],
    "resize, normalise": [(ModelHandler, "pixels")],
    "Redis read": [(RedisStateStore, "load_states"), (RedisStateStore, "load_memories")],
    "state decode": [(track_storage, "decode_state"), (track_storage, "decode_memory")],
    "around the network": [(ModelHandler, "step")],
    "masks to full size": [(ModelHandler, "full_size_mask")],
    "shapes": [(tracker, "mask_to_shape"), (tracker, "mask_to_box")],
    "state encode": [(track_storage, "encode_state"), (track_storage, "encode_memory")],
    "Redis write": [(RedisStateStore, "claim"), (RedisStateStore, "save")],
    "answer JSON": [(entry_point, "format_tracker_answer"), (entry_point, "to_json")],
}
STATE_PARTS = ("Redis read", "state decode", "state encode", "Redis write")
TOTAL, REST = "total", "HTTP and the rest"

# Bars at 1080p, the largest values allowed: milliseconds and kilobytes.
FIRST_OBJECT_MS, FURTHER_OBJECT_MS, STATE_MS = 45.0, 12.0, 5.0
WRITTEN_KB, READ_KB = 550.0, 20.0


def serve(port: int, masks: torch.Tensor) -> None:
    """Serve the function without its network until killed.

    Args:
        port: The TCP port.
        masks: The objects' low_res_logits, taken in turn, `(N, 1, 256, 256)`.
    """
    spent_ms: dict[str, float] = defaultdict(float)
    _time_parts(spent_ms)

    def load_without_network(settings: Settings) -> ModelHandler:
        handler = load_model(settings)
        _replace_network(handler._model, masks)  # noqa: SLF001  # not public
        return handler

    mock.patch.object(tracker, "load_model", load_without_network).start()
    answer = local_server._answer  # noqa: SLF001  # the last step of a request

    def timed_answer(response: Any) -> Any:  # noqa: ANN401  # Nuclio's
        http_response = answer(response)
        http_response.headers["Server-Timing"] = json.dumps(spent_ms)
        spent_ms.clear()
        return http_response

    mock.patch.object(local_server, "_answer", timed_answer).start()
    with (
        Path(os.devnull).open("w") as log,
        contextlib.redirect_stdout(log),
        ThreadPoolExecutor(1) as worker,
    ):
        context = local_server.create_context()
        worker.submit(entry_point.init_context, context).result()
        app = local_server.create_app(context, entry_point.handler, worker)
        uvicorn.run(app, port=port, log_level="warning")


def _replace_network(model: Any, masks: torch.Tensor) -> None:  # noqa: ANN401  # SAM 2's
    """Make a model answer at once, with the tensor shapes and types of tiny at 1024 px."""
    levels = [torch.rand(1, 32, 256, 256), torch.rand(1, 64, 128, 128), torch.rand(1, 256, 64, 64)]
    encoded = {"backbone_fpn": levels, "vision_pos_enc": [torch.rand(1, 256, 64, 64)]}
    memory = torch.randn(1, 64, 64, 64).to(torch.bfloat16)
    position = torch.rand(1, 64, 64, 64)
    next_masks = itertools.cycle(list(masks[:, None]))

    def track_step(**_: object) -> dict[str, torch.Tensor]:
        return {
            "pred_masks": next(next_masks),
            "obj_ptr": torch.rand(1, 256),
            "object_score_logits": torch.ones(1, 1),
            "maskmem_features": memory,
        }

    model.forward_image = lambda _: encoded
    model.track_step = track_step
    model._encode_new_memory = lambda **_: (memory, [position])  # noqa: SLF001


def _time_parts(spent_ms: dict[str, float]) -> None:
    """Add the time spent in each of `PARTS` to `spent_ms`."""
    for part, functions in PARTS.items():
        for owner, name in functions:
            setattr(owner, name, _timed(getattr(owner, name), part, spent_ms))


def _timed(
    function: Callable[..., Any], part: str, spent_ms: dict[str, float]
) -> Callable[..., Any]:
    def add(begin: float) -> None:
        spent_ms[part] += (time.perf_counter() - begin) * 1000

    @functools.wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401  # of any function
        begin = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            add(begin)

    @functools.wraps(function)
    async def timed_async(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        begin = time.perf_counter()
        try:
            return await function(*arguments, **options)
        finally:
            add(begin)

    return timed_async if inspect.iscoroutinefunction(function) else timed


def draw_logits(count: int) -> torch.Tensor:
    """Draw low_res_logits `(count, 1, 256, 256)`: uneven discs of 1 to 15 % of the frame."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256].astype(np.float32)
    masks = []
    for radius in np.linspace(15, 55, count):
        center_x, center_y = rng.uniform(60, 196, 2)
        bend = cv2.resize(rng.normal(0, 0.2, (24, 24)).astype(np.float32), (256, 256))
        distance = np.hypot(x - center_x, y - center_y) / radius
        masks.append(np.clip(12 * (1 - distance + bend), -12, 12))
    return torch.from_numpy(np.stack(masks)[:, None])


class Client:
    """Sends tracking requests to a function and measures them.

    Args:
        url: The function's address.
        redis: Its Redis server, to count bytes.
    """

    def __init__(self, url: str, redis: RedisServer) -> None:
        self._http = httpx.Client(timeout=600, base_url=url)
        self._traffic = RedisTraffic(redis)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self._traffic.close()

    def wait(self) -> None:
        """Wait until the function has started."""
        while True:
            try:
                self._http.get("/healthz").raise_for_status()
            except httpx.TransportError:
                time.sleep(0.2)
            else:
                return

    def measure(
        self, pictures: Sequence[bytes], shapes: list[Any], frames: int
    ) -> dict[str, float]:
        """Start and track objects; return medians in ms, and kilobytes per request."""
        images = [base64.b64encode(picture).decode() for picture in pictures]
        next_images = itertools.cycle(images)
        answer, _, _ = self._post(next(next_images), shapes, [])
        times: dict[str, list[float]] = defaultdict(list)
        for index in range(WARM_UP + frames):
            if index == WARM_UP:
                before = self._traffic.read()
            no_shapes = [None] * len(shapes)
            answer, ms, parts = self._post(next(next_images), no_shapes, answer["states"])
            if index >= WARM_UP:
                for part in PARTS:
                    times[part].append(parts.get(part, 0.0))
                times[REST].append(ms - sum(parts.values()))
                times[TOTAL].append(ms)
        written, read = self._traffic.since(before)
        medians = {part: statistics.median(values) for part, values in times.items()}
        kilobytes = frames * 1000
        return medians | {"written KB": written / kilobytes, "read KB": read / kilobytes}

    def _post(
        self, image: str, shapes: list[Any], states: list[str]
    ) -> tuple[dict[str, Any], float, dict[str, float]]:
        body = json.dumps({"image": image, "shapes": shapes, "states": states}).encode()
        begin = time.perf_counter()
        response = self._http.post("/", content=body, headers={"Content-Type": "application/json"})
        ms = (time.perf_counter() - begin) * 1000
        response.raise_for_status()
        return response.json(), ms, json.loads(response.headers["Server-Timing"])


def measure(counts: Sequence[int], frames: int) -> dict[str, dict[str, float]]:
    """Start the function; return the results of `Client.measure` for each kind of request."""
    pictures, discs = draw_discs(PICTURES, max(counts), SIZE_HW)
    quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    jpegs = [cv2.imencode(".jpg", picture, quality)[1].tobytes() for picture in pictures]
    pngs = [cv2.imencode(".png", picture)[1].tobytes() for picture in pictures]
    masks = [{"type": "mask", "points": encode_cvat_rle(disc)} for disc in discs]
    polygon = {"type": "polygon", "points": [600, 300, 1200, 300, 900, 800]}
    rectangle = {"type": "rectangle", "points": [600, 300, 1200, 800]}
    most = max(counts)
    requests = {f"JPEG, mask x {count}": (jpegs, masks[:count]) for count in counts} | {
        f"JPEG, polygon x {most}": (jpegs, [polygon] * most),
        f"JPEG, rectangle x {most}": (jpegs, [rectangle] * most),
        "PNG, mask x 1": (pngs, masks[:1]),
    }
    with tempfile.TemporaryDirectory() as folder:
        redis = RedisServer(Path(folder))
        port = free_port()
        settings = redis.environment | {
            "SAM2_CONFIG": CONFIG,
            "SAM2_CHECKPOINT": str(write_checkpoint(CONFIG, Path(folder) / "tiny.pt")),
            "SAM2_DEVICE": "cpu",
        }
        function = multiprocessing.get_context("spawn").Process(
            target=serve, args=(port, draw_logits(most)), daemon=True
        )
        with mock.patch.dict(os.environ, without_settings(os.environ) | settings, clear=True):
            function.start()  # a spawned process inherits the environment
        try:
            with contextlib.closing(Client(f"http://127.0.0.1:{port}", redis)) as client:
                client.wait()
                print(
                    f"1080p pictures of {len(jpegs[0]) / 1e6:.2f} MB as JPEG, "
                    f"{len(pngs[0]) / 1e6:.2f} MB as PNG; medians of {frames} requests",
                    flush=True,
                )
                return {
                    name: client.measure(*request, frames) for name, request in requests.items()
                }
        finally:
            function.kill()
            function.join()
            redis.stop()


def compare_with_bars(
    medians: dict[str, dict[str, float]], counts: Sequence[int]
) -> list[tuple[str, float, float]]:
    """Return for each bar its name, the measured value, and the largest value allowed."""
    least, most = (medians[f"JPEG, mask x {count}"] for count in (min(counts), max(counts)))
    further = max(counts) - min(counts)
    bars = [
        ("KB written per object", most["written KB"] / max(counts), WRITTEN_KB),
        ("KB read per object", most["read KB"] / max(counts), READ_KB),
        ("state, ms per object", sum(least[part] for part in STATE_PARTS) / min(counts), STATE_MS),
    ]
    if min(counts) == 1:
        bars.append(("one object, ms", least[TOTAL], FIRST_OBJECT_MS))
    if further:
        each = (most[TOTAL] - least[TOTAL]) / further
        bars.append(("a further object, ms", each, FURTHER_OBJECT_MS))
    return bars


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file that the options name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--frames", type=int, default=20, help="requests to take a median of")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args(arguments)

    print("a request without its network, which answers at once with drawn masks")
    medians = measure(options.objects, options.frames)
    rows = [*PARTS, REST, TOTAL, "written KB", "read KB"]
    print(f"{'ms':20}" + "".join(f"{name:>22}" for name in medians))
    for row in rows:
        print(f"{row:20}" + "".join(f"{times[row]:22.2f}" for times in medians.values()))
    bars = compare_with_bars(medians, options.objects)
    for name, value, most in bars:
        print(f"{name:24} {value:8.2f}, at most {most:g}: {'held' if value <= most else 'MISSED'}")
    info = machine("cpu")
    print(f"machine: {describe_machine(info)}")
    if options.json:
        write_json({"machine": info, "medians": medians, "bars": bars}, options.json)


if __name__ == "__main__":
    main()
