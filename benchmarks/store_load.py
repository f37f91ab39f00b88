"""Redis's load from one object at 1024 pixels per step: bytes, commands, memory and CPU time.

    python -m benchmarks.store_load

The tracker is the real one, with its cache and its keys, on its own Redis server; only the network
is replaced (`NoNetwork`). Prints the JSON that is `store` in `benchmarks/scaling.json`.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import redis
import torch
from PIL import Image

from model_handler import FrameFeatures, ModelHandler, ObjectOutput
from object_requests import Continue, Start
from shapes import Box, Mask, Shape, ShapeType, SizeHW
from state_store import RedisStateStore
from testbed.redis_server import RedisServer
from track_state import TrackState
from tracker import Frame, Report, TrackedObject, Tracker

MEMORY_SHAPE_1024 = (64, 64, 64)
WARM_STEPS = 20  # until memories, object pointers and superseded steps are complete
SIZE_HW = (180, 320)
CACHE_BYTES = 1 << 30


class NoNetwork:
    """Replaces `ModelHandler` where only the stored state matters; no object moves.

    Args:
        memory_shape: Shape of one frame's memory features, `(C, H, W)`.
    """

    fingerprint = "0" * 32
    device = torch.device("cpu")
    image_size = 1024
    obj_ptr_size = 256

    def __init__(self, memory_shape: tuple[int, int, int] = MEMORY_SHAPE_1024) -> None:
        self.memory_shape = memory_shape
        self._mask: Mask = np.zeros(SIZE_HW, dtype=np.bool_)
        self._mask[40:100, 220:270] = True

    def encode_frame(
        self, _key: str, _size_hw: SizeHW, _pixels: Callable[[], torch.Tensor]
    ) -> FrameFeatures:
        """Return empty features."""
        return FrameFeatures(SIZE_HW, (), torch.empty(0))

    def start_from_box(self, _frame: FrameFeatures, _box: Box) -> ObjectOutput:
        """Return an output with new memory features."""
        memory = torch.ones(self.memory_shape, dtype=torch.bfloat16)
        return ObjectOutput(torch.empty(0), 1.0, torch.ones(self.obj_ptr_size), memory)

    def step(
        self,
        frame: FrameFeatures,
        states: Sequence[TrackState],
        _memories: Mapping[str, torch.Tensor],
        *_callbacks: Callable[[], None],
    ) -> list[ObjectOutput]:
        """Return an output with new memory features for each object."""
        return [self.start_from_box(frame, (0, 0, 1, 1)) for _ in states]

    def full_size_mask(self, _frame: FrameFeatures, _output: ObjectOutput) -> Mask:
        """Return always the same mask."""
        return self._mask


def make_tracker(
    client: redis.Redis,
    *,
    cache_bytes: int = CACHE_BYTES,
    memory_shape: tuple[int, int, int] = MEMORY_SHAPE_1024,
    retry_window_s: int = 600,
) -> Tracker:
    """Return a replica's tracker without a network."""
    store = RedisStateStore(client=client, state_ttl_s=28800, retry_window_s=retry_window_s)
    return Tracker(
        model=cast("ModelHandler", NoNetwork(memory_shape)),
        store=store,
        memory_cache_bytes=cache_bytes,
        polygon_tolerance=1,
        request_limit_s=240,
    )


def start(tracker: Tracker, objects: int) -> list[TrackedObject]:
    """Start `objects` equal objects."""
    box = Shape(ShapeType.RECTANGLE, [220, 40, 270, 100])
    return tracker.run(_frame(), [Start(box)] * objects)


def step(tracker: Tracker, objects: Sequence[TrackedObject]) -> tuple[list[TrackedObject], Report]:
    """Track objects to the next frame; the report counts the bytes read and written."""
    report = Report()
    return tracker.run(_frame(), [Continue(obj.token) for obj in objects], report), report


def _frame() -> Frame:
    return Frame("", SIZE_HW, lambda: Image.new("RGB", SIZE_HW[::-1]))


def measure(server: RedisServer, *, steps: int = 200) -> dict[str, float]:
    """Track one object and read the server's statistics.

    Args:
        server: A server without other clients.
        steps: Number of steps with a warm cache, and as many without a cache.

    Returns:
        Bytes of values written and read, commands, memory in Redis as `MEMORY USAGE` counts it (in
        bytes), and CPU time, each for one object and step. `memory_frame` and `memory_step` are of
        one key; `memory_active` is of a track in use, `memory_idle` of a track after the retry
        window, `memory_started` of a track that was never continued.
    """
    window_s = 2
    with server.client() as client:
        replica = make_tracker(client, retry_window_s=window_s)
        cold_replica = make_tracker(client, retry_window_s=window_s, cache_bytes=0)
        objects = start(replica, 1)
        figures: dict[str, float] = {"memory_started": _memory(client)}
        for _ in range(WARM_STEPS):
            objects, _report = step(replica, objects)
        for name, tracker in (("warm", replica), ("cold", cold_replica)):
            commands, cpu_s = _commands(client), _cpu_s(client)
            for _ in range(steps):
                objects, report = step(tracker, objects)
            figures[f"cpu_ms_{name}"] = round((_cpu_s(client) - cpu_s) * 1000 / steps, 3)
            figures[f"commands_{name}"] = (_commands(client) - commands) / steps
            figures[f"read_{name}"] = report.bytes_read
        figures["written"] = report.bytes_written
        figures |= {f"memory_{kind}": _one_key(client, kind) for kind in ("frame", "step")}
        figures["memory_active"] = _memory(client)
        time.sleep(window_s + 0.5)
        figures["memory_idle"] = _memory(client)
    return figures


def _one_key(client: redis.Redis, kind: str) -> int:
    return int(client.memory_usage(next(client.scan_iter(f"sam2:*:{kind}:*"))) or 0)


def _memory(client: redis.Redis) -> int:
    return sum(int(client.memory_usage(key) or 0) for key in client.scan_iter("*"))


def _commands(client: redis.Redis) -> int:
    """Count the tracker's commands: all calls but those of the measurement."""
    stats = client.info("commandstats")
    own_commands = ("info", "memory", "scan")
    names = [name for name in stats if not name.removeprefix("cmdstat_").startswith(own_commands)]
    return sum(int(stats[name]["calls"]) for name in names)


def _cpu_s(client: redis.Redis) -> float:
    cpu = client.info("cpu")
    return float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder))
        try:
            figures = measure(server)
            with server.client() as client:
                redis_info = client.info()
        finally:
            server.stop()
    source = f"Redis {redis_info['redis_version']} with {redis_info['mem_allocator']}"
    print(json.dumps(figures | {"source": f"{source}, {os.cpu_count()} CPU cores"}, indent=2))


if __name__ == "__main__":
    main()
