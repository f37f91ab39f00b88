"""Find small regions of masks, and fill small holes."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import torch

from shapes import Mask


def fill_holes(logits: torch.Tensor, max_area: int) -> torch.Tensor:
    """Make small holes of a mask foreground.

    Args:
        logits: Mask scores `(B, 1, h, w)`; holes are 8-connected regions at or below zero.
        max_area: Largest hole to fill, in pixels of `logits`; 0 fills none.

    Source: `sam2/utils/misc.py`, `fill_holes_in_mask_scores`. SAM 2 uses its CUDA extension and
        skips the step without it; OpenCV finds the same regions on every machine.
    """
    if max_area <= 0:
        return logits
    holes = np.zeros(logits.shape, dtype=np.bool_)
    for hole, background in zip(holes, (logits <= 0).cpu().numpy(), strict=True):
        hole[0] = small_regions(background[0], max_area)
    if not holes.any():
        return logits
    return torch.where(torch.from_numpy(holes).to(logits.device), 0.1, logits)


def small_regions(foreground: Mask, max_area: int) -> npt.NDArray[np.bool_]:
    """Mark the 8-connected regions of a mask `(h, w)` that have at most `max_area` pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(
        foreground.view(np.uint8), connectivity=8
    )
    small = stats[:, cv2.CC_STAT_AREA] <= max_area
    small[0] = False  # label 0 is the background
    return np.asarray(small[labels])
