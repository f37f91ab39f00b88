"""Owns fair comparison: contenders asked in turn for frame after frame, and what comes of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tqdm import tqdm

from benchmarks.clip import FIRST_NEW_FRAME, Clip

# Stages of a request in which the network computes, by their names in the function's log.
NETWORK = ("encode", "model")


@dataclass(frozen=True)
class Step:
    """One frame.

    Attributes:
        ms: From asking to the answer, in milliseconds.
        answer: What was found, in the contender's own form; of the last frame only.
        written: Bytes that Redis received.
        read: Bytes that Redis sent.
        report: The function's log line; nothing for others.
        loading_ms: What of `ms` is the frame's share of the time in which a folder was loaded.
    """

    ms: float
    answer: Any
    written: int = 0
    read: int = 0
    report: Mapping[str, Any] = field(default_factory=dict)
    loading_ms: float = 0.0


class Contender(Protocol):
    """Who tracks."""

    def start(self, clip: Clip, objects: int) -> None:
        """Begin the first so many of a clip's objects anew, with full memory banks."""

    def step(self, index: int) -> Step:
        """Find the objects on a frame; the first is `FIRST_NEW_FRAME`, then one after the other."""

    def close(self) -> None:
        """Let go of what it holds."""


def take_turns(
    contenders: Mapping[str, Contender], *, frames: int, warm_up: int = 1, name: str = ""
) -> dict[str, list[Step]]:
    """Ask all for frame after frame, in turn, so that whatever else the machine does hits all.

    Args:
        contenders: Started.
        frames: How many to measure.
        warm_up: Frames before them that do not count: a replica then reads the memories.
        name: Of the progress bar.
    """
    steps: dict[str, list[Step]] = {who: [] for who in contenders}
    for index in tqdm(range(warm_up + frames), desc=name, unit="frame", leave=False):
        for who, contender in contenders.items():
            step = contender.step(FIRST_NEW_FRAME + index)
            if index >= warm_up:
                # Masks of dozens of objects fill gigabytes.
                steps[who] = [replace(one, answer=None) for one in steps[who]] + [step]
    return steps


def compare(steps: Mapping[str, Sequence[Step]]) -> dict[str, Any]:
    """Return everybody's median, our ratio to each, and where our time goes.

    Args:
        steps: As `take_turns` returns them; ours are under `ours`.
    """
    row: dict[str, Any] = {
        f"{who}_ms": median(step.ms for step in taken) for who, taken in steps.items()
    }
    for who in steps:
        if who != "ours":
            row[f"ours_over_{who}"] = round(row["ours_ms"] / row[f"{who}_ms"], 4)
    ours = steps["ours"]
    times = [step.report["times_ms"] for step in ours]
    row["not_network_ms"] = median(
        step.ms - sum(spent[name] for name in NETWORK)
        for step, spent in zip(ours, times, strict=True)
    )
    row["not_network_share"] = round(row["not_network_ms"] / row["ours_ms"], 4)
    row["stages_ms"] = median_stages(times)
    row["all_ms"] = {who: [round(step.ms, 2) for step in taken] for who, taken in steps.items()}
    return row


def median_stages(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each stage of some requests, as their reports name them."""
    return {name: median(spent[name] for spent in times) for name in times[0]}


def median(values: Iterable[float]) -> float:
    """Return the median, rounded to what a clock can tell."""
    return round(statistics.median(values), 2)
