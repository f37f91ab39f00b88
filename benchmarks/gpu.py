"""Everything that only a GPU can tell, in one command: correctness, frames per second, shares.

    python -m benchmarks.gpu --out out/gpu
    python -m benchmarks.gpu --out out/gpu --random       # where no hub is in reach
    python -m benchmarks.gpu --out out/gpu --device cpu --quick    # tries the script itself

Masks on the device are compared with those on the CPU in float32, with the bundled `micro` weights
on held-out synthetic clips. Then frames per second through HTTP and Redis, as in `objects`, for
SAM 2.1 tiny and large; once as they come, once with `SAM2_COMPILE` against a predictor that its
makers' own options compile. The loop per object is never compiled. Writes plots and `gpu.json`:
`results` are those of `objects`, each with its model and options, and `reached` what became of the
bars, each with value, bar, and whether it was met.
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
from benchmarks.contenders import open_contenders
from benchmarks.harness import (
    Panel,
    Row,
    against_bar,
    describe,
    describe_machine,
    draw,
    machine,
    result,
    set_up,
    table,
    write_json,
)
from clips.tracking_client import LocalTrackingClient, TrackingClient
from micro_training.held_out import choose_held_out
from micro_training.metrics import region_iou
from object_requests import Continue, Start
from settings import Settings
from shapes import Mask, Shape, ShapeType, encode_cvat_rle

MODELS = ("facebook/sam2.1-hiera-tiny", "facebook/sam2.1-hiera-large")
SETTLING_FRAMES = 3  # shapes that are seen for the first time are compiled
COLUMNS = ["model", "compiled", "objects", "ours_fps", "predictor_fps", "loop_fps",
           "ours_over_predictor", "ours_over_loop", "not_network_ms", "not_network_share",
           "written_bytes", "read_bytes"]  # fmt: skip
IOUS: dict[str, Callable[[list[float]], float]] = {
    "mean_iou": statistics.mean, "median_iou": statistics.median, "worst_iou": min
}  # fmt: skip
# What is to be reached: at least this mean IoU with the CPU's masks; and at most these ratios of
# times: one object's to the compiled predictor's (0.8 of its frames per second), 16 objects' to one
# object's, and 16 objects' to the loop's (8 times its frames per second).
BARS = {"iou": 0.99, "one_over_predictor": 1.25, "sixteen_over_one": 4.0,
        "sixteen_over_loop": 0.125}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and plots")
    parser.add_argument("--models", nargs="+", default=MODELS, help="ids, as SAM2_MODEL_ID")
    parser.add_argument("--random", action="store_true", help="random weights instead of the hub's")
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
    found: Row = {
        "benchmark": "gpu",
        "machine": machine(options.device),
        "correctness": [compare_masks(options, compiled=compiled) for compiled in modes],
        "results": [],
    }
    for model in options.models:
        measured = [measure(model, options, compiled=compiled) for compiled in modes]
        plot(measured, options.out / f"{model.rpartition('/')[2]}.png")
        found["results"] += measured
    found["reached"] = judge(found)
    write_json(found, options.out / "gpu.json")
    print(describe_machine(found["machine"]))
    print(table(found["correctness"], ["model", "compiled", "masks", *IOUS]))
    rows = [
        {"model": one["model"]["name"], **row} for one in found["results"] for row in one["rows"]
    ]
    print(table(rows, COLUMNS))
    for name, one in found["reached"].items():
        limit = "at least" if name == "iou" else "at most"
        print(f"{name}: {one['value']}, {limit} {one['bar']}: {'met' if one['met'] else 'MISSED'}")


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
            prompts = [clip.mask(0, body) for body in held_out.bodies]
            on_device, on_cpu = (follow(client, frames, prompts) for client in clients)
            ious += [region_iou(*pair) for pair in zip(on_device, on_cpu, strict=True)]
    return {
        "model": "micro",
        "compiled": compiled,
        "masks": len(ious),
        **{name: round(float(of(ious)), 6) for name, of in IOUS.items()},
    }


def follow(
    client: TrackingClient, frames: Sequence[Image.Image], prompts: Sequence[Mask]
) -> list[Mask]:
    """Return the masks of all objects on all frames but the first."""
    drawn = [Shape(ShapeType.MASK, encode_cvat_rle(mask)) for mask in prompts]
    found = client.track(frames[0], [Start(shape) for shape in drawn])
    masks = []
    for frame in frames[1:]:
        found = client.track(frame, [Continue(one.token) for one in found])
        masks += [one.mask for one in found if one.mask is not None]
    assert len(masks) == len(prompts) * (len(frames) - 1)
    return masks


def measure(model: str, options: argparse.Namespace, *, compiled: bool) -> Row:
    """Return the result of `objects` for a model, with frames per second."""
    random = options.random and model in HF_MODEL_ID_TO_FILENAMES
    chosen = argparse.Namespace(**vars(options))
    chosen.model_id = None if random else model
    chosen.config = HF_MODEL_ID_TO_FILENAMES[model][0] if random else None
    chosen.checkpoint, chosen.random = None, random
    with set_up(chosen) as bench, ExitStack() as stack:
        bench.environment["SAM2_COMPILE"] = "on" if compiled else "off"
        clip = make_clip(
            bench.folder / "clip",
            options.frames + SETTLING_FRAMES,
            max(options.objects),
            tuple(options.size),
        )
        contenders = open_contenders(
            ("ours", "predictor", "loop"),
            bench.environment,
            bench.server,
            bench.folder,
            stack,
            compiled=compiled,
        )
        rows = [
            objects.measure(contenders, clip, count, options.frames, warm_up=SETTLING_FRAMES)
            for count in options.objects
        ]
        for row in rows:
            row["compiled"] = compiled
            row |= {f"{who}_fps": round(1000 / row[f"{who}_ms"], 2) for who in contenders}
        return result("objects", chosen, bench.environment, rows)


def judge(found: Row) -> dict[str, Row]:
    """Return how the device's masks and the first model's times stand to `BARS`."""
    first = found["results"][0]["model"]
    rows = [row for one in found["results"] if one["model"]["name"] == first["name"]
            for row in one["rows"]]  # fmt: skip
    at = {(row["compiled"], row["objects"]): row for row in rows}
    fastest = any(row["compiled"] for row in rows)
    one, many = at.get((fastest, 1)), at.get((fastest, 16))
    values = {"iou": min(one["mean_iou"] for one in found["correctness"])}
    if one:
        values["one_over_predictor"] = one["ours_over_predictor"]
    if one and many:
        values["sixteen_over_one"] = round(many["ours_ms"] / one["ours_ms"], 4)
        values["sixteen_over_loop"] = many["ours_over_loop"]
    return {
        name: against_bar(value, BARS[name], at_least=name == "iou")
        for name, value in values.items()
    }


def plot(measured: Sequence[Row], path: Path) -> None:
    """Draw frames per second by objects, as they come and compiled."""
    names = {"ours": "this function, HTTP and Redis", "predictor": "SAM2VideoPredictor",
             "loop": "loop per object, Redis"}  # fmt: skip
    speeds, ratios = {}, {}
    for one in measured:
        rows = one["rows"]
        kind = ", compiled" if rows[0]["compiled"] else ""
        for who, name in names.items():
            if who != "loop" or not kind:
                speeds[name + kind] = [row[f"{who}_fps"] for row in rows]
        for who in ("predictor", "loop"):
            ratios[f"ours / {names[who]}{kind}"] = [row[f"ours_over_{who}"] for row in rows]
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
