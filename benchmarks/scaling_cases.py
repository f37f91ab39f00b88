"""The inputs and outputs of the scaling calculations: a case, and its figures."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Source: `track_state` and `state_store`; tests compare these values with the tracker's.
MEMORY_REACH = 6
STORED_MEMORIES = 10
STORED_STEPS = 4
COMMANDS = 15  # per object and step; each frame memory read is one more
START_COMMANDS = 4  # per started object

INPUTS = Path(__file__).parent / "scaling.json"


def _option(default: object, text: str) -> Any:  # noqa: ANN401  # a dataclass field of any type
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Case:
    """The load, the replicas and the store; every field is an option on the command line."""

    tracks: int = _option(1000, "objects tracked at the same time")
    objects: int = _option(5, "objects in one request")
    frames: int = _option(300, "frames of a track; then the caller starts new tracks")
    think_s: float = _option(0.0, "from an answer to the next request, mean of an exponential")
    base_s: float = _option(0.03, "time of a request without its objects: decode, encoder, answer")
    object_s: float = _option(0.008, "further time of each object")
    service_cv: float = _option(0.0, "standard deviation of that time over its mean")
    replicas: int = _option(1, "workers, each serving one request at a time")
    routing: str = _option("random", "random, idle (the shortest queue) or sticky (by track)")
    cache_mb: float = _option(1024.0, "SAM2_MEMORY_CACHE_MB of each replica")
    memory_bytes: int = _option(524_504, "one frame memory in the store")
    state_bytes: int = _option(17_280, "one step in the store")
    store_servers: int = _option(1, "Redis servers, a track's keys on one of them")
    store_gbit: float = _option(10.0, "bandwidth of one of them in Gbit/s, both ways together")
    round_trip_s: float = _option(0.0005, "from a replica to the store and back, without bytes")
    requests: int = _option(20_000, "requests to measure; at least two of each caller")
    seed: int = _option(0, "of the simulation")

    @property
    def callers(self) -> int:
        """Largest number of concurrent requests: one for each group of objects."""
        return math.ceil(self.tracks / self.objects)

    @property
    def service_s(self) -> float:
        """Mean time of a request without the store."""
        return self.base_s + self.objects * self.object_s

    @property
    def cached_memories(self) -> int:
        """Frame memories that fit into a replica's cache (it counts tensors without a header)."""
        return int(self.cache_mb * 2**20 / self.memory_bytes)

    def transfer_s(self, size: float) -> float:
        """Return the time in which one store server transfers `size` bytes."""
        return size * 8e-9 / self.store_gbit


@dataclass(frozen=True)
class Figures:
    """The results of a case. Rates are of all tracks together; only simulations have quantiles."""

    frames_s: float  # objects x frames
    frames_s_track: float
    utilisation: float  # of the replicas
    answer_s: float
    warm_share: float  # of the frame memories attended to
    read_gbit: float
    written_gbit: float
    commands_s: float
    store_utilisation: float
    p50_s: float = math.nan
    p99_s: float = math.nan


def inputs(path: Path = INPUTS) -> dict[str, dict[str, Any]]:
    """Return the measured and assumed inputs: `services` and `store`."""
    read: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return read
