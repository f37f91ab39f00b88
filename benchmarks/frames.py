"""Whether long tracks stay as fast and small as short ones, and abandoned tracks disappear.

    python -m benchmarks.frames --model-id micro --device cpu --abandon 200

One object is tracked over many frames through HTTP and Redis. Around a late frame a second, young
track is tracked alternately with it, so that both times are from the same moments. Caches are small
and tracks live for 20 seconds, so that memory reaches its final size soon.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from benchmarks.clip import FIRST_NEW_FRAME, Clip, make_clip
from benchmarks.comparison import median
from benchmarks.harness import (
    Bench,
    Panel,
    Row,
    add_common_options,
    describe,
    draw,
    make_result,
    model_config,
    report,
    set_up,
)
from benchmarks.trackers import ServedFunction
from settings import Settings
from shapes import encode_cvat_rle
from state_token import StateToken

CLIP_FRAMES = 40  # the clip is played forwards and backwards
CACHED_MEMORIES = 16
LIFETIME_S = 20  # of an unused track
STEPS_BEFORE_ABANDONED = 3
MB = 1_000_000
COLUMNS = ["frame", "ours_ms", "redis_bytes", "redis_keys", "process_bytes"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the files that the options name."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--early", type=int, default=30, help="frame to compare the late one with")
    parser.add_argument("--late", type=int, default=900)
    parser.add_argument("--window", type=int, default=21, help="frames around both, for medians")
    parser.add_argument(
        "--every", type=int, default=50, help="frames between measurements of memory"
    )
    parser.add_argument("--abandon", type=int, default=0, help="tracks to start and abandon")
    parser.add_argument("--size", type=int, nargs=2, default=(360, 640), metavar=("H", "W"))
    options = parser.parse_args(arguments)
    with (
        set_up(options) as bench,
        closing(
            ServedFunction(small_cache_settings(bench), bench.server, bench.folder)
        ) as function,
    ):
        clip = make_clip(bench.folder / "clip", CLIP_FRAMES, 1, tuple(options.size))
        rows, flat = follow(function, clip, options)
        abandoned = abandon(function, clip, options.abandon) if options.abandon else []
        result = make_result("frames", options, bench.environment, rows)
    result |= {"flat": flat, "abandoned": abandoned}
    report(result, options, COLUMNS, plot)
    print(
        f"frame {options.late} takes {flat['late_over_early']} of the time of frame "
        f"{options.early} ({flat['late_ms']} and {flat['early_ms']} ms, {options.window} pairs)"
    )
    for row in abandoned:
        print(
            f"{row['tracks']} tracks abandoned: process {row['process_bytes'] / MB:.1f} MB, "
            f"Redis {row['redis_bytes'] / MB:.1f} MB"
        )


def follow(
    function: ServedFunction, clip: Clip, options: argparse.Namespace
) -> tuple[list[Row], Row]:
    """Return rows about one long track, and the times of late frames against early ones."""
    rows, times, pairs = [], [], []
    old, young = Track(function, clip), Track(function, clip, offset=CLIP_FRAMES // 2)
    old.start()
    half = options.window // 2
    for frame in tqdm(range(1, options.frames + 1), unit="frame", leave=False):
        age = frame - (options.late - options.early)  # of the young track
        if age == 0:
            young.start()
        tracks = [old, young] if 0 < age <= options.early + half else [old]
        step_ms = {track: track.step(frame) for track in tracks[:: 1 if frame % 2 else -1]}
        times.append(step_ms[old])
        if abs(frame - options.late) <= half:
            pairs.append((step_ms[old], step_ms[young]))
        if frame % options.every == 0:
            row = {"frame": frame, "ours_ms": median(times[-options.every :])}
            rows.append(row | old.redis_usage() | {"process_bytes": old.process_bytes()})
    flat: Row = {
        "late_ms": median(late for late, _ in pairs),
        "early_ms": median(early for _, early in pairs),
        "late_over_early": median(late / early for late, early in pairs),
    }
    return rows, flat


def abandon(function: ServedFunction, clip: Clip, count: int) -> list[Row]:
    """Start tracks, abandon each after a few steps, and return rows about the memory in use."""
    rows = []
    with function.server.client() as client:
        for number in tqdm(range(1, count + 1), unit="track", leave=False):
            track = Track(function, clip, offset=number)
            track.start()
            for frame in range(1, STEPS_BEFORE_ABANDONED + 1):
                track.step(frame)
            if number % max(1, count // 10) == 0:
                used = int(client.info("memory")["used_memory"])
                rows.append(
                    {"tracks": number, "process_bytes": track.process_bytes(), "redis_bytes": used}
                )
    return rows


def small_cache_settings(bench: Bench) -> dict[str, str]:
    """Return settings for small caches and short lives, so that memory stops growing soon."""
    settings = Settings.from_env(bench.environment)
    config = model_config(settings)
    side = (settings.image_size or config.image_size) // 16
    memory_bytes = config.memory_encoder.out_dim * side * side * 2
    return bench.environment | {
        "SAM2_MEMORY_CACHE_MB": str(-(-CACHED_MEMORIES * memory_bytes // (1 << 20))),
        "SAM2_FEATURE_CACHE_FRAMES": "1",
        "SAM2_STATE_TTL": str(LIFETIME_S),
        "SAM2_RETRY_WINDOW": str(LIFETIME_S // 2),
    }


class Track:
    """One object, tracked forwards and backwards through a clip.

    Args:
        function: Tracks the object.
        clip: Its first disc is the object.
        offset: Frame of the clip to start on, so that two tracks do not share cached features.
    """

    def __init__(self, function: ServedFunction, clip: Clip, *, offset: int = 0) -> None:
        self._function = function
        self._frames = clip.frames[FIRST_NEW_FRAME:]
        self._shape = {"type": "mask", "points": encode_cvat_rle(clip.masks[0])}
        self._offset = offset
        self._states: list[str] = []

    def start(self) -> None:
        """Start the track from the object's mask."""
        self._function.replica.wait()
        _, answer = self._function.post(self._frame(0), [self._shape], [])
        self._states = answer["states"]

    def step(self, frame: int) -> float:
        """Track the object to a frame; return the milliseconds of the request."""
        ms, answer = self._function.post(self._frame(frame), [None], self._states)
        self._states = answer["states"]
        return ms

    def redis_usage(self) -> Row:
        """Return the number of the track's keys, and their bytes with Redis's overhead."""
        track = StateToken.parse(self._states[0]).track
        with self._function.server.client() as client:
            keys = list(client.scan_iter(f"sam2:{{{track}}}:*", count=1000))
            sizes = [int(client.memory_usage(key) or 0) for key in keys]
        return {"redis_bytes": sum(sizes), "redis_keys": len(keys)}

    def process_bytes(self) -> int:
        """Return the resident memory of the function's process."""
        return self._function.replica.resident_bytes()

    def _frame(self, frame: int) -> bytes:
        last = len(self._frames) - 1
        return self._frames[last - abs((frame + self._offset) % (2 * last) - last)]


def plot(result: Row, path: Path) -> None:
    """Draw time and memory over the frames; in a second file, memory over abandoned tracks."""
    rows, abandoned = result["rows"], result["abandoned"]
    draw(
        path,
        title=f"One track over many frames, {result['model']['name']}",
        x_label="frame",
        x=[row["frame"] for row in rows],
        ticks={row["frame"]: str(row["frame"]) for row in rows if row["frame"] % 100 == 0},
        panels=[
            Panel("time per frame, ms", {"ours": [row["ours_ms"] for row in rows]}),
            Panel("the track in Redis, KB", {"ours": [r["redis_bytes"] / 1000 for r in rows]}),
            Panel("process, MB", {"ours": [row["process_bytes"] / MB for row in rows]}),
        ],
        caption=describe(result),
    )
    if abandoned:
        draw(
            path.with_stem(f"{path.stem}_abandoned"),
            title=f"Tracks started and abandoned, {result['model']['name']}",
            x_label="tracks abandoned",
            x=[row["tracks"] for row in abandoned],
            panels=[
                Panel("process, MB", {"ours": [r["process_bytes"] / MB for r in abandoned]}),
                Panel(
                    "Redis, MB",
                    {f"tracks live {LIFETIME_S} s": [r["redis_bytes"] / MB for r in abandoned]},
                ),
            ],
            caption=describe(result),
        )


if __name__ == "__main__":
    main()
