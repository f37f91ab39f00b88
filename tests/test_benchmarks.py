"""The benchmarks run, and their results have the values that tables, plots and docs show."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import (
    frames,
    gpu,
    input_sizes,
    interactor_clicks,
    objects,
    overhead,
    profile_request,
    replicas,
    sizes,
    task_frames,
)
from testbed.forked_replica import ForkedReplica
from testbed.functions import Replica

MICRO = ["--model-id", "micro", "--device", "cpu", "--image-size", "256"]
SMALL = ["--size", "90", "160"]


@pytest.fixture(autouse=True)
def _forked_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start replicas quickly: what these tests check does not depend on how long it takes."""
    monkeypatch.setattr(Replica, "_start", ForkedReplica._start)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a benchmark with small settings; return its result, and check that it drew a plot."""

    def run(main: Callable[[Sequence[str]], None], *options: str) -> dict[str, Any]:
        files = ["--json", str(tmp_path / "result.json"), "--plot", str(tmp_path / "result.png")]
        main([*MICRO, *files, *options])
        result: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
        with Image.open(tmp_path / "result.png") as picture:
            assert picture.width == 960
        assert result["machine"]["cores"] >= 1
        assert result["model"] == {"name": "micro", "image_size": 256, "settings": {}}
        return result

    return run


def test_objects_are_timed_alternately_with_both_references(
    run: Callable[..., dict[str, Any]],
) -> None:
    """There is a row per number of objects, with medians, ratios and bytes per object."""
    single, double = run(objects.main, "--objects", "1", "2", "--frames", "2", *SMALL)["rows"]

    for row, count in ((single, 1), (double, 2)):
        assert row["objects"] == count
        assert row["ours_over_predictor"] == pytest.approx(
            row["ours_ms"] / row["predictor_ms"], rel=0.01
        )
        assert row["ours_over_loop"] == pytest.approx(row["ours_ms"] / row["loop_ms"], rel=0.01)
        assert 0 < row["not_network_ms"] < row["ours_ms"]
        assert [len(times) for times in row["all_ms"].values()] == [2, 2, 2]
        assert row["found"] == count
        assert row["iou_predictor"] > 0.95  # all do the same work
        assert row["iou_loop"] > 0.6  # it resizes differently
    assert single["written_bytes"] == pytest.approx(double["written_bytes"], rel=0.1)
    assert single["read_bytes"] < single["loop_read_bytes"]


def test_a_long_track_is_compared_with_a_young_one(run: Callable[..., dict[str, Any]]) -> None:
    """There are rows of time and memory, pairs around the late frame, and abandoned tracks."""
    options = ["--frames", "24", "--early", "4", "--late", "22", "--window", "3", "--every", "12"]
    result = run(frames.main, *options, "--abandon", "2", *SMALL)

    assert [row["frame"] for row in result["rows"]] == [12, 24]
    assert result["rows"][1]["redis_keys"] == 17  # the maximum of a track: see state_store.py
    assert set(result["flat"]) == {"late_ms", "early_ms", "late_over_early"}
    assert [row["tracks"] for row in result["abandoned"]] == [1, 2]
    assert all(row["process_bytes"] > 0 for row in result["rows"] + result["abandoned"])


def test_frame_sizes_are_named(run: Callable[..., dict[str, Any]]) -> None:
    """Each size has our time, the predictor's, and the loading time in the latter."""
    (row,) = run(sizes.main, "--sizes", "480p", "--frames", "1")["rows"]

    assert (row["size"], row["pixels"]) == ("480p", 480 * 854)
    assert 0 < row["predictor_loading_ms"] < row["predictor_ms"]


def test_replicas_serve_concurrent_clients(run: Callable[..., dict[str, Any]]) -> None:
    """Each number of replicas and clients has a rate and answer times."""
    options = ["--replicas", "1", "2", "--clients", "2", "--rounds", "1", "--seconds", "0.5"]
    rows = run(replicas.main, *options, *SMALL)["rows"]

    assert [(row["replicas"], row["clients"]) for row in rows] == [(1, 2), (2, 2)]
    assert all(row["requests"] > 0 and row["p50_ms"] <= row["p99_ms"] for row in rows)
    assert rows[0]["over_one_replica"] == 1


def test_input_sizes_have_speed_and_masks(run: Callable[..., dict[str, Any]]) -> None:
    """A size has its time and, against the truth of a clip, J and F."""
    (row,) = run(input_sizes.main, "--sizes", "128", "--frames", "1", "--clips", "1", *SMALL)[
        "rows"
    ]

    assert row["over_largest"] == 1
    assert 0 < row["j"] < 1
    assert 0 < row["f"] < 1


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    """There the masks are compared with themselves, and every row has frames per second."""
    gpu.main(["--out", str(tmp_path), "--device", "cpu", "--quick", "--image-size", "128"])
    result = json.loads((tmp_path / "gpu.json").read_text())

    assert [row["mean_iou"] for row in result["correctness"]] == [1]
    (measured,) = result["results"]
    rows, options = measured["rows"], measured["options"]
    assert measured["model"]["name"] == "micro"
    assert [row["objects"] for row in rows] == options["objects"] == [1, 2]
    assert [options[name] for name in ("frames", "size", "clips", "random")] == [
        2, [180, 320], 1, False
    ]  # fmt: skip
    for row in rows:
        assert row["ours_fps"] == pytest.approx(1000 / row["ours_ms"], rel=0.01)
    ratio = rows[0]["ours_over_predictor"]
    assert result["reached"] == {
        "iou": {"value": 1, "bar": 0.99, "met": True},
        "one_over_predictor": {"value": ratio, "bar": 1.25, "met": ratio <= 1.25},
    }
    assert (tmp_path / "micro.png").exists()


def test_a_request_is_profiled(tmp_path: Path) -> None:
    """The profile names operators, and the stages of a request."""
    out, path = tmp_path / "profile.txt", tmp_path / "result.json"
    files = ["--out", str(out), "--json", str(path)]
    profile_request.main([*MICRO, *files, "--objects", "1", "--frames", "1", *SMALL])
    rows = json.loads(path.read_text())["rows"]
    row = rows[0]

    assert [row["bit_exact"] for row in rows] == ["on", "off"]
    assert {"decode", "encode", "model", "store"} <= set(row["stages_ms"])
    assert "aten::" in row["operators"][0]["name"]
    assert "Self CPU" in out.read_text()


def test_every_part_of_a_request_takes_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The functions timed by name are still called, and the remainder is positive."""
    monkeypatch.setattr(overhead, "WARM_UP", 0)
    path = tmp_path / "result.json"
    overhead.main(["--objects", "1", "--frames", "1", "--json", str(path)])
    one_mask = json.loads(path.read_text())["medians"]["JPEG, mask x 1"]

    assert set(overhead.PARTS) < set(one_mask)
    assert [name for name, value in one_mask.items() if value <= 0] == []


def test_a_tasks_frames_are_timed_both_ways(tmp_path: Path) -> None:
    """There are rows without and with the model; our time is divided by that of the calls."""
    path = tmp_path / "result.json"
    task_frames.main([*MICRO, "--json", str(path), "--frames", "3", "--rounds", "1", *SMALL])
    rows = json.loads(path.read_text())["rows"]

    assert [row["model"] for row in rows] == ["excluded", "included"]
    for row in rows:
        assert row["ours_over_calls"] == pytest.approx(row["ours_ms"] / row["calls_ms"], rel=0.01)


def test_further_clicks_are_compared_with_the_first(tmp_path: Path) -> None:
    """The ratio of further clicks to the first click is compared with its bar."""
    path = tmp_path / "result.json"
    interactor_clicks.main([*MICRO, "--json", str(path), "--frames", "1"])
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    reached = result["reached"]["further_over_first"]

    assert len(row["all_ms"][0]) == interactor_clicks.CLICKS
    assert min(row["first_ms"], row["further_ms"]) > 0
    assert reached["value"] == pytest.approx(row["further_ms"] / row["first_ms"], rel=0.01)
    assert reached["met"] == (reached["value"] <= reached["bar"])
