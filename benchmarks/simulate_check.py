"""The simulation held to the real thing: clients on real replicas and a real Redis server.

    python -m benchmarks.simulate_check

Each client follows objects of its own and sends every request to a replica drawn at random. How
long a request takes is measured first in every round, with one client on each replica; the rest is
the simulation's. The network is very small (`micro`'s, at 128 pixels, random weights).
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

import redis

from benchmarks.clip import clients_own
from benchmarks.simulate import Case, Figures, predict, simulate, table
from shapes import encode_cvat_rle
from testbed.drawn_frames import base64_text, blob_mask, jpeg_frames
from testbed.functions import Replica, micro_environment
from testbed.redis_server import RedisServer

FRAMES = 40


@dataclass
class Seen:
    """What clients saw of one run: answer times in seconds, and the bytes the server sent."""

    answers_s: list[float]
    read_bytes: int
    seconds: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.answers_s) / self.seconds


def drive(
    replicas: Sequence[Replica], client: redis.Redis, clients: int, seconds: float, *, sticky: bool
) -> Seen:
    """Let clients follow two objects each, over and over; look at the last half of the time."""
    frames = jpeg_frames(FRAMES)
    prompt = {"type": "mask", "points": encode_cvat_rle(blob_mask())}
    end, answers_s = time.monotonic() + seconds, []

    def follow(number: int) -> None:
        rng = random.Random(number)  # noqa: S311
        images = [base64_text(frame) for frame in clients_own(frames, number)]
        while True:
            states: list[str] = []
            for image in images:
                place = number % len(replicas) if sticky else rng.randrange(len(replicas))
                shapes = [None, None] if states else [prompt, prompt]
                asked = time.monotonic()
                states = replicas[place].track(image, shapes, states)["states"]
                now = time.monotonic()
                if now > end:
                    return
                if now > end - seconds / 2:
                    answers_s.append(now - asked)

    def sent() -> int:
        return int(client.info("stats")["total_net_output_bytes"])

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(follow, number) for number in range(clients)]
        time.sleep(seconds / 2)
        before = sent()
        time.sleep(seconds / 2)
        read = sent() - before
        for one in running:
            one.result()
    return Seen(answers_s, read, seconds / 2)


def case_of(alone: Seen, replicas: int, clients: int, sizes: tuple[int, int]) -> Case:
    """Return the case that ought to behave like the real thing."""
    mean = fmean(alone.answers_s)
    return Case(
        tracks=2 * clients,
        objects=2,
        frames=FRAMES,
        base_s=mean,
        object_s=0,
        service_cv=stdev(alone.answers_s) / mean,
        replicas=replicas,
        memory_bytes=sizes[0],
        state_bytes=sizes[1],
        round_trip_s=0,  # in the measured time
        requests=5000,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    options = parser.parse_args(arguments)
    seen: dict[int, list[tuple[Seen, Figures, Figures]]] = {count: [] for count in options.clients}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        server = RedisServer(folder)
        stack.callback(server.stop)
        client = stack.enter_context(server.client())
        environment = {key: value for key, value in os.environ.items() if key[:5] != "SAM2_"}
        environment |= micro_environment(folder) | server.environment
        replicas = [Replica(environment) for _ in range(options.replicas)]
        for one in replicas:
            stack.callback(one.kill)
        for one in replicas:
            one.wait()
        drive(replicas, client, options.replicas, 2, sticky=True)
        kinds = ("frame", "step")
        keys = [next(client.scan_iter(f"sam2:*:{kind}:*")) for kind in kinds]
        sizes = (int(client.strlen(keys[0])), int(client.strlen(keys[1])))
        for _ in range(options.rounds):
            alone = drive(replicas, client, options.replicas, options.seconds, sticky=True)
            for count in options.clients:
                real = drive(replicas, client, count, options.seconds, sticky=False)
                case = case_of(alone, options.replicas, count, sizes)
                seen[count].append((real, predict(case), simulate(case)))
    rows = []
    for count, runs in seen.items():
        measured = median(real.rate for real, _, _ in runs)
        apart = [simulated.frames_s / 2 / real.rate - 1 for real, _, simulated in runs]
        rows.append([
            count,
            f"{measured:.1f}",
            f"{median(simulated.frames_s / 2 for _, _, simulated in runs):.1f}",
            f"{median(computed.frames_s / 2 for _, computed, _ in runs):.1f}",
            f"{median(apart):+.0%} ({min(apart):+.0%} to {max(apart):+.0%})",
            f"{median(real.read_bytes / len(real.answers_s) for real, _, _ in runs) / 1e3:.0f}",
            f"{median(s.read_gbit / s.frames_s * 2 for _, _, s in runs) * 1e6 / 8:.0f}",
        ])  # fmt: skip
    head = ["clients", "requests/s measured", "simulated", "closed form",
            "simulated to measured", "KB read per request, measured", "simulated"]  # fmt: skip
    print(table(head, rows))


if __name__ == "__main__":
    main()
