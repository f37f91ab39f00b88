"""Requests per second by the number of replicas on one Redis server and of concurrent tracks.

    python -m benchmarks.replicas --model-id micro --device cpu --image-size 128

Each client tracks one object, one request after the other, each on the next replica, as behind a
round-robin load balancer: a replica mostly reads memories that others wrote. All replicas run all
the time; the number of those that get requests varies. Each replica uses one thread. The machine's
cores limit the rate, and they also serve Redis and the clients.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from benchmarks.clip import FIRST_NEW_FRAME, Clip, distinct_frames, make_clip
from benchmarks.comparison import median
from benchmarks.harness import (
    Panel,
    Row,
    add_common_options,
    describe,
    draw,
    make_result,
    report,
    set_up,
)
from benchmarks.trackers import ServedFunction

CLIP_FRAMES = 20
THREADS = 1  # of each replica
COLUMNS = ["replicas", "clients", "requests", "requests_per_s", "over_one_replica", "p50_ms",
           "p99_ms"]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the files that the options name."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--size", type=int, nargs=2, default=(360, 640), metavar=("H", "W"))
    options = parser.parse_args(arguments)
    points = [(count, clients) for count in options.replicas for clients in options.clients]
    rates: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    times: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    with set_up(options) as bench, ExitStack() as stack:
        environment = bench.environment | {"OMP_NUM_THREADS": str(THREADS)}
        clip = make_clip(
            bench.folder / "clip", CLIP_FRAMES, max(options.clients), tuple(options.size)
        )
        functions = [
            stack.enter_context(closing(ServedFunction(environment, bench.server, bench.folder)))
            for _ in range(max(options.replicas))
        ]
        for function in functions:
            function.replica.wait()
        with tqdm(total=options.rounds * len(points), unit="point", leave=False) as progress:
            for _ in range(options.rounds):
                for count, clients in points:
                    all_ms = run_clients(functions[:count], clip, clients, options.seconds)
                    # A client sends its next request at once: its rate is one over its mean time.
                    rates[count, clients].append(sum(1000 / fmean(ms) for ms in all_ms))
                    times[count, clients] += chain.from_iterable(all_ms)
                    progress.update()
        rows = [make_row(count, clients, rates, times) for count, clients in points]
        result = make_result("replicas", options, bench.environment, rows)
    result["machine"]["threads"] = THREADS
    report(result, options, COLUMNS, plot)


def make_row(
    count: int,
    clients: int,
    rates: dict[tuple[int, int], list[float]],
    times: dict[tuple[int, int], list[float]],
) -> Row:
    """Return the row of one measured point: the median rate, and quantiles of the times."""
    sorted_ms = sorted(times[count, clients])
    fewest = min(replicas for replicas, _ in rates)
    ratios = [a / b for a, b in zip(rates[count, clients], rates[fewest, clients], strict=True)]
    return {
        "replicas": count,
        "clients": clients,
        "requests": len(sorted_ms),
        "requests_per_s": median(rates[count, clients]),
        "over_one_replica": median(ratios) if fewest == 1 else None,
        "p50_ms": median(sorted_ms),
        "p99_ms": round(sorted_ms[int(0.99 * (len(sorted_ms) - 1))], 2),
    }


def run_clients(
    functions: Sequence[ServedFunction], clip: Clip, clients: int, seconds: float
) -> list[list[float]]:
    """Run concurrent clients; return the milliseconds of each client's requests."""
    barrier = threading.Barrier(clients)
    with ThreadPoolExecutor(clients) as pool:
        running = [
            pool.submit(follow, functions, clip, number, seconds, barrier)
            for number in range(clients)
        ]
        return [client.result() for client in running]


def follow(
    functions: Sequence[ServedFunction],
    clip: Clip,
    number: int,
    seconds: float,
    barrier: threading.Barrier,
) -> list[float]:
    """Start one object, wait for the other clients, and track it until the time is over."""
    frames = distinct_frames(clip.frames[FIRST_NEW_FRAME:], number)
    function = functions[number % len(functions)]
    states = function.start_objects(clip.frames[0], [clip.masks[number]])
    times_ms = []
    index = number
    barrier.wait()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        index += 1
        function = functions[index % len(functions)]
        ms, answer = function.post(frames[index % len(frames)], [None], states)
        states = answer["states"]
        times_ms.append(ms)
    return times_ms


def plot(result: Row, path: Path) -> None:
    """Draw rate and answer times over the replicas, a curve per number of clients."""
    rows = result["rows"]
    counts, clients = ([*dict.fromkeys(row[name] for row in rows)] for name in COLUMNS[:2])

    def curves(value: str) -> dict[str, list[float | None]]:
        at = {(row["replicas"], row["clients"]): row[value] for row in rows}
        return {f"clients: {n}": [at[count, n] for count in counts] for n in clients}

    draw(
        path,
        title=f"Replicas on one Redis, {result['model']['name']}, one object per client",
        x_label="replicas, one thread each",
        x=counts,
        panels=[
            Panel("requests per second", curves("requests_per_s")),
            Panel("p50, ms", curves("p50_ms")),
            Panel("p99, ms", curves("p99_ms")),
        ],
        caption=f"{describe(result)}. More replicas than cores cannot be faster",
    )


if __name__ == "__main__":
    main()
