"""Compute the store's memory for tracks that callers abandon, in closed form and by simulation."""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import simpy

from benchmarks.scaling_cases import MEMORY_REACH, STORED_MEMORIES, STORED_STEPS


@dataclass(frozen=True)
class StoredTracks:
    """Tracks in the store: those in use, and those left when a clip ends.

    Attributes:
        tracks: Objects tracked at the same time, on average.
        clip_s: How long each is tracked.
        ttl_s: SAM2_STATE_TTL.
        retry_s: SAM2_RETRY_WINDOW.
        frame_bytes: Memory the store takes for one frame memory.
        step_bytes: Memory the store takes for one step.
    """

    tracks: float
    clip_s: float = 300.0
    ttl_s: float = 28_800.0
    retry_s: float = 600.0
    frame_bytes: int = 655_464
    step_bytes: int = 20_584

    @property
    def active_bytes(self) -> int:
        """Memory of a track in use."""
        return STORED_MEMORIES * self.frame_bytes + STORED_STEPS * self.step_bytes

    @property
    def idle_bytes(self) -> int:
        """Memory of a track after the retry window."""
        return (MEMORY_REACH + 1) * self.frame_bytes + self.step_bytes


def predict_memory(stored: StoredTracks) -> float:
    """Return the mean memory of the store in bytes, by Little's law."""
    ended_per_s = stored.tracks / stored.clip_s
    just_ended = ended_per_s * stored.retry_s
    idle = ended_per_s * (stored.ttl_s - stored.retry_s)
    return (stored.tracks + just_ended) * stored.active_bytes + idle * stored.idle_bytes


def simulate_memory(stored: StoredTracks, *, hours: float = 2.0, frame_s: float = 1.0) -> float:
    """Return the mean memory of the store in bytes over some hours, after a warm-up of one TTL."""
    env, rng = simpy.Environment(), random.Random(0)  # noqa: S311  # seeded
    level, area, since_s = 0.0, 0.0, 0.0

    def add(size: float) -> None:
        nonlocal level, area, since_s
        area += level * (env.now - since_s)
        level, since_s = level + size, env.now

    def track() -> Generator[simpy.Event, Any, None]:
        for step in range(STORED_MEMORIES):
            add(stored.frame_bytes + (step < STORED_STEPS) * stored.step_bytes)
            yield env.timeout(frame_s)
        yield env.timeout(stored.clip_s - STORED_MEMORIES * frame_s + stored.retry_s)
        add(stored.idle_bytes - stored.active_bytes)
        yield env.timeout(stored.ttl_s - stored.retry_s)
        add(-stored.idle_bytes)

    def starts() -> Generator[simpy.Event, Any, None]:
        while True:
            env.process(track())
            yield env.timeout(rng.expovariate(stored.tracks / stored.clip_s))

    env.process(starts())
    env.run(stored.ttl_s + stored.clip_s)
    add(0)
    area = 0.0
    env.run(env.now + hours * 3600)
    add(0)
    return area / (hours * 3600)
