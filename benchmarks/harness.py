"""What benchmarks share: the choice of the model, the machine's description, results and plots.

A result is one JSON object: `benchmark` names it; `machine`, `model` and `options` say
what was measured and on what; `rows` is the table, one object per measured point. Names end in
their unit, `_ms` or `_bytes`; numbers are medians unless they say otherwise. `ours_over_x` is our
time divided by that of x: below 1 we are faster.
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
    """What a benchmark works with.

    Attributes:
        folder: For files of all kinds; removed at the end.
        environment: The function's settings that name the model and how it runs.
        server: A Redis server of its own.
    """

    folder: Path
    environment: dict[str, str]
    server: RedisServer


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark can be told."""
    parser.add_argument("--model-id", help="as SAM2_MODEL_ID, e.g. micro")
    parser.add_argument("--config", help="as SAM2_CONFIG, or short, e.g. sam2.1_hiera_t")
    parser.add_argument("--checkpoint", help="as SAM2_CHECKPOINT")
    parser.add_argument("--random", action="store_true", help="random weights for --config")
    parser.add_argument("--device", help="as SAM2_DEVICE")
    parser.add_argument("--image-size", type=int, help="as SAM2_IMAGE_SIZE")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--plot", type=Path, help="where to draw it, a PNG")


@contextmanager
def set_up(options: argparse.Namespace) -> Iterator[Bench]:
    """Bring what a benchmark works with, and clear it away."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = model_environment(options, folder)
        server = RedisServer(folder)
        try:
            yield Bench(folder, environment, server)
        finally:
            server.stop()


def model_environment(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Return the variables that choose the model: the environment's, and the options before them.

    Args:
        options: See `add_common_options`.
        folder: Where random weights are put.
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
    """Return the `model` part of the config that settings name."""
    return OmegaConf.load(find_files(settings)[0]).model


def result(
    name: str, options: argparse.Namespace, environment: Mapping[str, str], rows: Sequence[Row]
) -> Row:
    """Return a result as the module's docstring says."""
    settings = Settings.from_env(environment)
    weights = f", random weights, seed {SEED}" if options.random else ""
    named = {"SAM2_CONFIG", "SAM2_CHECKPOINT", "SAM2_MODEL_ID", "SAM2_IMAGE_SIZE", "SAM2_DEVICE"}
    places = {"json", "plot", "out", "checkpoint"}
    return {
        "benchmark": name,
        "machine": machine(settings.device),
        "model": {
            "name": (Path(settings.config).stem if settings.config else settings.model_id)
            + weights,
            "image_size": settings.image_size or model_config(settings).image_size,
            "settings": {k: v for k, v in sorted(environment.items()) if k not in named and v},
        },
        "options": {k: v for k, v in vars(options).items() if k not in places and v is not None},
        "rows": list(rows),
    }


def against_bar(value: float, bar: float, *, at_least: bool = False) -> Row:
    """Return a value beside its bar, and whether it is met; the bar is the most, or the least."""
    return {"value": value, "bar": bar, "met": value >= bar if at_least else value <= bar}


def machine(device: str = "auto") -> dict[str, Any]:
    """Return what times depend on beside the program.

    Args:
        device: As `SAM2_DEVICE`.
    """
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpus = [line.partition(": ")[2] for line in lines.splitlines() if line.startswith("model name")]
    picked = pick_device(device)
    return {
        "device": torch.cuda.get_device_name(picked) if picked.type == "cuda" else "cpu",
        "cpu": cpus[0] if cpus else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "busy": round(os.getloadavg()[0], 1),  # processes that wanted a core in the last minute
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def report(
    found: Row,
    options: argparse.Namespace,
    columns: Sequence[str],
    plot: Callable[[Row, Path], None] | None = None,
) -> None:
    """Print a result as a table, and write and draw it where the options say.

    Args:
        found: See `result`.
        options: See `add_common_options`.
        columns: See `table`.
        plot: Draws the result, where there is something to draw.
    """
    print(f"{found['benchmark']}: {describe(found)}\n{table(found['rows'], columns)}")
    if options.json:
        write_json(found, options.json)
    if plot and options.plot:
        plot(found, options.plot)


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return some columns of rows as text; what a row lacks stays empty."""
    cells = [[*columns], *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )
    return "\n".join(lines)


def write_json(found: Row, path: Path) -> None:
    """Write a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def describe(found: Row) -> str:
    """Return model and machine in a line."""
    model = found["model"]
    settings = "".join(f", {name}={value}" for name, value in model["settings"].items())
    where = describe_machine(found["machine"])
    return f"{model['name']} at {model['image_size']} px{settings}; {where}"


def describe_machine(where: Row) -> str:
    """Return a machine in a line."""
    device = where["cpu"] if where["device"] == "cpu" else f"{where['device']} and {where['cpu']}"
    return (
        f"{device}, {where['cores']} cores, {where['threads']} threads, torch {where['torch']}, "
        f"load {where['busy']}"
    )


@dataclass(frozen=True)
class Panel:
    """One diagram: curves over a common x.

    Attributes:
        y_label: What is drawn, with its unit.
        curves: Values by name, one per x, None where there is none.
        level: A value to compare with, drawn as a thin line.
        log: Whether y is drawn to a logarithmic scale.
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
    """Write a PNG of diagrams one above the other, with the machine at the bottom."""
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
            for place in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                place(LogFormatter(minor_thresholds=(2, 0.5)))
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
    """Return a config as SAM2_CONFIG takes it; `sam2.1_hiera_t` is short for one of sam2's own."""
    if "/" in name or name.endswith(".yaml"):
        return name
    return f"configs/{name.partition('_')[0]}/{name}.yaml"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
