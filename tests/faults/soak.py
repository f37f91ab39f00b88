"""The long part of the fault, fuzz and load tests; prints the tables of `docs/reliability.md`.

Any broken promise ends it with an error. `make soak`; smaller numbers for a short one:

    make soak SOAK="--kills 10 --cuts 10 --inputs 2000 --minutes 0.5"
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import resource
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from testbed.drawn_frames import base64_text, jpeg_frames
from testbed.functions import Function, resident_bytes
from tests.faults.machinery import (
    FAULTS,
    POLICIES,
    WAYS,
    Caller,
    Fault,
    Outcome,
    Stage,
    connection_cut,
    evict,
    kill_at_random,
    prompts,
    stage_in,
    try_fault,
)
from tests.faults.mutations import PICTURES, Judge, Spoiler, shapes

MICRO = {"SAM2_CONFIG": "", "SAM2_CHECKPOINT": "", "SAM2_IMAGE_SIZE": "", "SAM2_MODEL_ID": "micro"}
MB = 1 << 20
PARTS = ["faults", "input", "load"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Try everything, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs over a 40-frame clip")
    parser.add_argument("--cuts", type=int, default=100, help="connections cut at random bytes")
    parser.add_argument("--inputs", type=int, default=20_000, help="spoiled requests")
    parser.add_argument("--minutes", type=float, default=5, help="of load")
    parser.add_argument("--clients", type=int, default=8, help="concurrent callers")
    parser.add_argument("--objects", type=int, default=4, help="objects of each caller")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    given = f' SOAK="{" ".join(sys.argv[1:])}"' if sys.argv[1:] else ""
    print(f"`make soak{given}`, {os.cpu_count()} CPU cores, Python {platform.python_version()}.\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "faults" in options.parts:
            with stage_in(folder) as stage:
                disturb(stage, options.kills, options.cuts, options.seed)
        if "input" in options.parts:
            spoil(options.inputs, options.seed)
        if "load" in options.parts:
            (folder / "load").mkdir()
            load(folder / "load", options.clients, options.objects, options.minutes * 60)


def disturb(stage: Stage, kills: int, cuts: int, seed: int) -> None:
    """Try every fault, and the random ones often."""
    undisturbed = clip_answers(stage, 40)
    outcomes = [try_fault(fault, stage, undisturbed[:11]) for fault in FAULTS]
    rng = random.Random(seed)
    cut = []
    for number in range(cuts):
        way, share = rng.choice(list(WAYS)), rng.random()
        fault = Fault(f"cut {number}", partial(connection_cut, way=way, share=share), 200)
        cut.append(try_fault(fault, stage, undisturbed[:11]))
    evicted = {policy: evict(stage, undisturbed[:11], policy) for policy in POLICIES}
    caller = Caller(frames=40)
    caller.start(stage.replicas[0])
    killed = kill_at_random(stage, caller, kills, seed=seed)
    assert caller.answers == undisturbed
    assert "Traceback" not in stage.log.read_text()
    lost = sum(one.end == "start again" and not one.fault.gone for one in outcomes)
    tried = len(outcomes) + len(cut) + len(evicted) + len(killed)
    print(f"### Faults: {tried} tried, {tried - lost} survived, {lost} lost\n")
    print("| what happens | the caller gets | after | then |\n| --- | --- | --- | --- |")
    for one in outcomes:
        print(row(one.fault.name, answer(one), f"{one.reply.seconds:.1f} s", one.end))
    if cut:
        longest = max(one.reply.seconds for one in cut)
        name = f"{len(cut)} connections cut at random bytes of what requests send or read"
        print(row(name, "200", f"{longest:.1f} s at most", "same masks"))
    for policy, seen in evicted.items():
        name = f"Redis is too small for three clips and evicts {seen.keys} keys ({policy})"
        what = f"{seen.answered} times 200, {seen.refused} times 410"
        print(row(name, what, "", "same masks, or start again"))
    for hit, count in sorted(Counter(kill.hit for kill in killed).items()):
        what = "200" if hit == "after the answer" else "no answer"
        print(row(f"{count} replicas killed at random moments, {hit}", what, "", "same masks"))
    print()


def clip_answers(stage: Stage, frames: int) -> list[list[Any]]:
    """Return the answers of a run that nobody disturbs."""
    caller = Caller(frames=frames)
    caller.start(stage.replicas[0])
    assert caller.follow(stage.replicas) is None
    return caller.answers


def answer(one: Outcome) -> str:
    """Return a reply in a few words."""
    return f"{one.reply.status or 'no answer'} {one.reply.message.partition(':')[0]}".strip()


def row(*cells: str) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def spoil(inputs: int, seed: int) -> None:
    """Send spoiled requests through the handler."""
    with Path(os.devnull).open("w") as nowhere:
        with redirect_stdout(nowhere):  # where the function then logs
            called = Function("main", MICRO | {"SAM2_DEVICE": "cpu"})
        strangers = called.track(PICTURES[0], shapes(), [])["states"]
        judge = Judge(called, set(strangers))
        spoiler = Spoiler(seed, called.track(PICTURES[0], shapes(), [])["states"])
        by_way: defaultdict[str, Counter[int]] = defaultdict(Counter)
        slowest_s, warm_bytes = 0.0, 0
        for number in range(inputs):
            way, body = spoiler.spoiled()
            begin = time.monotonic()
            by_way[way][judge.send(body)] += 1
            slowest_s = max(slowest_s, time.monotonic() - begin)
            if number == inputs // 10:
                warm_bytes = resident_bytes(os.getpid())
        called.track(PICTURES[1], [None] * len(strangers), strangers)
    grown = resident_bytes(os.getpid()) - warm_bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    statuses = sorted(judge.seen)
    failed = sum(count for status, count in judge.seen.items() if status >= 500)
    print(f"### Hostile input: {inputs} tried, {failed} answered with 5xx\n")
    print(row("spoiled", *map(str, statuses)))
    print(row(*["---"] * (len(statuses) + 1)))
    for way, seen in sorted(by_way.items()):
        print(row(way, *(str(seen[status]) for status in statuses)))
    print(
        f"\nSlowest answer {slowest_s:.1f} s. Resident memory {warm_bytes / MB:.0f} MB after a "
        f"tenth of them, {grown / MB:+.0f} MB at the end, {peak / MB:.0f} MB at most; "
        "the tracks that were started are in it.\n"
    )


@dataclass
class Load:
    """What the callers of a load test saw, and what it took."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)


def load(folder: Path, clients: int, objects: int, seconds: float) -> None:
    """Let callers follow clips of their own on both replicas, all at once and over and over."""
    # The lives are short and the cache is small so that both are full soon, and have to stay so.
    lives = {"SAM2_STATE_TTL": "60", "SAM2_RETRY_WINDOW": "30", "SAM2_MEMORY_CACHE_MB": "32"}
    seen = Load()
    with stage_in(folder, MICRO | lives | {"CVAT_FUNCTIONS_REDIS_TIMEOUT": "5"}) as stage:
        stage.redis.stop()
        stage.start_redis(keeps=False)  # as a cache is run; the disk is not what is measured
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(clients + 1) as pool:
            over = threading.Event()
            watch = pool.submit(watch_memory, stage, seen, over)
            callers = [pool.submit(call, stage, seen, one, objects, end) for one in range(clients)]
            for caller in callers:
                caller.result()
            over.set()
            watch.result()
    cuts = quantiles(seen.seconds, n=100)
    print(f"### Load: {len(seen.seconds)} requests, {len(seen.errors)} errors\n")
    print("| callers | objects each | minutes | requests/s | objects/s | p50 | p99 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rate = len(seen.seconds) / seconds
    numbers = [str(clients), str(objects), f"{seconds / 60:g}", f"{rate:.1f}"]
    numbers += [f"{rate * objects:.0f}", *(f"{cuts[place] * 1000:.0f} ms" for place in (49, 98))]
    print(row(*numbers))
    resident = [f"{median(part) / MB:.0f} MB" for part in thirds(seen.resident)]
    stored = [f"{median(part) / MB:.0f} MB" for part in thirds(seen.stored)]
    print(
        f"\nResident memory of both replicas in the first, second and last third: "
        f"{', '.join(resident)}; of Redis: {', '.join(stored)}."
    )
    assert not seen.errors, seen.errors[:3]


def thirds(values: list[int]) -> list[list[int]]:
    """Split what was seen over time in three."""
    third = len(values) // 3
    return [values[:third], values[third : 2 * third], values[2 * third :]]


def watch_memory(stage: Stage, seen: Load, over: threading.Event) -> None:
    """Look at the processes' memory once a second."""
    with stage.redis.client() as client:
        while not over.wait(1):
            seen.resident.append(sum(replica.resident_bytes() for replica in stage.replicas))
            seen.stored.append(int(client.info("memory")["used_memory"]))


def call(stage: Stage, seen: Load, number: int, objects: int, end: float) -> None:
    """Follow a clip of one's own again and again until the time is over."""
    frames = [base64_text(frame) for frame in jpeg_frames(40, seed=number)]
    drawn = (prompts() * objects)[:objects]
    states: list[str] = []
    place = 0
    while time.monotonic() < end:
        image, sent = frames[place], [None] * objects if states else drawn
        reply = stage.replicas[(place + number) % 2].post(image, sent, states)
        if reply.status != 200:
            seen.errors.append(f"{reply.status} {reply.message}")
            place, states = 0, []
            continue
        seen.seconds.append(reply.seconds)
        place = (place + 1) % len(frames)
        states = reply.body["states"] if place else []


if __name__ == "__main__":
    main()
