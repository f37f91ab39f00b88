"""The reference: sam2's own SAM2VideoPredictor on a folder of JPEGs, one session per object.

It fills small holes as on CUDA; a plain install of sam2 on a CPU skips that step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import sam2.utils.misc
import torch
from sam2.build_sam import build_sam2_video_predictor

from shapes import Box, Mask


@dataclass(frozen=True)
class ReferenceObject:
    """One object: a mask `(H, W)` or a box XYXY on a frame."""

    prompt: Mask | Box
    frame: int = 0


class Reference:
    """The official predictor, built by the official builder.

    Args:
        config_name: One of sam2's configs.
        checkpoint: Its weights.
        image_size: Side of its input.
        folder: JPEGs `00000.jpg` and so on; at least 16, so that their number has no effect.
    """

    def __init__(self, config_name: str, checkpoint: Path, image_size: int, folder: Path) -> None:
        self._folder = folder
        self._predictor = build_sam2_video_predictor(
            config_name,
            str(checkpoint),
            device="cpu",
            hydra_overrides_extra=[f"++model.image_size={image_size}"],
        )
        # All sessions share the frames' features.
        encode = self._predictor.forward_image
        encoded: dict[bytes, Any] = {}

        def encode_once(image: torch.Tensor) -> Any:
            key = hashlib.sha256(image.numpy().tobytes()).digest()
            if key not in encoded:
                encoded[key] = encode(image)
            return encoded[key]

        self._predictor.forward_image = encode_once

    def track(
        self, obj: ReferenceObject, frame_count: int, *, backwards: bool = False
    ) -> dict[int, Mask]:
        """Return masks by frame, the prompt's frame first, over `frame_count` further frames."""
        with hole_filling():
            state = self._predictor.init_state(str(self._folder))
            if isinstance(obj.prompt, tuple):
                box = np.array(obj.prompt, dtype=np.float32)
                self._predictor.add_new_points_or_box(state, obj.frame, obj_id=0, box=box)
            else:
                self._predictor.add_new_mask(state, obj.frame, obj_id=0, mask=obj.prompt)
            steps = self._predictor.propagate_in_video(
                state, max_frame_num_to_track=frame_count, reverse=backwards
            )
            return {frame: (logits[0, 0] > 0).numpy() for frame, _, logits in steps}


@contextmanager
def hole_filling() -> Iterator[None]:
    """Replace sam2's CUDA extension, which a CPU lacks, by OpenCV."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sam2.utils.misc, "get_connected_components", _connected_components)
        yield


def write_frames(folder: Path, frames: Sequence[bytes]) -> Path:
    """Write JPEGs under the names that the predictor expects."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(frames):
        (folder / f"{index:05d}.jpg").write_bytes(frame)
    return folder


def _connected_components(mask: Any) -> tuple[Any, Any]:
    labels = np.zeros(mask.shape, dtype=np.int32)
    areas = np.zeros(mask.shape, dtype=np.int32)
    for index, (pixels,) in enumerate(mask.cpu().numpy().astype(np.uint8)):
        _, labels[index, 0], stats, _ = cv2.connectedComponentsWithStats(pixels, connectivity=8)
        area_of_label = stats[:, cv2.CC_STAT_AREA].copy()
        area_of_label[0] = 0
        areas[index, 0] = area_of_label[labels[index, 0]]
    return torch.from_numpy(labels).to(mask.device), torch.from_numpy(areas).to(mask.device)
