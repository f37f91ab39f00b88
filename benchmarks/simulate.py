"""How many tracks a number of replicas and one store carry: in closed form, and simulated.

    python -m benchmarks.simulate --tracks 1000 --replicas 23     # one case
    python -m benchmarks.simulate --case case.json                # the same, from a file
    python -m benchmarks.simulate --table                         # the tables of docs/scaling.md
    python -m benchmarks.simulate --plot benchmarks/plots         # and its picture

Callers wait for each answer, as CVAT's UI does, then think, then ask for the next frame. Figures
that were measured or assumed are read from `scaling.json`; nothing here knows the function itself.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import simpy
from matplotlib.figure import Figure

# As `track_state` and `state_store`; a test holds them to it.
MEMORY_REACH = 6
KEPT_MEMORIES = 10
KEPT_STEPS = 4
COMMANDS = 15  # for each object and step, and one more for each frame memory read
START_COMMANDS = 4

INPUTS = Path(__file__).parent / "scaling.json"
FEW_FRAMES = 8  # of each caller at least: then the frame memories in reach are all of this run

Events = Generator[simpy.Event, Any, None]


def _option(default: object, text: str) -> Any:  # noqa: ANN401  # a dataclass field of any type
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Case:
    """What is asked of how much; every field is an option on the command line."""

    tracks: int = _option(1000, "objects followed at the same time")
    objects: int = _option(5, "objects in one request")
    frames: int = _option(300, "frames a track is followed for; then the caller starts new ones")
    think_s: float = _option(0.0, "from an answer to the next request, mean of an exponential")
    base_s: float = _option(0.03, "time of a request without objects: decode, encoder, answer")
    object_s: float = _option(0.008, "further time of each object")
    service_cv: float = _option(0.0, "standard deviation of that time over its mean")
    replicas: int = _option(1, "workers, each serving one request at a time")
    routing: str = _option("random", "random, idle (the shortest queue) or sticky (by track)")
    cache_mb: float = _option(1024.0, "SAM2_MEMORY_CACHE_MB of each replica")
    memory_bytes: int = _option(524_504, "one frame memory in the store")
    state_bytes: int = _option(17_280, "one step in the store")
    store_servers: int = _option(1, "Redis servers, a track's keys on one of them")
    store_gbit: float = _option(10.0, "what one of them moves in Gbit/s, both ways together")
    round_trip_s: float = _option(0.0005, "from a replica to the store and back, without bytes")
    requests: int = _option(20_000, "to measure over; at least two of each caller")
    seed: int = _option(0, "of the simulation")

    @property
    def callers(self) -> int:
        """Requests that can be open at once: one for each group of objects."""
        return math.ceil(self.tracks / self.objects)

    @property
    def service_s(self) -> float:
        """Mean time of a request without the store."""
        return self.base_s + self.objects * self.object_s

    @property
    def cached_memories(self) -> int:
        """Frame memories that a replica keeps (the cache counts tensors, without a header)."""
        return int(self.cache_mb * 2**20 / self.memory_bytes)

    def transfer_s(self, size: float) -> float:
        """Time one store server takes for so many bytes."""
        return size * 8e-9 / self.store_gbit


@dataclass(frozen=True)
class Figures:
    """What comes of a case. Rates are for all together; the quantiles are simulated only."""

    frames_s: float  # objects x frames
    frames_s_track: float
    utilisation: float  # of the replicas
    answer_s: float
    warm_share: float  # of the frame memories attended to
    read_gbit: float
    written_gbit: float
    commands_s: float
    store_utilisation: float
    p50_s: float = math.nan
    p99_s: float = math.nan


# --- closed form ---------------------------------------------------------------------------------


def missing_memories(case: Case) -> float:
    """Return how many frame memories a request reads for each object, mean over a clip.

    A replica has the memory of the frame `a` steps ago if it served any of the last `a` steps,
    each with a chance of 1/R: it made the memory, or read it. Of the conditioning frame, if it
    served any step of the track. A cache that holds the last `h` steps of all tracks forgets what
    was not used in them: it misses if none of the last min(a, h) steps came here.
    """
    other, horizon = _other(case), cache_horizon(case)
    missing = 0.0
    for step in range(1, case.frames):
        ages = [*range(1, min(MEMORY_REACH, step - 1) + 1), step]
        missing += sum(other ** min(age, horizon) for age in ages)
    return missing / case.frames


def attended_memories(case: Case) -> float:
    """Return how many frame memories a request attends to for each object, mean over a clip."""
    return sum(min(step, MEMORY_REACH + 1) for step in range(1, case.frames)) / case.frames


def cache_horizon(case: Case) -> float:
    """Return how many steps back a replica's cache reaches; infinite if it holds whole clips.

    The least recently used goes first, so the cache holds what was touched in the last `h` steps of
    every track, with the largest `h` whose memories fit (Che's approximation, in whole steps).
    """
    shares, other = (case.replicas, 0.0) if case.routing == "sticky" else (1, _other(case))
    room = case.cached_memories / (case.tracks / shares)
    if _touched(case.frames, other) <= room:
        return math.inf
    return bisect_right(range(1, case.frames), room, key=lambda steps: _touched(steps, other))


def _other(case: Case) -> float:
    """Return the chance that a step was served by another replica than the next."""
    return 0.0 if case.routing == "sticky" else 1 - 1 / case.replicas


def _touched(steps: int, other: float) -> float:
    """Return how many memories of one track a replica touches in so many steps of it."""
    spans = [
        min(made + MEMORY_REACH, steps) - max(made, 1) + 1
        for made in range(1 - MEMORY_REACH, steps + 1)
    ]
    return sum(1 - other**span for span in spans) + 1 - other**steps


def predict(case: Case) -> Figures:
    """Return a case's figures without simulating it."""
    missing = case.objects * missing_memories(case)
    continued = 1 - 1 / case.frames
    read = missing * case.memory_bytes + continued * case.objects * case.state_bytes
    written = case.objects * (case.memory_bytes + case.state_bytes)
    trips = continued * (3 + (missing > 0)) + 1 / case.frames
    fixed_s = case.service_s + trips * case.round_trip_s
    transfer_s = case.transfer_s(read + written)
    busy = float(min(case.replicas, case.callers))  # replicas
    for _ in range(50):  # a busy store makes requests longer, and so itself less busy
        inside = max(1, round(busy))
        # A request asks the store twice, with a step computed in between.
        asks = closed_network(inside, fixed_s / 2, transfer_s / 2, case.store_servers, 0)
        held_s = 2 * inside / asks
        if case.routing == "idle":  # a queue that all replicas serve is close enough
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
    """Return requests per second where each goes to one server at random and waits its turn.

    Mean value analysis; what is found being served takes (1 + cv^2) / 2 of its time on average.
    """
    saved = (1 - service_cv**2) / 2
    queue = rate = 0.0
    for present in range(1, callers + 1):
        used = rate * service_s / servers
        answer_s = service_s * (1 + queue - used * saved)
        rate = present / (think_s + answer_s)
        queue = rate * answer_s / servers
    return rate


# --- simulation ----------------------------------------------------------------------------------


class MemoryCache:
    """The frame memories on one replica, least recently used out first.

    Args:
        capacity: How many it holds.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[tuple[int, int], None] = OrderedDict()

    def read(self, track: int, step: int) -> int:
        """Touch what a step attends to; return how many of them had to be read from the store."""
        attended = [(track, frame) for frame in (0, *range(max(1, step - MEMORY_REACH), step))]
        missing = [key for key in attended if key not in self._kept]
        for key in attended:
            if key in self._kept:
                self._kept.move_to_end(key)
        for key in missing:
            self.add(*key)
        return len(missing)

    def add(self, track: int, step: int) -> None:
        """Keep the memory that a step made."""
        if self._capacity:
            self._kept[track, step] = None
            if len(self._kept) > self._capacity:
                self._kept.popitem(last=False)


class Simulation:
    """Callers, replicas with their caches, and store servers, on simpy's clock.

    All objects of a request are on the same frames, so they are one entry of a cache; their keys
    are on one store server, another for each request.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        self._rng = random.Random(case.seed)  # noqa: S311
        self._env = simpy.Environment()
        self._replicas = [simpy.Resource(self._env) for _ in range(case.replicas)]
        room = case.cached_memories // case.objects
        self._caches = [MemoryCache(room) for _ in range(case.replicas)]
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
        few = FEW_FRAMES * case.callers
        self._until(max(few, min(case.requests, case.frames * case.callers)))
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
        """Follow clip after clip, beginning in the middle of one."""
        case, env, rng = self._case, self._env, self._rng
        clip, step = next(self._clips), rng.randrange(case.frames)
        home = rng.randrange(case.replicas)
        while True:
            if case.think_s:
                yield env.timeout(rng.expovariate(1 / case.think_s))
            asked_s = env.now
            place = self._route(home)
            with self._replicas[place].request() as turn:
                yield turn
                began_s = env.now
                yield from self._serve(self._caches[place], clip, step)
                self._busy_s += env.now - began_s
            self._answers_s.append(env.now - asked_s)
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
        trips = 1  # write
        if step:
            missing = cache.read(clip, step)
            trips += 2 + (missing > 0)  # steps, claim; memories
            self._missing += case.objects * missing
            self._attended += case.objects * min(step, MEMORY_REACH + 1)
            size = case.objects * (case.state_bytes + missing * case.memory_bytes)
            self._read += size
            self._commands += case.objects * (COMMANDS + missing)
            yield from self._move(size)
        else:
            self._commands += case.objects * START_COMMANDS
        yield self._env.timeout(self._service_s() + trips * case.round_trip_s)
        size = case.objects * (case.state_bytes + case.memory_bytes)
        self._written += size
        yield from self._move(size)
        cache.add(clip, step)

    def _service_s(self) -> float:
        mean, cv = self._case.service_s, self._case.service_cv
        return self._rng.gammavariate(cv**-2, mean * cv**2) if cv else mean

    def _move(self, size: int) -> Events:
        seconds = self._case.transfer_s(size)
        with self._rng.choice(self._stores).request() as turn:
            yield turn
            yield self._env.timeout(seconds)
        self._store_busy_s += seconds


def simulate(case: Case) -> Figures:
    """Return a case's figures by simulating it; the same ones for the same seed."""
    return Simulation(case).run()


# --- how long tracks are kept --------------------------------------------------------------------


@dataclass(frozen=True)
class Keeping:
    """What fills the store: runs that end and leave their tracks behind.

    Attributes:
        tracks: Objects followed at the same time, on average.
        clip_s: How long each is followed.
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
        """Memory of a track that is followed."""
        return KEPT_MEMORIES * self.frame_bytes + KEPT_STEPS * self.step_bytes

    @property
    def idle_bytes(self) -> int:
        """Memory of a track after the retry window."""
        return (MEMORY_REACH + 1) * self.frame_bytes + self.step_bytes


def predict_kept(keeping: Keeping) -> float:
    """Return the mean memory of the store in bytes, by Little's law."""
    ended_per_s = keeping.tracks / keeping.clip_s
    just_ended = ended_per_s * keeping.retry_s
    idle = ended_per_s * (keeping.ttl_s - keeping.retry_s)
    return (keeping.tracks + just_ended) * keeping.active_bytes + idle * keeping.idle_bytes


def simulate_kept(keeping: Keeping, *, hours: float = 2.0, frame_s: float = 1.0) -> float:
    """Return the mean memory of the store in bytes over some hours, after one TTL of filling."""
    env, rng = simpy.Environment(), random.Random(0)  # noqa: S311
    level, area, since_s = 0.0, 0.0, 0.0

    def change(size: float) -> None:
        nonlocal level, area, since_s
        area += level * (env.now - since_s)
        level, since_s = level + size, env.now

    def track() -> Events:
        for made in range(KEPT_MEMORIES):
            change(keeping.frame_bytes + (made < KEPT_STEPS) * keeping.step_bytes)
            yield env.timeout(frame_s)
        yield env.timeout(keeping.clip_s - KEPT_MEMORIES * frame_s + keeping.retry_s)
        change(keeping.idle_bytes - keeping.active_bytes)
        yield env.timeout(keeping.ttl_s - keeping.retry_s)
        change(-keeping.idle_bytes)

    def starts() -> Events:
        while True:
            env.process(track())
            yield env.timeout(rng.expovariate(keeping.tracks / keeping.clip_s))

    env.process(starts())
    env.run(keeping.ttl_s + keeping.clip_s)
    change(0)
    area = 0.0
    env.run(env.now + hours * 3600)
    change(0)
    return area / (hours * 3600)


# --- what is printed -----------------------------------------------------------------------------

TRACKS = (10, 1000, 100_000)
TARGET = 0.7  # utilisation of replicas and store servers; above, waiting grows fast


def inputs(path: Path = INPUTS) -> dict[str, dict[str, Any]]:
    """Return what was measured or assumed."""
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return found


def base_case(service: dict[str, Any]) -> Case:
    """Return the case of a service in `scaling.json`; memories grow with the picture's area."""
    store = inputs()["store"]
    area = float(service["image_size"] / 1024) ** 2
    return Case(
        base_s=service["base_s"],
        object_s=service["object_s"],
        memory_bytes=round((store["written"] - store["read_warm"]) * area),
        state_bytes=store["read_warm"],
    )


def size(case: Case, frame_every_s: float) -> Case:
    """Return the case with replicas, store servers and think time for that pace of each track."""
    for _ in range(12):
        got = predict(case)
        rate = got.frames_s / case.objects
        wanted = case.callers / frame_every_s
        held_s = got.utilisation * case.replicas / rate
        gbit = (got.read_gbit + got.written_gbit) * wanted / rate
        case = replace(
            case,
            replicas=max(1, math.ceil(wanted * held_s / TARGET)),
            store_servers=max(1, math.ceil(gbit / TARGET / case.store_gbit)),
            think_s=max(0.0, frame_every_s - got.answer_s),
        )
    return case


def deviation(computed: Figures, simulated: Figures) -> float:
    """Return the largest relative difference in throughput, use and bandwidth."""
    names = ("frames_s", "utilisation", "read_gbit", "written_gbit", "commands_s")
    return max(abs(float(getattr(computed, name) / getattr(simulated, name)) - 1) for name in names)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def sizes_table(service: dict[str, Any], routings: Sequence[str], largest: int) -> str:
    """Return what some numbers of tracks need, computed and, up to the largest, simulated."""
    head = ["tracks", "routing", "replicas", "Redis servers", "frames/s per track", "in use",
            "answer p50, p99", "warm", "Redis reads, Gbit/s", "writes, Gbit/s", "commands/s",
            "largest deviation"]  # fmt: skip
    rows = []
    for tracks in TRACKS:
        for routing in routings:
            start = replace(base_case(service), tracks=tracks, routing=routing)
            case = size(start, service["frame_every_s"])
            one = predict(case)
            two = simulate(case) if tracks <= largest else None
            cells = [
                _both(one, two, "frames_s_track"),
                _both(one, two, "utilisation", share=True),
                f"{_short(two.p50_s)} s, {_short(two.p99_s)} s"
                if two
                else f"mean {_short(one.answer_s)} s",
                _both(one, two, "warm_share", share=True),
                _both(one, two, "read_gbit"),
                _both(one, two, "written_gbit"),
                _short(one.commands_s),
                f"{deviation(one, two):.1%}" if two else "not simulated",
            ]
            rows.append([_short(tracks), routing, case.replicas,
                         case.store_servers, *cells])  # fmt: skip
    return table(head, rows)


def _both(computed: Figures, simulated: Figures | None, name: str, *, share: bool = False) -> str:
    found = [getattr(one, name) for one in (computed, simulated) if one is not None]
    texts = [f"{value:.0%}" if share else _short(value) for value in found]
    return texts[0] + "".join(f" ({text})" for text in texts[1:])


def _short(value: float) -> str:
    """Return a number with two digits, or all before the point."""
    return f"{value:,.0f}".replace(",", " ") if value >= 10 else f"{value:.2g}"


def routing_cases() -> Iterator[Case]:
    """Give few tracks on 1 ... 64 replicas, the cache large enough."""
    for replicas in (1, 2, 4, 8, 16, 64):
        yield Case(tracks=2 * replicas, objects=1, replicas=replicas, store_servers=64)


def routing_table() -> str:
    """Return what random routing costs in reads, by the number of replicas."""
    rows = []
    for case in routing_cases():
        computed, simulated = missing_memories(case), simulate(case)
        attended = attended_memories(case)
        missing = (1 - simulated.warm_share) * attended
        rows.append([
            case.replicas, f"{computed:.2f} ({missing:.2f})",
            f"{1 - computed / attended:.0%} ({simulated.warm_share:.0%})",
            f"{(computed * case.memory_bytes + case.state_bytes) / 1e6:.2f}",
        ])  # fmt: skip
    return table(["replicas", "memories read of 7", "warm", "MB read per object and step"], rows)


def speed_cases() -> Iterator[tuple[float, Case]]:
    """Give callers that do not think, so many for each of eight replicas, with their pace alone."""
    for callers in (1, 4, 8, 16, 32):
        case = Case(tracks=5 * callers, replicas=8, store_servers=8)
        yield predict(replace(case, tracks=5, routing="sticky")).frames_s_track, case


def speed_table() -> str:
    """Return what waiting in the wrong queue costs callers that ask as fast as they can."""
    rows = []
    for alone, case in speed_cases():
        cells: list[object] = [case.callers]
        for routing in ("random", "idle"):
            routed = replace(case, routing=routing)
            computed, simulated = predict(routed), simulate(routed)
            cells.append(
                f"{computed.frames_s_track / alone:.0%} ({simulated.frames_s_track / alone:.0%})"
            )
            cells.append(f"{computed.utilisation:.0%} ({simulated.utilisation:.0%})")
        rows.append(cells)
    head = ["callers on 8 replicas", "random: pace of one alone", "in use"]
    return table([*head, "shortest queue: pace of one alone", "in use"], rows)


def keeping_table() -> str:
    """Return the memory of the store by life time."""
    store = inputs()["store"]
    rows = []
    for ttl_s in (1800, 7200, 28_800):
        cells: list[object] = [f"{ttl_s} ({ttl_s / 3600:g} h)"]
        for tracks in TRACKS:
            keeping = Keeping(tracks, ttl_s=ttl_s, frame_bytes=store["memory_frame"],
                              step_bytes=store["memory_step"])  # fmt: skip
            cells.append(f"{_short(predict_kept(keeping) / 1e9)} GB")
        small = replace(keeping, tracks=TRACKS[0])
        cells.append(f"{predict_kept(small) / simulate_kept(small, hours=8) - 1:+.1%}")
        rows.append(cells)
    head = [f"{tracks:,} tracks".replace(",", " ") for tracks in TRACKS]
    return table(["SAM2_STATE_TTL", *head, "deviation (10 tracks)"], rows)


def print_tables(largest: int) -> None:
    """Print everything that docs/scaling.md has from here, computed (simulated)."""
    print("### Random routing\n\n" + routing_table())
    print("### As fast as the function answers\n\n" + speed_table())
    print("### Life of tracks\n\n" + keeping_table())
    for service in inputs()["services"].values():
        assumed = service["source"].startswith("ASSUMED")
        print(
            f"### {service['name']}: {service['base_s']:g} s + {service['object_s']:g} s an object"
            f" ({service['source']}), a frame every {service['frame_every_s']} s\n"
        )
        routings = ("random", "sticky") if assumed else ("random",)
        print(sizes_table(service, routings, largest))


def plot(folder: Path) -> None:
    """Draw reads by replicas, pace by callers, and memory by life time."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    reads, pace, memory = figure.subplots(1, 3)
    cases = list(routing_cases())
    replicas = [case.replicas for case in cases]
    reads.plot(replicas, [missing_memories(case) for case in cases], label="closed form")
    missing = [(1 - simulate(case).warm_share) * attended_memories(case) for case in cases]
    reads.plot(replicas, missing, "o", label="simulated")
    reads.set(xscale="log", xlabel="replicas, random routing", ylabel="frame memories read of 7",
              title="What a replica lacks")  # fmt: skip
    callers = [case.callers for _, case in speed_cases()]
    for color, routing in (("C0", "random"), ("C1", "idle")):
        shares = [
            [of(replace(case, routing=routing)).frames_s_track / alone for alone, case in
             speed_cases()]
            for of in (predict, simulate)
        ]  # fmt: skip
        name = "shortest queue" if routing == "idle" else routing
        pace.plot(callers, shares[0], color, label=f"{name}, closed form")
        pace.plot(callers, shares[1], f"{color}o", label=f"{name}, simulated")
    pace.set(xscale="log", xlabel="callers on 8 replicas", ylabel="pace of one alone",
             ylim=(0, 1.1), title="As fast as the function answers")  # fmt: skip
    keepings = [Keeping(10, ttl_s=ttl_s) for ttl_s in (900, 1800, 3600, 7200, 14_400, 28_800)]
    hours = [keeping.ttl_s / 3600 for keeping in keepings]
    memory.plot(hours, [predict_kept(one) / 1e9 for one in keepings], label="closed form")
    kept = [simulate_kept(one, hours=8) / 1e9 for one in keepings]
    memory.plot(hours, kept, "o", label="simulated")
    memory.set(xlabel="SAM2_STATE_TTL, hours", ylabel="Redis memory, GB", ylim=(0, None),
               title="10 tracks at a time, 5 minutes each")  # fmt: skip
    for axes in (reads, pace, memory):
        axes.grid(alpha=0.3)
        axes.legend()
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "scaling.png", dpi=100)


def print_case(case: Case) -> None:
    """Print both figures of one case, and how far apart they are."""
    computed, simulated = predict(case), simulate(case)
    rows = []
    for name, closed in vars(computed).items():
        found = getattr(simulated, name)
        apart = f"{closed / found - 1:+.1%}" if found and not math.isnan(closed) else ""
        rows.append([name, "" if math.isnan(closed) else f"{closed:.4g}", f"{found:.4g}", apart])
    print(table(["", "closed form", "simulated", "deviation"], rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="all tables, in some minutes")
    parser.add_argument(
        "--largest", type=int, default=max(TRACKS), help="tracks to simulate for a table"
    )
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw scaling.png into it")
    parser.add_argument("--case", type=Path, help="JSON with any of the options below")
    for one in fields(Case):
        name = "--" + one.name.replace("_", "-")
        text = f"{one.metadata['help']} ({one.default})"
        choices = ("random", "idle", "sticky") if one.name == "routing" else None
        parser.add_argument(name, type=type(one.default), choices=choices, help=text)
    options = vars(parser.parse_args(arguments))
    if options["table"]:
        print_tables(options["largest"])
    if options["plot"]:
        plot(options["plot"])
    if not options["table"] and not options["plot"]:
        case = Case(**json.loads(options["case"].read_text())) if options["case"] else Case()
        names = {one.name for one in fields(Case)}
        given = {name: options[name] for name in names if options[name] is not None}
        print_case(replace(case, **given))


if __name__ == "__main__":
    main()
