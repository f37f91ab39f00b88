"""Requests per second by the number of replicas on one Redis server and of concurrent tracks.

    python -m benchmarks.replicas --model-id micro --device cpu --image-size 128

Each client follows an object of its own, one request after the other and each on the next replica:
as behind a balancer that knows no tracks, so a replica mostly reads memories that others wrote.
All replicas run all the time; what differs is how many are asked. Every replica computes with one
thread, and the machine's cores, which also serve Redis and the clients, bound what is possible.
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

from benchmarks.clip import FIRST_NEW_FRAME, Clip, clients_own, make_clip
from benchmarks.contenders import Function
from benchmarks.harness import (
    Panel,
    Row,
    add_common_options,
    describe,
    draw,
    report,
    result,
    set_up,
)
from benchmarks.turns import median

PICTURES = 20
THREADS = 1  # of each replica
COLUMNS = ["replicas", "clients", "requests", "requests_per_s", "over_one_replica", "p50_ms",
           "p99_ms"]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what is asked for."""
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
        clip = make_clip(bench.folder / "clip", PICTURES, max(options.clients), tuple(options.size))
        functions = [
            stack.enter_context(closing(Function(environment, bench.server, bench.folder)))
            for _ in range(max(options.replicas))
        ]
        for function in functions:
            function.replica.wait()
        with tqdm(total=options.rounds * len(points), unit="point", leave=False) as progress:
            for _ in range(options.rounds):
                for count, clients in points:
                    spent = run_clients(functions[:count], clip, clients, options.seconds)
                    # a client asks again at once: its rate is one over its mean time
                    rates[count, clients].append(sum(1000 / fmean(client) for client in spent))
                    times[count, clients] += chain.from_iterable(spent)
                    progress.update()
        rows = [row(count, clients, rates, times) for count, clients in points]
        found = result("replicas", options, bench.environment, rows)
    found["machine"]["threads"] = THREADS
    report(found, options, COLUMNS, plot)


def row(
    count: int,
    clients: int,
    rates: dict[tuple[int, int], list[float]],
    times: dict[tuple[int, int], list[float]],
) -> Row:
    """Return a point: the median rate of its rounds, and the times of all its requests."""
    spent = sorted(times[count, clients])
    fewest = min(replicas for replicas, _ in rates)
    ratios = [a / b for a, b in zip(rates[count, clients], rates[fewest, clients], strict=True)]
    return {
        "replicas": count,
        "clients": clients,
        "requests": len(spent),
        "requests_per_s": median(rates[count, clients]),
        "over_one_replica": median(ratios) if fewest == 1 else None,
        "p50_ms": median(spent),
        "p99_ms": round(spent[int(0.99 * (len(spent) - 1))], 2),
    }


def run_clients(
    functions: Sequence[Function], clip: Clip, clients: int, seconds: float
) -> list[list[float]]:
    """Let clients follow their objects for a while; return the milliseconds of their requests."""
    together = threading.Barrier(clients)
    with ThreadPoolExecutor(clients) as pool:
        asked = [
            pool.submit(follow, functions, clip, number, seconds, together)
            for number in range(clients)
        ]
        return [client.result() for client in asked]


def follow(
    functions: Sequence[Function],
    clip: Clip,
    number: int,
    seconds: float,
    together: threading.Barrier,
) -> list[float]:
    """Start one object, wait for the other clients, and follow it until the time is over."""
    frames = clients_own(clip.frames[FIRST_NEW_FRAME:], number)
    function = functions[number % len(functions)]
    states = function.begin(clip.frames[0], [clip.masks[number]])
    spent = []
    place = number
    together.wait()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        place += 1
        function = functions[place % len(functions)]
        ms, answer = function.post(frames[place % len(frames)], [None], states)
        states = answer["states"]
        spent.append(ms)
    return spent


def plot(found: Row, path: Path) -> None:
    """Draw rate and waiting over the replicas, a curve per number of clients."""
    rows = found["rows"]
    counts, clients = ([*dict.fromkeys(row[name] for row in rows)] for name in COLUMNS[:2])

    def curves(value: str) -> dict[str, list[float | None]]:
        at = {(row["replicas"], row["clients"]): row[value] for row in rows}
        return {f"clients: {n}": [at[count, n] for count in counts] for n in clients}

    draw(
        path,
        title=f"Replicas on one Redis, {found['model']['name']}, one object per client",
        x_label="replicas, one thread each",
        x=counts,
        panels=[
            Panel("requests per second", curves("requests_per_s")),
            Panel("p50, ms", curves("p50_ms")),
            Panel("p99, ms", curves("p99_ms")),
        ],
        caption=f"{describe(found)}. More replicas than cores cannot be faster",
    )


if __name__ == "__main__":
    main()
