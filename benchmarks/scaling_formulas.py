"""Compute the figures of a case in closed form."""

from __future__ import annotations

import math
from bisect import bisect_right

from benchmarks.scaling_cases import COMMANDS, MEMORY_REACH, START_COMMANDS, Case, Figures


def missing_memories(case: Case) -> float:
    """Return the number of frame memories that a request reads per object, mean over a clip.

    A replica has the memory of the frame `a` steps ago if it served any of the last `a` steps,
    each with a probability of 1/R: it computed the memory then, or read it. It has the memory of
    the conditioning frame if it served any step of the track. A cache that holds the last `h`
    steps of all tracks drops memories not used in them: it misses if the replica served none of
    the last min(a, h) steps.
    """
    other, horizon = _other_replica(case), cache_horizon(case)
    missing = 0.0
    for step in range(1, case.frames):
        ages = [*range(1, min(MEMORY_REACH, step - 1) + 1), step]
        missing += sum(other ** min(age, horizon) for age in ages)
    return missing / case.frames


def attended_memories(case: Case) -> float:
    """Return the number of frame memories attended to per object and step, mean over a clip."""
    return sum(min(step, MEMORY_REACH + 1) for step in range(1, case.frames)) / case.frames


def cache_horizon(case: Case) -> float:
    """Return how many steps back a replica's cache reaches; infinite if it holds whole clips.

    The least recently used memories are dropped first, so the cache holds those used in the last
    `h` steps of every track, with the largest `h` that fits (Che's approximation, in whole steps).
    """
    shares, other = (case.replicas, 0.0) if case.routing == "sticky" else (1, _other_replica(case))
    per_track = case.cached_memories / (case.tracks / shares)
    if _touched(case.frames, other) <= per_track:
        return math.inf
    return bisect_right(range(1, case.frames), per_track, key=lambda steps: _touched(steps, other))


def _other_replica(case: Case) -> float:
    """Return the probability that a step was served by another replica than the next step."""
    return 0.0 if case.routing == "sticky" else 1 - 1 / case.replicas


def _touched(steps: int, other: float) -> float:
    """Return how many memories of a track a replica uses during `steps` of the track's steps."""
    spans = [
        min(made + MEMORY_REACH, steps) - max(made, 1) + 1
        for made in range(1 - MEMORY_REACH, steps + 1)
    ]
    return sum(1 - other**span for span in spans) + 1 - other**steps


def predict(case: Case) -> Figures:
    """Return the figures of a case in closed form."""
    missing = case.objects * missing_memories(case)
    continued = 1 - 1 / case.frames
    read = missing * case.memory_bytes + continued * case.objects * case.state_bytes
    written = case.objects * (case.memory_bytes + case.state_bytes)
    trips = continued * (3 + (missing > 0)) + 1 / case.frames
    fixed_s = case.service_s + trips * case.round_trip_s
    transfer_s = case.transfer_s(read + written)
    busy = float(min(case.replicas, case.callers))  # replicas
    for _ in range(50):  # iterate: a busy store makes requests longer, and so gets fewer of them
        served = max(1, round(busy))
        # A request uses the store twice, with the computation in between.
        store_rate = closed_network(served, fixed_s / 2, transfer_s / 2, case.store_servers, 0)
        held_s = 2 * served / store_rate
        if case.routing == "idle":  # approximately one queue for all replicas
            rate = min(case.replicas / held_s, case.callers / (case.think_s + held_s))
        else:
            rate = closed_network(
                case.callers, case.think_s, held_s, case.replicas, case.service_cv
            )
        busy = (busy + rate * held_s) / 2
    return Figures(
        frames_s=rate * case.objects,
        frames_s_track=rate / case.callers,
        utilisation=min(1.0, rate * held_s / case.replicas),
        answer_s=case.callers / rate - case.think_s,
        warm_share=1 - missing / case.objects / attended_memories(case),
        read_gbit=rate * read * 8e-9,
        written_gbit=rate * written * 8e-9,
        commands_s=rate
        * (missing + case.objects * (continued * COMMANDS + (1 - continued) * START_COMMANDS)),
        store_utilisation=rate * transfer_s / case.store_servers,
    )


def closed_network(
    callers: int, think_s: float, service_s: float, servers: int, service_cv: float
) -> float:
    """Return requests per second where each request queues at a server drawn at random.

    Mean value analysis; the remaining time of a request in service is (1 + cv^2) / 2 of its service
    time on average.
    """
    saved = (1 - service_cv**2) / 2
    queue = rate = 0.0
    for present in range(1, callers + 1):
        used = rate * service_s / servers
        answer_s = service_s * (1 + queue - used * saved)
        rate = present / (think_s + answer_s)
        queue = rate * answer_s / servers
    return rate
