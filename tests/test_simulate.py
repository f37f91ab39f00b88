"""The scaling calculations agree with each other, with the tracker, and with `scaling.json`."""

from __future__ import annotations

import json
import math
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling_cases import STORED_MEMORIES, STORED_STEPS, Case, Figures, inputs
from benchmarks.scaling_events import MemoryCache, simulate
from benchmarks.scaling_formulas import attended_memories, missing_memories, predict
from benchmarks.scaling_memory import StoredTracks, predict_memory, simulate_memory
from benchmarks.simulate import base_case, deviation, main, size
from testbed.redis_server import RedisServer

FAST: dict[str, Any] = {"requests": 1500, "frames": 50}
CASES = {
    "one caller alone": Case(tracks=5, **FAST),
    "one replica, full": Case(tracks=40, **FAST),
    "as many callers as replicas": Case(tracks=40, replicas=8, store_servers=8, **FAST),
    "callers who think": Case(tracks=100, replicas=4, think_s=1, **FAST),
    "sticky": Case(tracks=200, replicas=4, think_s=2, routing="sticky", **FAST),
    "a shared queue": Case(
        tracks=100, replicas=4, think_s=1, store_servers=4, routing="idle", **FAST
    ),
    "a full store": Case(tracks=400, replicas=20, think_s=1, store_gbit=3, **FAST),
    "short clips": Case(tracks=30, replicas=3, frames=8, think_s=0.2, requests=1500),
    "times that vary": Case(tracks=30, replicas=3, service_cv=0.5, **FAST),
}


@pytest.mark.parametrize("name", CASES)
def test_closed_form_and_simulation_agree(name: str) -> None:
    """Throughput, use of the replicas and bandwidth are within 8 %."""
    case = CASES[name]

    assert deviation(predict(case), simulate(case)) < 0.08


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_reads_are_those_of_random_routing(replicas: int) -> None:
    """The mean number of frame memories missing from a replica's cache is within 4 %."""
    case = Case(tracks=replicas, objects=1, replicas=replicas, store_servers=8, requests=4000)
    missing = (1 - simulate(case).warm_share) * attended_memories(case)

    assert missing == pytest.approx(missing_memories(case), rel=0.04, abs=0.01)


@pytest.mark.parametrize("cache_mb", [150, 200, 300, 600])
def test_a_small_cache_drops_memories(cache_mb: int) -> None:
    """The share of cached memories is within 0.06, if the cache holds a step of every track."""
    case = Case(tracks=60, objects=1, replicas=2, think_s=4, cache_mb=cache_mb, requests=1500)

    assert simulate(case).warm_share == pytest.approx(predict(case).warm_share, abs=0.06)


def test_a_lone_caller_and_a_full_replica_have_exact_times() -> None:
    """A lone caller never waits; a full replica serves one request after the other."""
    case = Case(tracks=5, frames=10**5, round_trip_s=0.001, requests=1500)
    size = 5 * (case.memory_bytes + 2 * case.state_bytes)
    held_s = 0.03 + 5 * 0.008 + 3 * 0.001 + size * 8 / 10e9
    figures = simulate(case)

    assert figures.answer_s == pytest.approx(held_s, rel=1e-3)
    assert figures.p99_s == pytest.approx(held_s, rel=1e-3)
    assert figures.warm_share > 0.999
    assert simulate(replace(case, tracks=50)).frames_s == pytest.approx(5 / held_s, rel=1e-2)


def test_a_seed_gives_one_result() -> None:
    """Another seed gives another result."""
    case = Case(tracks=50, replicas=4, think_s=0.3, requests=500)

    assert simulate(case) == simulate(case)
    assert simulate(case) != simulate(replace(case, seed=1))


@pytest.mark.parametrize("tracks", [10, 1000])
@pytest.mark.parametrize("service", inputs()["services"])
def test_sizes_reach_the_pace_they_are_for(service: str, tracks: int) -> None:
    """Each track gets frames at the wanted pace, and replicas and store are not full."""
    measured = inputs()["services"][service]
    start = replace(base_case(measured), tracks=tracks)
    figures = predict(size(start, measured["frame_every_s"]))

    assert figures.frames_s_track * measured["frame_every_s"] == pytest.approx(1, rel=0.02)
    assert figures.utilisation < 0.75
    assert figures.store_utilisation < 0.75


def test_abandoned_tracks_fill_the_store_until_they_expire() -> None:
    """Closed form and simulation agree on the memory; a shorter lifetime needs less."""
    stored = StoredTracks(2, clip_s=120, ttl_s=7200)

    assert simulate_memory(stored, hours=8) == pytest.approx(predict_memory(stored), rel=0.08)
    assert predict_memory(replace(stored, ttl_s=1800)) < 0.4 * predict_memory(stored)


def test_simulated_caches_miss_what_real_replicas_read(redis_server: RedisServer) -> None:
    """In every step a simulated cache misses as many memories as the tracker reads."""
    from benchmarks.store_load import make_tracker, start, step  # imports torch

    capacity, shape = 40, (1, 4, 4)
    rng = random.Random(5)
    read = []
    with redis_server.client() as client:
        trackers = [
            make_tracker(client, cache_bytes=capacity * 2 * math.prod(shape), memory_shape=shape)
            for _ in range(3)
        ]
        for tracker in trackers:
            store = tracker._storage._store
            load = store.load_memories
            store.load_memories = lambda keys, load=load: (  # type: ignore[method-assign,misc]
                read.append(len(keys)) or load(keys)  # type: ignore[func-returns-value]
            )
        caches = [MemoryCache(capacity) for _ in trackers]
        tracks, expected = {}, []
        for track in range(4):
            replica = rng.randrange(3)
            tracks[track] = (start(trackers[replica], 1), 0)
            caches[replica].add(track, 0)
        for _ in range(150):
            track, replica = rng.randrange(4), rng.randrange(3)
            objects, last = tracks[track]
            expected.append(caches[replica].read(track, last + 1))
            caches[replica].add(track, last + 1)
            tracks[track] = (step(trackers[replica], objects)[0], last + 1)

    assert read[4:] == expected
    assert 0 in expected
    assert max(expected) == 7


def test_bytes_and_commands_are_what_the_tracker_sends(tmp_path: Path) -> None:
    """The store's numbers in scaling.json are those of this code."""
    from benchmarks.store_load import measure  # imports torch

    server = RedisServer(tmp_path)
    try:
        measured = measure(server, steps=3)
    finally:
        server.stop()
    expected = inputs()["store"]
    case, stored = Case(), StoredTracks(1)

    for name in ("read_warm", "read_cold", "written"):
        assert measured[name] == pytest.approx(expected[name], abs=64), name  # decimals of ids
    for name in ("commands_warm", "commands_cold"):
        assert measured[name] == expected[name]
    assert case.memory_bytes + case.state_bytes == pytest.approx(measured["written"], abs=64)
    assert stored.active_bytes == pytest.approx(expected["memory_active"], rel=0.001)
    assert stored.idle_bytes == pytest.approx(expected["memory_idle"], rel=0.001)
    active = STORED_MEMORIES * measured["memory_frame"] + STORED_STEPS * measured["memory_step"]
    assert measured["memory_active"] == pytest.approx(active, rel=0.01)


def test_a_case_is_read_from_a_file_and_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options override the file; both figures and their deviation are printed."""
    path = tmp_path / "case.json"
    path.write_text(json.dumps({"tracks": 10, "objects": 2, "requests": 200}))
    main(["--case", str(path), "--objects", "5"])
    lines = capsys.readouterr().out.splitlines()
    rows: dict[str, Any] = {line.split(" | ")[0].strip("| "): line for line in lines[2:] if line}

    assert set(rows) == {field.name for field in fields(Figures)}
    case = Case(tracks=10, objects=5, requests=200)
    assert f"{simulate(case).frames_s:.4g}" in rows["frames_s"]
    assert f"{predict(case).frames_s:.4g}" in rows["frames_s"]
