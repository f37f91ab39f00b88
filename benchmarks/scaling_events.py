"""Compute the figures of a case by discrete-event simulation."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Generator, Iterator
from itertools import count
from statistics import fmean, quantiles
from typing import Any

import simpy

from benchmarks.scaling_cases import COMMANDS, MEMORY_REACH, START_COMMANDS, Case, Figures

WARM_UP_FRAMES = 8  # least per caller: then all frame memories in reach are of this run

Events = Generator[simpy.Event, Any, None]


class MemoryCache:
    """The frame memories that a replica has cached, least recently used dropped first.

    Args:
        capacity: Number of memories that fit.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._memories: OrderedDict[tuple[int, int], None] = OrderedDict()

    def read(self, track: int, step: int) -> int:
        """Use the memories that a step attends to; return how many were read from the store."""
        attended = [(track, frame) for frame in (0, *range(max(1, step - MEMORY_REACH), step))]
        missing = [key for key in attended if key not in self._memories]
        for key in attended:
            if key in self._memories:
                self._memories.move_to_end(key)
        for key in missing:
            self.add(*key)
        return len(missing)

    def add(self, track: int, step: int) -> None:
        """Add the memory that a step computed."""
        if self._capacity:
            self._memories[track, step] = None
            if len(self._memories) > self._capacity:
                self._memories.popitem(last=False)


class Simulation:
    """Callers, replicas with their caches, and store servers, on simpy's clock.

    All objects of a request are on the same frames, so they share one cache entry. Their keys are
    on one store server, drawn at random for each request.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        self._rng = random.Random(case.seed)  # noqa: S311  # seeded
        self._env = simpy.Environment()
        self._replicas = [simpy.Resource(self._env) for _ in range(case.replicas)]
        capacity = case.cached_memories // case.objects
        self._caches = [MemoryCache(capacity) for _ in range(case.replicas)]
        self._stores = [simpy.Resource(self._env) for _ in range(case.store_servers)]
        self._clips: Iterator[int] = count()
        self._answers_s: list[float] = []
        self._clear()

    def _clear(self) -> None:
        self._begin_s = self._env.now
        self._answers_s.clear()
        self._busy_s = self._store_busy_s = 0.0
        self._read = self._written = self._commands = self._missing = self._attended = 0

    def run(self) -> Figures:
        """Return the figures after a warm-up."""
        case = self._case
        for _ in range(case.callers):
            self._env.process(self._caller())
        least = WARM_UP_FRAMES * case.callers
        self._until(max(least, min(case.requests, case.frames * case.callers)))
        self._clear()
        self._until(max(2 * case.callers, case.requests))
        seconds = self._env.now - self._begin_s
        rate = len(self._answers_s) / seconds
        centiles = quantiles(self._answers_s, n=100)
        return Figures(
            frames_s=rate * case.objects,
            frames_s_track=rate / case.callers,
            utilisation=self._busy_s / seconds / case.replicas,
            answer_s=fmean(self._answers_s),
            warm_share=1 - self._missing / max(1, self._attended),
            read_gbit=self._read / seconds * 8e-9,
            written_gbit=self._written / seconds * 8e-9,
            commands_s=self._commands / seconds,
            store_utilisation=self._store_busy_s / seconds / case.store_servers,
            p50_s=centiles[49],
            p99_s=centiles[98],
        )

    def _until(self, answers: int) -> None:
        while len(self._answers_s) < answers:
            self._env.step()

    def _caller(self) -> Events:
        """Track clip after clip, starting in the middle of a clip."""
        case, env, rng = self._case, self._env, self._rng
        clip, step = next(self._clips), rng.randrange(case.frames)
        home = rng.randrange(case.replicas)
        while True:
            if case.think_s:
                yield env.timeout(rng.expovariate(1 / case.think_s))
            sent_s = env.now
            replica = self._route(home)
            with self._replicas[replica].request() as queued:
                yield queued
                begin_s = env.now
                yield from self._serve(self._caches[replica], clip, step)
                self._busy_s += env.now - begin_s
            self._answers_s.append(env.now - sent_s)
            step += 1
            if step == case.frames:
                clip, step = next(self._clips), 0
                home = rng.randrange(case.replicas)

    def _route(self, home: int) -> int:
        if self._case.routing == "sticky":
            return home
        if self._case.routing == "random":
            return self._rng.randrange(self._case.replicas)
        lengths = [len(replica.queue) + replica.count for replica in self._replicas]
        shortest = min(lengths)
        return self._rng.choice([i for i, length in enumerate(lengths) if length == shortest])

    def _serve(self, cache: MemoryCache, clip: int, step: int) -> Events:
        case = self._case
        trips = 1  # save
        if step:
            missing = cache.read(clip, step)
            trips += 2 + (missing > 0)  # load steps, claim, load memories
            self._missing += case.objects * missing
            self._attended += case.objects * min(step, MEMORY_REACH + 1)
            size = case.objects * (case.state_bytes + missing * case.memory_bytes)
            self._read += size
            self._commands += case.objects * (COMMANDS + missing)
            yield from self._transfer(size)
        else:
            self._commands += case.objects * START_COMMANDS
        yield self._env.timeout(self._service_s() + trips * case.round_trip_s)
        size = case.objects * (case.state_bytes + case.memory_bytes)
        self._written += size
        yield from self._transfer(size)
        cache.add(clip, step)

    def _service_s(self) -> float:
        mean, cv = self._case.service_s, self._case.service_cv
        return self._rng.gammavariate(cv**-2, mean * cv**2) if cv else mean

    def _transfer(self, size: int) -> Events:
        seconds = self._case.transfer_s(size)
        with self._rng.choice(self._stores).request() as queued:
            yield queued
            yield self._env.timeout(seconds)
        self._store_busy_s += seconds


def simulate(case: Case) -> Figures:
    """Return the figures of a case by simulation; a seed always gives the same figures."""
    return Simulation(case).run()
