"""Track the example clip with the bundled micro weights and compare with its ground truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from clips.reader import open_clip
from clips.shape_files import read_initial_shapes
from clips.track_clip import track_clip
from clips.tracking_client import LocalTrackingClient
from micro_training.demo_clip import write_demo_clip
from micro_training.metrics import boundary_f, region_iou
from settings import Settings

OUT = Path("out/demo")


def main() -> None:
    """Make the clip, track it, and print J and F and the names of the written files."""
    write_demo_clip(OUT)
    prompts = read_initial_shapes(OUT / "shapes.json")
    client = LocalTrackingClient(Settings(model_id="micro"))
    outcome = track_clip(open_clip(OUT / "frames"), prompts, client, OUT)
    truth = np.load(OUT / "truth.npz")["masks"]
    tracked = read_masks(OUT / "tracks.json", truth.shape)

    print("\nCompared with the ground truth, without frame 0:")
    print("object  prompt     frames  hidden      J     F")
    for track, prompt in enumerate(prompts):
        pairs = [(tracked[frame, track], truth[frame, track]) for frame in range(1, len(truth))]
        region = np.mean([region_iou(*pair) for pair in pairs])
        boundary = np.mean([boundary_f(*pair) for pair in pairs])
        hidden = sum(not mask.any() for _, mask in pairs)
        print(
            f"{prompt.label:7} {prompt.shape.type:10} {outcome.frames:6} {hidden:7} "
            f"{region:6.3f} {boundary:5.3f}"
        )
    print("\nmicro is for trials and only tracks drawn shapes. For real use, take SAM 2's weights.")
    for name in ("contact_sheet.png", "overlay.mp4", "annotations.xml", "tracks.json"):
        print(f"wrote {OUT / name}")


def read_masks(path: Path, shape: tuple[int, int, int, int]) -> npt.NDArray[np.bool_]:
    """Read the masks of `tracks.json`, `(T, N, H, W)`; a lost object's mask is empty."""
    masks = np.zeros(shape, dtype=np.bool_)
    for annotation in json.loads(path.read_text(encoding="utf-8"))["annotations"]:
        mask = coco_mask.decode(annotation["segmentation"])
        masks[annotation["image_id"], annotation["track_id"]] = mask
    return masks


if __name__ == "__main__":
    main()
