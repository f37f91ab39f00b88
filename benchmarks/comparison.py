"""Time several trackers on the same frames, alternately, and compare the times."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tqdm import tqdm

from benchmarks.clip import FIRST_NEW_FRAME, Clip

# Stages of a request in which the network computes, by their names in the function's log.
NETWORK_STAGES = ("encode", "model")


@dataclass(frozen=True)
class Step:
    """One tracked frame.

    Attributes:
        ms: From the request to the answer, in milliseconds.
        answer: The masks in the tracker's own form; kept for the last frame only.
        written: Bytes that Redis received.
        read: Bytes that Redis sent.
        report: The function's log line; empty for other trackers.
        loading_ms: The part of `ms` that is the frame's share of loading the clip's folder.
    """

    ms: float
    answer: Any
    written: int = 0
    read: int = 0
    report: Mapping[str, Any] = field(default_factory=dict)
    loading_ms: float = 0.0


class TimedTracker(Protocol):
    """A way to track objects that a benchmark can time."""

    def start(self, clip: Clip, objects: int) -> None:
        """Start tracking the first `objects` objects of a clip, with full memory banks."""

    def step(self, index: int) -> Step:
        """Track the objects on a frame. The first is `FIRST_NEW_FRAME`; the rest come in order."""

    def close(self) -> None:
        """Release processes and connections."""


def step_alternately(
    trackers: Mapping[str, TimedTracker], *, frames: int, warm_up: int = 1, name: str = ""
) -> dict[str, list[Step]]:
    """Let each tracker track a frame before any gets the next: other load then slows all alike.

    Args:
        trackers: By name, all started.
        frames: Number of frames to measure.
        warm_up: Frames before them that are not measured: in these a replica reads the memories.
        name: Title of the progress bar.
    """
    steps: dict[str, list[Step]] = {tracker: [] for tracker in trackers}
    for index in tqdm(range(warm_up + frames), desc=name, unit="frame", leave=False):
        for tracker, timed in trackers.items():
            step = timed.step(FIRST_NEW_FRAME + index)
            if index >= warm_up:
                # Masks of dozens of objects on many frames would fill gigabytes.
                earlier = [replace(before, answer=None) for before in steps[tracker]]
                steps[tracker] = [*earlier, step]
    return steps


def compare(steps: Mapping[str, Sequence[Step]]) -> dict[str, Any]:
    """Return each tracker's median time, our ratio to each, and how our time is spent.

    Args:
        steps: From `step_alternately`; ours are under `ours`.
    """
    row: dict[str, Any] = {
        f"{tracker}_ms": median(step.ms for step in taken) for tracker, taken in steps.items()
    }
    for tracker in steps:
        if tracker != "ours":
            row[f"ours_over_{tracker}"] = round(row["ours_ms"] / row[f"{tracker}_ms"], 4)
    ours = steps["ours"]
    times = [step.report["times_ms"] for step in ours]
    row["not_network_ms"] = median(
        step.ms - sum(stages[name] for name in NETWORK_STAGES)
        for step, stages in zip(ours, times, strict=True)
    )
    row["not_network_share"] = round(row["not_network_ms"] / row["ours_ms"], 4)
    row["stages_ms"] = median_stages(times)
    row["all_ms"] = {
        tracker: [round(step.ms, 2) for step in taken] for tracker, taken in steps.items()
    }
    return row


def median_stages(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each stage over several requests, by the stages' names in the log."""
    return {name: median(stages[name] for stages in times) for name in times[0]}


def median(values: Iterable[float]) -> float:
    """Return the median, rounded to two decimals."""
    return round(statistics.median(values), 2)
