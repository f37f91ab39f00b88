"""Compare the function with SAM2VideoPredictor at full sizes: `make fidelity CLIP=FOLDER`.

The same comparison as test_fidelity.py, on real frames: tiny and small configs, sensitive random
weights, 30 frames at 512 px and 18 at 1024 px, three objects (two masks, one box, one of them
started later), forwards and backwards. Takes an hour on two cores.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from testbed.drawn_frames import base64_text
from testbed.functions import Function
from testbed.random_weights import write_checkpoint
from testbed.redis_server import RedisServer
from tests.fidelity import equal_answers, follow
from tests.reference import Reference, ReferenceObject, write_frames

CONFIGS = ("configs/sam2.1/sam2.1_hiera_t.yaml", "configs/sam2.1/sam2.1_hiera_s.yaml")
SIZES = ((512, 30), (1024, 18))  # model input in pixels, frames


def main() -> None:
    """Print one line per model, size, direction and object; exit with 1 if any mask differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip", type=Path, help="folder with at least 30 JPEGs")
    frames = [file.read_bytes() for file in sorted(parser.parse_args().clip.glob("*.jpg"))]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    all_equal = True
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder))
        try:
            for image_size, count in SIZES:
                for config in CONFIGS:
                    checkpoint = write_checkpoint(config, Path(folder, "weights.pt"))
                    environment = server.environment | {
                        "SAM2_CONFIG": config,
                        "SAM2_CHECKPOINT": str(checkpoint),
                        "SAM2_IMAGE_SIZE": str(image_size),
                        "SAM2_DEVICE": "cpu",
                        "SAM2_BIT_EXACT": "on",
                    }
                    all_equal &= compare(environment, frames[:count])
        finally:
            server.stop()
    sys.exit(0 if all_equal else 1)


def compare(environment: dict[str, str], frames: list[bytes]) -> bool:
    """Track all objects both ways and print how many masks are equal."""
    config, image_size = environment["SAM2_CONFIG"], int(environment["SAM2_IMAGE_SIZE"])
    checkpoint = Path(environment["SAM2_CHECKPOINT"])
    function = Function("main", environment)
    images = [base64_text(frame) for frame in frames]
    all_equal = True
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(config, checkpoint, image_size, write_frames(Path(folder), frames))
        for backwards in (False, True):
            begin = time.monotonic()
            objects = objects_on(frames, backwards=backwards)
            ours = follow(function, images, objects, backwards=backwards)
            spent_s = time.monotonic() - begin
            direction = "backwards" if backwards else "forwards"
            for name, obj, answers in zip(("mask", "later", "box"), objects, ours, strict=True):
                expected = reference.track(obj, len(frames), backwards=backwards)
                equal = equal_answers(obj, answers, expected)
                covered = np.mean([mask.mean() for mask in expected.values()])
                print(
                    f"{Path(config).stem} {image_size} px {direction} {name}: {sum(equal)} of "
                    f"{len(expected) - 1} masks equal (mean area {covered:.1%}, {spent_s:.0f} s)",
                    flush=True,
                )
                all_equal &= sum(equal) == len(expected) - 1
    return all_equal


def objects_on(frames: list[bytes], *, backwards: bool) -> list[ReferenceObject]:
    """Return two masks, the second started three frames later, and a box."""
    with Image.open(io.BytesIO(frames[0])) as image:
        width, height = image.size
    first, later = (len(frames) - 1, len(frames) - 4) if backwards else (0, 3)
    rows, columns = np.ogrid[:height, :width]
    blob = ((columns / width - 0.42) / 0.1) ** 2 + ((rows / height - 0.55) / 0.22) ** 2 < 1
    block = np.zeros((height, width), dtype=np.bool_)
    block[height // 5 : height // 2, width * 5 // 8 : width * 5 // 6] = True
    box = (width * 0.2, height * 0.27, width * 0.44, height * 0.71)
    return [
        ReferenceObject(blob, first),
        ReferenceObject(block, later),
        ReferenceObject(box, first),
    ]


if __name__ == "__main__":
    main()
