"""All measurements that need a GPU, in one command: correctness, frames per second, time shares.

    python -m benchmarks.gpu --out out/gpu
    python -m benchmarks.gpu --out out/gpu --random       # without access to Hugging Face
    python -m benchmarks.gpu --out out/gpu --device cpu --quick    # checks the script itself

Masks on the device are compared with those on the CPU in float32, with the bundled `micro` weights
on held-out synthetic clips. Then frames per second through HTTP and Redis are measured, as by
`objects`, for SAM 2.1 tiny and large: once not compiled, once with `SAM2_COMPILE` against SAM 2's
predictor compiled by its own option. The loop per object is never compiled. Writes plots and
`gpu.json`: `results` are those of `objects`, each with its model and options; `reached` compares
the values of `BARS` with their bars.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from PIL import Image
from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES
from tqdm import tqdm

from benchmarks import objects
from benchmarks.clip import make_clip
from benchmarks.harness import (
    Panel,
    Row,
    against_bar,
    describe,
    describe_machine,
    draw,
    machine,
    make_result,
    set_up,
    table,
    write_json,
)
from benchmarks.trackers import open_trackers
from clips.tracking_client import LocalTrackingClient, TrackingClient
from micro_training.held_out import choose_held_out
from micro_training.metrics import region_iou
from object_requests import Continue, Start
from settings import Settings
from shapes import Mask, Shape, ShapeType, encode_cvat_rle

MODELS = ("facebook/sam2.1-hiera-tiny", "facebook/sam2.1-hiera-large")
SETTLING_FRAMES = 3  # new tensor shapes are compiled in these
COLUMNS = ["model", "compiled", "objects", "ours_fps", "predictor_fps", "loop_fps",
           "ours_over_predictor", "ours_over_loop", "not_network_ms", "not_network_share",
           "written_bytes", "read_bytes"]  # fmt: skip
IOUS: dict[str, Callable[[list[float]], float]] = {
    "mean_iou": statistics.mean, "median_iou": statistics.median, "worst_iou": min
}  # fmt: skip
# Bars: the smallest mean IoU with the CPU's masks, and the largest ratios of times: one object's to
# the compiled predictor's (0.8 of its frames per second), 16 objects' to one object's, and 16
# objects' to the loop's (8 times its frames per second).
BARS = {"iou": 0.99, "one_over_predictor": 1.25, "sixteen_over_one": 4.0,
        "sixteen_over_loop": 0.125}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file and the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and plots")
    parser.add_argument("--models", nargs="+", default=MODELS, help="ids, as SAM2_MODEL_ID")
    parser.add_argument(
        "--random", action="store_true", help="random weights instead of Hugging Face's"
    )
    parser.add_argument("--device", default="cuda", help="as SAM2_DEVICE")
    parser.add_argument("--image-size", type=int, help="as SAM2_IMAGE_SIZE")
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--frames", type=int, default=20, help="frames to measure")
    parser.add_argument("--clips", type=int, default=10, help="held-out clips to compare masks on")
    parser.add_argument("--clip-frames", type=int, default=31, help="frames of each")
    parser.add_argument("--size", type=int, nargs=2, default=(1080, 1920), metavar=("H", "W"))
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--quick", action="store_true", help="micro, nothing compiled, a few small frames"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.no_compile = ["micro"], True
        options.objects, options.frames, options.size = [1, 2], 2, (180, 320)
        options.clips, options.clip_frames = 1, 4
    modes = (False,) if options.no_compile else (False, True)
    result: Row = {
        "benchmark": "gpu",
        "machine": machine(options.device),
        "correctness": [compare_masks(options, compiled=compiled) for compiled in modes],
        "results": [],
    }
    for model in options.models:
        measured = [measure(model, options, compiled=compiled) for compiled in modes]
        plot(measured, options.out / f"{model.rpartition('/')[2]}.png")
        result["results"] += measured
    result["reached"] = compare_with_bars(result)
    write_json(result, options.out / "gpu.json")
    print(describe_machine(result["machine"]))
    print(table(result["correctness"], ["model", "compiled", "masks", *IOUS]))
    rows = [
        {"model": measured["model"]["name"], **row}
        for measured in result["results"]
        for row in measured["rows"]
    ]
    print(table(rows, COLUMNS))
    for name, bar in result["reached"].items():
        limit = "at least" if name == "iou" else "at most"
        print(f"{name}: {bar['value']}, {limit} {bar['bar']}: {'met' if bar['met'] else 'MISSED'}")


def compare_masks(options: argparse.Namespace, *, compiled: bool) -> Row:
    """Return the IoU of the device's masks with the CPU's, over objects and frames."""
    ious = []
    with ExitStack() as stack:
        micro = Settings(model_id="micro", device="cpu", image_size=options.image_size)
        clients = [
            stack.enter_context(closing(LocalTrackingClient(settings)))
            for settings in (replace(micro, device=options.device, compile=compiled), micro)
        ]
        clips = choose_held_out(options.clips)
        for held_out in tqdm(clips, total=options.clips, unit="clip", leave=False):
            clip = held_out.make()
            frames = [Image.fromarray(frame) for frame in clip.frames[: options.clip_frames]]
            masks = [clip.mask(0, body) for body in held_out.bodies]
            on_device, on_cpu = (track_clip(client, frames, masks) for client in clients)
            ious += [region_iou(*pair) for pair in zip(on_device, on_cpu, strict=True)]
    return {
        "model": "micro",
        "compiled": compiled,
        "masks": len(ious),
        **{name: round(float(average(ious)), 6) for name, average in IOUS.items()},
    }


def track_clip(
    client: TrackingClient, frames: Sequence[Image.Image], first_masks: Sequence[Mask]
) -> list[Mask]:
    """Track objects from their masks; return all masks on all frames but the first."""
    shapes = [Shape(ShapeType.MASK, encode_cvat_rle(mask)) for mask in first_masks]
    tracked = client.track(frames[0], [Start(shape) for shape in shapes])
    masks = []
    for frame in frames[1:]:
        tracked = client.track(frame, [Continue(obj.token) for obj in tracked])
        masks += [obj.mask for obj in tracked if obj.mask is not None]
    assert len(masks) == len(first_masks) * (len(frames) - 1)
    return masks


def measure(model: str, options: argparse.Namespace, *, compiled: bool) -> Row:
    """Return the result of `objects` for a model, with frames per second."""
    random = options.random and model in HF_MODEL_ID_TO_FILENAMES
    own_options = argparse.Namespace(**vars(options))
    own_options.model_id = None if random else model
    own_options.config = HF_MODEL_ID_TO_FILENAMES[model][0] if random else None
    own_options.checkpoint, own_options.random = None, random
    with set_up(own_options) as bench, ExitStack() as stack:
        bench.environment["SAM2_COMPILE"] = "on" if compiled else "off"
        clip = make_clip(
            bench.folder / "clip",
            options.frames + SETTLING_FRAMES,
            max(options.objects),
            tuple(options.size),
        )
        trackers = open_trackers(
            ("ours", "predictor", "loop"),
            bench.environment,
            bench.server,
            bench.folder,
            stack,
            compiled=compiled,
        )
        rows = [
            objects.measure(trackers, clip, count, options.frames, warm_up=SETTLING_FRAMES)
            for count in options.objects
        ]
        for row in rows:
            row["compiled"] = compiled
            row |= {f"{name}_fps": round(1000 / row[f"{name}_ms"], 2) for name in trackers}
        return make_result("objects", own_options, bench.environment, rows)


def compare_with_bars(result: Row) -> dict[str, Row]:
    """Compare the device's masks and the first model's times with `BARS`."""
    first = result["results"][0]["model"]
    rows = [row for measured in result["results"] if measured["model"]["name"] == first["name"]
            for row in measured["rows"]]  # fmt: skip
    by_point = {(row["compiled"], row["objects"]): row for row in rows}
    compiled = any(row["compiled"] for row in rows)
    single, sixteen = by_point.get((compiled, 1)), by_point.get((compiled, 16))
    values = {"iou": min(row["mean_iou"] for row in result["correctness"])}
    if single:
        values["one_over_predictor"] = single["ours_over_predictor"]
    if single and sixteen:
        values["sixteen_over_one"] = round(sixteen["ours_ms"] / single["ours_ms"], 4)
        values["sixteen_over_loop"] = sixteen["ours_over_loop"]
    return {
        name: against_bar(value, BARS[name], at_least=name == "iou")
        for name, value in values.items()
    }


def plot(measured: Sequence[Row], path: Path) -> None:
    """Draw frames per second by the number of objects, compiled and not."""
    names = {"ours": "this function, HTTP and Redis", "predictor": "SAM2VideoPredictor",
             "loop": "loop per object, Redis"}  # fmt: skip
    speeds, ratios = {}, {}
    for result in measured:
        rows = result["rows"]
        kind = ", compiled" if rows[0]["compiled"] else ""
        for tracker, name in names.items():
            if tracker != "loop" or not kind:
                speeds[name + kind] = [row[f"{tracker}_fps"] for row in rows]
        for tracker in ("predictor", "loop"):
            ratios[f"ours / {names[tracker]}{kind}"] = [row[f"ours_over_{tracker}"] for row in rows]
    draw(
        path,
        title=f"Frames per second by objects, {measured[0]['model']['name']}",
        x_label="objects on the frame",
        x=[row["objects"] for row in measured[0]["rows"]],
        log_x=True,
        panels=[
            Panel("frames per second", speeds, log=True),
            Panel("ratio of times", ratios, level=1),
        ],
        caption=describe(measured[-1]),
    )


if __name__ == "__main__":
    main()
