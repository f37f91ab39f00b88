"""The long fault, fuzz and load tests; prints the tables of `docs/reliability.md`.

Any unexpected result ends it with an error. `make soak` runs it; with smaller numbers:

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
    Deployment,
    Fault,
    Outcome,
    connection_cut,
    deploy_in,
    evict,
    kill_at_random,
    prompts,
    try_fault,
)
from tests.faults.mutations import PICTURES, Checker, Mutator, shapes

MICRO = {"SAM2_CONFIG": "", "SAM2_CHECKPOINT": "", "SAM2_IMAGE_SIZE": "", "SAM2_MODEL_ID": "micro"}
MB = 1 << 20
PARTS = ["faults", "input", "load"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all parts and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs over a 40-frame clip")
    parser.add_argument("--cuts", type=int, default=100, help="connections cut at random bytes")
    parser.add_argument("--inputs", type=int, default=20_000, help="mutated requests")
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
            with deploy_in(folder) as deployment:
                disturb(deployment, options.kills, options.cuts, options.seed)
        if "input" in options.parts:
            mutate(options.inputs, options.seed)
        if "load" in options.parts:
            (folder / "load").mkdir()
            load(folder / "load", options.clients, options.objects, options.minutes * 60)


def disturb(deployment: Deployment, kills: int, cuts: int, seed: int) -> None:
    """Inject every fault once, and random ones often."""
    undisturbed = clip_answers(deployment, 40)
    outcomes = [try_fault(fault, deployment, undisturbed[:11]) for fault in FAULTS]
    rng = random.Random(seed)
    cut = []
    for number in range(cuts):
        way, share = rng.choice(list(WAYS)), rng.random()
        fault = Fault(f"cut {number}", partial(connection_cut, way=way, share=share), 200)
        cut.append(try_fault(fault, deployment, undisturbed[:11]))
    evicted = {policy: evict(deployment, undisturbed[:11], policy) for policy in POLICIES}
    caller = Caller(frames=40)
    caller.start(deployment.replicas[0])
    killed = kill_at_random(deployment, caller, kills, seed=seed)
    assert caller.answers == undisturbed
    assert "Traceback" not in deployment.log.read_text()
    lost = sum(
        outcome.end == "start again" and not outcome.fault.loses_tracks for outcome in outcomes
    )
    tried = len(outcomes) + len(cut) + len(evicted) + len(killed)
    print(f"### Faults: {tried} tried, {tried - lost} survived, {lost} lost\n")
    print("| what happens | the caller gets | after | then |\n| --- | --- | --- | --- |")
    for outcome in outcomes:
        seconds = f"{outcome.reply.seconds:.1f} s"
        print(row(outcome.fault.name, answer(outcome), seconds, outcome.end))
    if cut:
        longest = max(outcome.reply.seconds for outcome in cut)
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


def clip_answers(deployment: Deployment, frames: int) -> list[list[Any]]:
    """Return the answers of a run without faults."""
    caller = Caller(frames=frames)
    caller.start(deployment.replicas[0])
    assert caller.follow(deployment.replicas) is None
    return caller.answers


def answer(outcome: Outcome) -> str:
    """Return status and message of a reply, shortened."""
    reply = outcome.reply
    return f"{reply.status or 'no answer'} {reply.message.partition(':')[0]}".strip()


def row(*cells: str) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def mutate(inputs: int, seed: int) -> None:
    """Send mutated requests to the handler."""
    with Path(os.devnull).open("w") as nowhere:
        with redirect_stdout(nowhere):  # the function logs there from now on
            function = Function("main", MICRO | {"SAM2_DEVICE": "cpu"})
        foreign_tokens = function.track(PICTURES[0], shapes(), [])["states"]
        checker = Checker(function, set(foreign_tokens))
        mutator = Mutator(seed, function.track(PICTURES[0], shapes(), [])["states"])
        by_way: defaultdict[str, Counter[int]] = defaultdict(Counter)
        slowest_s, warm_bytes = 0.0, 0
        for number in range(inputs):
            way, body = mutator.mutated()
            begin = time.monotonic()
            by_way[way][checker.send(body)] += 1
            slowest_s = max(slowest_s, time.monotonic() - begin)
            if number == inputs // 10:
                warm_bytes = resident_bytes(os.getpid())
        function.track(PICTURES[1], [None] * len(foreign_tokens), foreign_tokens)
    grown = resident_bytes(os.getpid()) - warm_bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    statuses = sorted(checker.seen)
    failed = sum(count for status, count in checker.seen.items() if status >= 500)
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
    """Durations and errors of a load test, and the memory of its processes."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)


def load(folder: Path, clients: int, objects: int, seconds: float) -> None:
    """Let callers follow their clips on both replicas, concurrently and repeatedly."""
    # Short lifetimes and a small cache, so that memory stops growing soon.
    lifetimes = {"SAM2_STATE_TTL": "60", "SAM2_RETRY_WINDOW": "30", "SAM2_MEMORY_CACHE_MB": "32"}
    seen = Load()
    with deploy_in(folder, MICRO | lifetimes | {"CVAT_FUNCTIONS_REDIS_TIMEOUT": "5"}) as deployment:
        deployment.redis.stop()
        deployment.start_redis(persistent=False)  # the disk is not measured
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(clients + 1) as pool:
            done = threading.Event()
            watch = pool.submit(watch_memory, deployment, seen, done)
            callers = [
                pool.submit(call, deployment, seen, number, objects, end)
                for number in range(clients)
            ]
            for caller in callers:
                caller.result()
            done.set()
            watch.result()
    cuts = quantiles(seen.seconds, n=100)
    print(f"### Load: {len(seen.seconds)} requests, {len(seen.errors)} errors\n")
    print("| callers | objects each | minutes | requests/s | objects/s | p50 | p99 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rate = len(seen.seconds) / seconds
    numbers = [str(clients), str(objects), f"{seconds / 60:g}", f"{rate:.1f}"]
    numbers += [f"{rate * objects:.0f}", *(f"{cuts[index] * 1000:.0f} ms" for index in (49, 98))]
    print(row(*numbers))
    resident = [f"{median(part) / MB:.0f} MB" for part in thirds(seen.resident)]
    stored = [f"{median(part) / MB:.0f} MB" for part in thirds(seen.stored)]
    print(
        f"\nResident memory of both replicas in the first, second and last third: "
        f"{', '.join(resident)}; of Redis: {', '.join(stored)}."
    )
    assert not seen.errors, seen.errors[:3]


def thirds(values: list[int]) -> list[list[int]]:
    """Split values into the first, second and last third."""
    third = len(values) // 3
    return [values[:third], values[third : 2 * third], values[2 * third :]]


def watch_memory(deployment: Deployment, seen: Load, done: threading.Event) -> None:
    """Record the processes' memory once a second."""
    with deployment.redis.client() as client:
        while not done.wait(1):
            seen.resident.append(sum(replica.resident_bytes() for replica in deployment.replicas))
            seen.stored.append(int(client.info("memory")["used_memory"]))


def call(deployment: Deployment, seen: Load, number: int, objects: int, end: float) -> None:
    """Follow a clip repeatedly until the time is over."""
    frames = [base64_text(frame) for frame in jpeg_frames(40, seed=number)]
    drawn = (prompts() * objects)[:objects]
    states: list[str] = []
    index = 0
    while time.monotonic() < end:
        image, sent = frames[index], [None] * objects if states else drawn
        reply = deployment.replicas[(index + number) % 2].post(image, sent, states)
        if reply.status != 200:
            seen.errors.append(f"{reply.status} {reply.message}")
            index, states = 0, []
            continue
        seen.seconds.append(reply.seconds)
        index = (index + 1) % len(frames)
        states = reply.body["states"] if index else []


if __name__ == "__main__":
    main()
