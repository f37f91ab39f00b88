"""Write the demo clip, the shapes to start from, and the ground truth.

python -m micro_training.demo_clip --out DIR
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from micro_training.clips import DEMO_SEEDS, Clip, Script, make_clip
from shapes import ShapeType, mask_to_shape

DEMO_SEED = DEMO_SEEDS[6]
DEMO_FRAMES = 72
DEMO_SIZE_HW = (360, 640)
JPEG_QUALITY = 95

# Label and shape type of each object; the first object is hidden for some frames.
INITIAL_SHAPES = (
    ("oval", ShapeType.MASK),
    ("pebble", ShapeType.POLYGON),
    ("star", ShapeType.RECTANGLE),
)


def make_demo_clip() -> tuple[Clip, list[int]]:
    """Make the demo clip.

    Returns:
        The clip, and its three objects' bodies in the order of `INITIAL_SHAPES`.
    """
    clip = make_clip(
        DEMO_SEED,
        frames=DEMO_FRAMES,
        size_hw=DEMO_SIZE_HW,
        script=Script(event="eclipse", lookalike=False, objects=3, hidden=(7, 10)),
    )
    others = [
        body for body, role in enumerate(clip.roles) if role == "object" and body != clip.target
    ]
    return clip, [clip.target, *others]


def write_demo_clip(out: Path) -> None:
    """Write `frames/00000.jpg` and so on, `shapes.json` and `truth.npz` into the folder `out`.

    `truth.npz` holds `masks`, `(T, N, H, W)` bool, objects in the order of `shapes.json`.
    """
    clip, bodies = make_demo_clip()
    (out / "frames").mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(clip.frames):
        path = out / "frames" / f"{index:05d}.jpg"
        cv2.imwrite(
            str(path),
            cv2.cvtColor(frame, cv2.COLOR_RGB2BGR),
            [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY],
        )
    shapes = []
    for (label, shape_type), body in zip(INITIAL_SHAPES, bodies, strict=True):
        shape = mask_to_shape(clip.mask(0, body), shape_type)
        assert shape is not None
        points = list(shape.points)
        shapes.append({"label": label, "type": str(shape_type), "points": points, "frame": 0})
    (out / "shapes.json").write_text(json.dumps(shapes, indent=1) + "\n")
    masks = np.stack([clip.labels == body + 1 for body in bodies], axis=1)
    np.savez_compressed(out / "truth.npz", masks=masks)


def main() -> None:
    """Write the demo clip to the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    write_demo_clip(out)
    print(f"{DEMO_FRAMES} frames, shapes.json and truth.npz in {out}")


if __name__ == "__main__":
    main()
