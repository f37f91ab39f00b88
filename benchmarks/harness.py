"""Shared parts of the benchmarks: model options, a description of the machine, results and plots.

A result is one JSON object: `benchmark` is its name; `machine`, `model` and `options` describe what
was measured and where; `rows` is the table, one object per measured point. Names of values end in
their unit, `_ms` or `_bytes`; values are medians unless stated otherwise. `ours_over_x` is our time
divided by that of x: below 1 we are faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullLocator
from omegaconf import OmegaConf

from model_loader import find_files, pick_device
from settings import Settings
from testbed.random_weights import write_checkpoint
from testbed.redis_server import RedisServer

SEED = 0
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """The resources of a benchmark.

    Attributes:
        folder: For temporary files; removed at the end.
        environment: The function's settings that choose the model and how it runs.
        server: A Redis server for this benchmark only.
    """

    folder: Path
    environment: dict[str, str]
    server: RedisServer


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all benchmarks."""
    parser.add_argument("--model-id", help="as SAM2_MODEL_ID, e.g. micro")
    parser.add_argument("--config", help="as SAM2_CONFIG, or short, e.g. sam2.1_hiera_t")
    parser.add_argument("--checkpoint", help="as SAM2_CHECKPOINT")
    parser.add_argument("--random", action="store_true", help="random weights for --config")
    parser.add_argument("--device", help="as SAM2_DEVICE")
    parser.add_argument("--image-size", type=int, help="as SAM2_IMAGE_SIZE")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--plot", type=Path, help="where to draw the result, a PNG")


@contextmanager
def set_up(options: argparse.Namespace) -> Iterator[Bench]:
    """Create the resources of a benchmark, and remove them at the end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = model_environment(options, folder)
        server = RedisServer(folder)
        try:
            yield Bench(folder, environment, server)
        finally:
            server.stop()


def model_environment(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Return the settings that choose the model: the environment's, overridden by the options.

    Args:
        options: See `add_common_options`.
        folder: Where random weights are written.
    """
    environment = {name: value for name, value in os.environ.items() if name.startswith("SAM2_")}
    if options.model_id:
        environment |= {"SAM2_MODEL_ID": options.model_id, "SAM2_CONFIG": "", "SAM2_CHECKPOINT": ""}
    if options.config:
        environment["SAM2_CONFIG"] = _config_name(options.config)
    if options.checkpoint:
        environment["SAM2_CHECKPOINT"] = options.checkpoint
    if options.random:
        path = folder / "random.pt"
        write_checkpoint(environment["SAM2_CONFIG"], path, seed=SEED)
        environment["SAM2_CHECKPOINT"] = str(path)
    if options.device:
        environment["SAM2_DEVICE"] = options.device
    if options.image_size:
        environment["SAM2_IMAGE_SIZE"] = str(options.image_size)
    return environment


def model_config(settings: Settings) -> Any:  # noqa: ANN401  # OmegaConf's
    """Return the `model` part of the config file that the settings choose."""
    return OmegaConf.load(find_files(settings)[0]).model


def make_result(
    name: str, options: argparse.Namespace, environment: Mapping[str, str], rows: Sequence[Row]
) -> Row:
    """Return a result in the form that the module's docstring describes."""
    settings = Settings.from_env(environment)
    weights = f", random weights, seed {SEED}" if options.random else ""
    shown_elsewhere = {
        "SAM2_CONFIG",
        "SAM2_CHECKPOINT",
        "SAM2_MODEL_ID",
        "SAM2_IMAGE_SIZE",
        "SAM2_DEVICE",
    }
    files = {"json", "plot", "out", "checkpoint"}
    return {
        "benchmark": name,
        "machine": machine(settings.device),
        "model": {
            "name": (Path(settings.config).stem if settings.config else settings.model_id)
            + weights,
            "image_size": settings.image_size or model_config(settings).image_size,
            "settings": {
                k: v for k, v in sorted(environment.items()) if k not in shown_elsewhere and v
            },
        },
        "options": {k: v for k, v in vars(options).items() if k not in files and v is not None},
        "rows": list(rows),
    }


def against_bar(value: float, bar: float, *, at_least: bool = False) -> Row:
    """Compare a value with the largest value allowed, or with the smallest."""
    return {"value": value, "bar": bar, "met": value >= bar if at_least else value <= bar}


def machine(device: str = "auto") -> dict[str, Any]:
    """Describe this machine: hardware, load and versions that times depend on.

    Args:
        device: As `SAM2_DEVICE`.
    """
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpus = [line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")]
    picked = pick_device(device)
    return {
        "device": torch.cuda.get_device_name(picked) if picked.type == "cuda" else "cpu",
        "cpu": cpus[0] if cpus else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "busy": round(os.getloadavg()[0], 1),  # mean number of runnable processes, last minute
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def report(
    result: Row,
    options: argparse.Namespace,
    columns: Sequence[str],
    plot: Callable[[Row, Path], None] | None = None,
) -> None:
    """Print a result as a table; write and draw it to the files that the options name.

    Args:
        result: See `make_result`.
        options: See `add_common_options`.
        columns: See `table`.
        plot: Draws the result; None if there is nothing to draw.
    """
    print(f"{result['benchmark']}: {describe(result)}\n{table(result['rows'], columns)}")
    if options.json:
        write_json(result, options.json)
    if plot and options.plot:
        plot(result, options.plot)


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return the named columns of rows as text; a missing value gives an empty cell."""
    cells = [[*columns], *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )
    return "\n".join(lines)


def write_json(result: Row, path: Path) -> None:
    """Write a result to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def describe(result: Row) -> str:
    """Return model and machine in one line."""
    model = result["model"]
    settings = "".join(f", {name}={value}" for name, value in model["settings"].items())
    where = describe_machine(result["machine"])
    return f"{model['name']} at {model['image_size']} px{settings}; {where}"


def describe_machine(info: Row) -> str:
    """Return the description from `machine` in one line."""
    device = info["cpu"] if info["device"] == "cpu" else f"{info['device']} and {info['cpu']}"
    return (
        f"{device}, {info['cores']} cores, {info['threads']} threads, torch {info['torch']}, "
        f"load {info['busy']}"
    )


@dataclass(frozen=True)
class Panel:
    """One diagram: curves over a common x.

    Attributes:
        y_label: The quantity and its unit.
        curves: Values by name, one per x; None leaves a gap.
        level: A reference value, drawn as a thin line.
        log: Whether the y axis is logarithmic.
    """

    y_label: str
    curves: Mapping[str, Sequence[float | None]]
    level: float | None = None
    log: bool = False


def draw(
    path: Path,
    *,
    title: str,
    x_label: str,
    x: Sequence[float],
    panels: Sequence[Panel],
    caption: str,
    log_x: bool = False,
    ticks: Mapping[float, str] | None = None,
) -> None:
    """Write a PNG of diagrams one above the other, with the caption at the bottom."""
    figure = Figure(figsize=(8, 1.4 + 3 * len(panels)), dpi=120, layout="constrained")
    figure.suptitle(title)
    figure.supxlabel(textwrap.fill(caption, 130), fontsize=7, color="0.35")
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    marks = ticks or {value: f"{value:g}" for value in x}
    for axes, panel in zip(all_axes, panels, strict=True):
        for name, values in panel.curves.items():
            points = [(a, b) for a, b in zip(x, values, strict=True) if b is not None]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        if panel.level is not None:
            axes.axhline(panel.level, color="0.35", linewidth=0.8, linestyle="--")
        axes.set_ylabel(panel.y_label)
        if log_x:
            axes.set_xscale("log", base=2)
        if panel.log:
            axes.set_yscale("log")
            for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                set_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        else:
            drawn = [b for values in panel.curves.values() for b in values if b is not None]
            axes.set_ylim(0, 1.1 * max([*drawn, panel.level or 0]))
        axes.set_xticks(list(marks), list(marks.values()))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    all_axes[-1].set_xlabel(x_label)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _config_name(name: str) -> str:
    """Return a config name for SAM2_CONFIG; `sam2.1_hiera_t` is short for a config of sam2's."""
    if "/" in name or name.endswith(".yaml"):
        return name
    return f"configs/{name.partition('_')[0]}/{name}.yaml"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
