"""Compute how many tracks replicas and a store can serve: in closed form, and by simulation.

    python -m benchmarks.simulate --tracks 1000 --replicas 23     # one case
    python -m benchmarks.simulate --case case.json                # the same, from a file
    python -m benchmarks.simulate --table                         # the tables of docs/scaling.md
    python -m benchmarks.simulate --plot benchmarks/plots         # its picture

Callers wait for each answer, as CVAT's UI does, then think, then ask for the next frame. Measured
and assumed inputs are read from `scaling.json`. See `scaling_formulas`, `scaling_events` and
`scaling_memory` for the calculations.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.scaling_cases import Case, Figures, inputs
from benchmarks.scaling_events import simulate
from benchmarks.scaling_formulas import attended_memories, missing_memories, predict
from benchmarks.scaling_memory import StoredTracks, predict_memory, simulate_memory

TRACKS = (10, 1000, 100_000)
TARGET = 0.7  # utilisation of replicas and store servers; above, waiting times grow fast


def base_case(service: dict[str, Any]) -> Case:
    """Return the case of a service in `scaling.json`; memories grow with the input's area."""
    store = inputs()["store"]
    area = float(service["image_size"] / 1024) ** 2
    return Case(
        base_s=service["base_s"],
        object_s=service["object_s"],
        memory_bytes=round((store["written"] - store["read_warm"]) * area),
        state_bytes=store["read_warm"],
    )


def size(case: Case, frame_every_s: float) -> Case:
    """Return the case with the replicas and store servers that give each track this pace."""
    for _ in range(12):
        figures = predict(case)
        rate = figures.frames_s / case.objects
        wanted = case.callers / frame_every_s
        held_s = figures.utilisation * case.replicas / rate
        gbit = (figures.read_gbit + figures.written_gbit) * wanted / rate
        case = replace(
            case,
            replicas=max(1, math.ceil(wanted * held_s / TARGET)),
            store_servers=max(1, math.ceil(gbit / TARGET / case.store_gbit)),
            think_s=max(0.0, frame_every_s - figures.answer_s),
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
    """Return a table of what tracks need, computed and, for up to `largest` tracks, simulated."""
    head = ["tracks", "routing", "replicas", "Redis servers", "frames/s per track", "in use",
            "answer p50, p99", "warm", "Redis reads, Gbit/s", "writes, Gbit/s", "commands/s",
            "largest deviation"]  # fmt: skip
    rows = []
    for tracks in TRACKS:
        for routing in routings:
            start = replace(base_case(service), tracks=tracks, routing=routing)
            case = size(start, service["frame_every_s"])
            computed = predict(case)
            simulated = simulate(case) if tracks <= largest else None
            cells = [
                _both(computed, simulated, "frames_s_track"),
                _both(computed, simulated, "utilisation", share=True),
                f"{_short(simulated.p50_s)} s, {_short(simulated.p99_s)} s"
                if simulated
                else f"mean {_short(computed.answer_s)} s",
                _both(computed, simulated, "warm_share", share=True),
                _both(computed, simulated, "read_gbit"),
                _both(computed, simulated, "written_gbit"),
                _short(computed.commands_s),
                f"{deviation(computed, simulated):.1%}" if simulated else "not simulated",
            ]
            rows.append([_short(tracks), routing, case.replicas,
                         case.store_servers, *cells])  # fmt: skip
    return table(head, rows)


def _both(computed: Figures, simulated: Figures | None, name: str, *, share: bool = False) -> str:
    values = [getattr(figures, name) for figures in (computed, simulated) if figures is not None]
    texts = [f"{value:.0%}" if share else _short(value) for value in values]
    return texts[0] + "".join(f" ({text})" for text in texts[1:])


def _short(value: float) -> str:
    """Return a number with two digits; from 10 up, rounded to a whole number."""
    return f"{value:,.0f}".replace(",", " ") if value >= 10 else f"{value:.2g}"


def routing_cases() -> Iterator[Case]:
    """Yield cases of few tracks on 1 to 64 replicas with large enough caches."""
    for replicas in (1, 2, 4, 8, 16, 64):
        yield Case(tracks=2 * replicas, objects=1, replicas=replicas, store_servers=64)


def routing_table() -> str:
    """Return a table of memories read under random routing, by the number of replicas."""
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
    """Yield numbers of callers without think time on eight replicas, with a lone caller's pace."""
    for callers in (1, 4, 8, 16, 32):
        case = Case(tracks=5 * callers, replicas=8, store_servers=8)
        yield predict(replace(case, tracks=5, routing="sticky")).frames_s_track, case


def speed_table() -> str:
    """Return a table of the pace of callers that send their next request at once."""
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


def memory_table() -> str:
    """Return a table of the store's memory, by lifetime of tracks."""
    store = inputs()["store"]
    rows = []
    for ttl_s in (1800, 7200, 28_800):
        cells: list[object] = [f"{ttl_s} ({ttl_s / 3600:g} h)"]
        for tracks in TRACKS:
            stored = StoredTracks(tracks, ttl_s=ttl_s, frame_bytes=store["memory_frame"],
                              step_bytes=store["memory_step"])  # fmt: skip
            cells.append(f"{_short(predict_memory(stored) / 1e9)} GB")
        small = replace(stored, tracks=TRACKS[0])
        cells.append(f"{predict_memory(small) / simulate_memory(small, hours=8) - 1:+.1%}")
        rows.append(cells)
    head = [f"{tracks:,} tracks".replace(",", " ") for tracks in TRACKS]
    return table(["SAM2_STATE_TTL", *head, "deviation (10 tracks)"], rows)


def print_tables(largest: int) -> None:
    """Print the tables for docs/scaling.md: computed values, simulated values in brackets."""
    print("### Random routing\n\n" + routing_table())
    print("### As fast as the function answers\n\n" + speed_table())
    print("### Life of tracks\n\n" + memory_table())
    for service in inputs()["services"].values():
        assumed = service["source"].startswith("ASSUMED")
        print(
            f"### {service['name']}: {service['base_s']:g} s + {service['object_s']:g} s an object"
            f" ({service['source']}), a frame every {service['frame_every_s']} s\n"
        )
        routings = ("random", "sticky") if assumed else ("random",)
        print(sizes_table(service, routings, largest))


def plot(folder: Path) -> None:
    """Draw reads by replicas, pace by callers, and memory by lifetime."""
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
            [method(replace(case, routing=routing)).frames_s_track / alone for alone, case in
             speed_cases()]
            for method in (predict, simulate)
        ]  # fmt: skip
        name = "shortest queue" if routing == "idle" else routing
        pace.plot(callers, shares[0], color, label=f"{name}, closed form")
        pace.plot(callers, shares[1], f"{color}o", label=f"{name}, simulated")
    pace.set(xscale="log", xlabel="callers on 8 replicas", ylabel="pace of one alone",
             ylim=(0, 1.1), title="As fast as the function answers")  # fmt: skip
    all_stored = [
        StoredTracks(10, ttl_s=ttl_s) for ttl_s in (900, 1800, 3600, 7200, 14_400, 28_800)
    ]
    hours = [stored.ttl_s / 3600 for stored in all_stored]
    memory.plot(hours, [predict_memory(stored) / 1e9 for stored in all_stored], label="closed form")
    simulated = [simulate_memory(stored, hours=8) / 1e9 for stored in all_stored]
    memory.plot(hours, simulated, "o", label="simulated")
    memory.set(xlabel="SAM2_STATE_TTL, hours", ylabel="Redis memory, GB", ylim=(0, None),
               title="10 tracks at a time, 5 minutes each")  # fmt: skip
    for axes in (reads, pace, memory):
        axes.grid(alpha=0.3)
        axes.legend()
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "scaling.png", dpi=100)


def print_case(case: Case) -> None:
    """Print both figures of one case, and their relative difference."""
    computed, simulated = predict(case), simulate(case)
    rows = []
    for name, first in vars(computed).items():
        second = getattr(simulated, name)
        difference = f"{first / second - 1:+.1%}" if second and not math.isnan(first) else ""
        first_text = "" if math.isnan(first) else f"{first:.4g}"
        rows.append([name, first_text, f"{second:.4g}", difference])
    print(table(["", "closed form", "simulated", "deviation"], rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print and draw what the options name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="all tables; takes minutes")
    parser.add_argument(
        "--largest", type=int, default=max(TRACKS), help="tracks to simulate for a table"
    )
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw scaling.png into it")
    parser.add_argument("--case", type=Path, help="JSON with any of the options below")
    for field in fields(Case):
        name = "--" + field.name.replace("_", "-")
        text = f"{field.metadata['help']} ({field.default})"
        choices = ("random", "idle", "sticky") if field.name == "routing" else None
        parser.add_argument(name, type=type(field.default), choices=choices, help=text)
    options = vars(parser.parse_args(arguments))
    if options["table"]:
        print_tables(options["largest"])
    if options["plot"]:
        plot(options["plot"])
    if not options["table"] and not options["plot"]:
        case = Case(**json.loads(options["case"].read_text())) if options["case"] else Case()
        names = {field.name for field in fields(Case)}
        given = {name: options[name] for name in names if options[name] is not None}
        print_case(replace(case, **given))


if __name__ == "__main__":
    main()
