"""Compare the simulation of `simulate` with real replicas and a real Redis server.

    python -m benchmarks.simulate_check

Each client tracks its own objects and sends each request to a replica drawn at random. Every round
first measures the duration of a request, with one client on each replica; the simulation computes
the rest. The network is very small (`micro`'s, at 128 pixels, random weights).
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

from benchmarks.clip import distinct_frames
from benchmarks.scaling_cases import Case, Figures
from benchmarks.scaling_events import simulate
from benchmarks.scaling_formulas import predict
from benchmarks.simulate import table
from shapes import encode_cvat_rle
from testbed.drawn_frames import base64_text, blob_mask, jpeg_frames
from testbed.functions import Replica, micro_environment, without_settings
from testbed.redis_server import RedisServer

FRAMES = 40


@dataclass
class Observed:
    """A measured run: answer times in seconds, the bytes Redis sent, and the run's length."""

    answers_s: list[float]
    read_bytes: int
    seconds: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.answers_s) / self.seconds


def drive(
    replicas: Sequence[Replica], client: redis.Redis, clients: int, seconds: float, *, sticky: bool
) -> Observed:
    """Run clients that track two objects each, over and over; measure the second half."""
    frames = jpeg_frames(FRAMES)
    prompt = {"type": "mask", "points": encode_cvat_rle(blob_mask())}
    end, answers_s = time.monotonic() + seconds, []

    def track_clips(number: int) -> None:
        rng = random.Random(number)  # noqa: S311  # seeded
        images = [base64_text(frame) for frame in distinct_frames(frames, number)]
        while True:
            states: list[str] = []
            for image in images:
                index = number % len(replicas) if sticky else rng.randrange(len(replicas))
                shapes = [None, None] if states else [prompt, prompt]
                begin = time.monotonic()
                states = replicas[index].track(image, shapes, states)["states"]
                now = time.monotonic()
                if now > end:
                    return
                if now > end - seconds / 2:
                    answers_s.append(now - begin)

    def sent_bytes() -> int:
        return int(client.info("stats")["total_net_output_bytes"])

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(track_clips, number) for number in range(clients)]
        time.sleep(seconds / 2)
        before = sent_bytes()
        time.sleep(seconds / 2)
        read = sent_bytes() - before
        for client_run in running:
            client_run.result()
    return Observed(answers_s, read, seconds / 2)


def make_case(alone: Observed, replicas: int, clients: int, sizes: tuple[int, int]) -> Case:
    """Return the simulation's case for the measured replicas and clients."""
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
        round_trip_s=0,  # part of the measured duration
        requests=5000,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, simulate, and print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    options = parser.parse_args(arguments)
    runs_by_clients: dict[int, list[tuple[Observed, Figures, Figures]]] = {
        count: [] for count in options.clients
    }
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        server = RedisServer(folder)
        stack.callback(server.stop)
        client = stack.enter_context(server.client())
        environment = without_settings(os.environ)
        environment |= micro_environment(folder) | server.environment
        replicas = [Replica(environment) for _ in range(options.replicas)]
        for replica in replicas:
            stack.callback(replica.kill)
        for replica in replicas:
            replica.wait()
        drive(replicas, client, options.replicas, 2, sticky=True)
        kinds = ("frame", "step")
        keys = [next(client.scan_iter(f"sam2:*:{kind}:*")) for kind in kinds]
        sizes = (int(client.strlen(keys[0])), int(client.strlen(keys[1])))
        for _ in range(options.rounds):
            alone = drive(replicas, client, options.replicas, options.seconds, sticky=True)
            for count in options.clients:
                real = drive(replicas, client, count, options.seconds, sticky=False)
                case = make_case(alone, options.replicas, count, sizes)
                runs_by_clients[count].append((real, predict(case), simulate(case)))
    rows = []
    for count, runs in runs_by_clients.items():
        measured = median(real.rate for real, _, _ in runs)
        deviations = [simulated.frames_s / 2 / real.rate - 1 for real, _, simulated in runs]
        rows.append([
            count,
            f"{measured:.1f}",
            f"{median(simulated.frames_s / 2 for _, _, simulated in runs):.1f}",
            f"{median(computed.frames_s / 2 for _, computed, _ in runs):.1f}",
            f"{median(deviations):+.0%} ({min(deviations):+.0%} to {max(deviations):+.0%})",
            f"{median(real.read_bytes / len(real.answers_s) for real, _, _ in runs) / 1e3:.0f}",
            f"{median(s.read_gbit / s.frames_s * 2 for _, _, s in runs) * 1e6 / 8:.0f}",
        ])  # fmt: skip
    head = ["clients", "requests/s measured", "simulated", "closed form",
            "simulated to measured", "KB read per request, measured", "simulated"]  # fmt: skip
    print(table(head, rows))


if __name__ == "__main__":
    main()
