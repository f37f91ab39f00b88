"""Draw prompts from true masks: noisy boxes, first clicks and correction clicks."""

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Mask = npt.NDArray[np.bool_]

# SAM's labels of prompt points
NEGATIVE, POSITIVE, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = 0, 1, 2, 3


def draw_boxes(masks: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw each mask's box with its corners moved at random, as annotators draw them.

    Args:
        masks: `(B, S, S)` bool, none empty.
        rng: Source of randomness.

    Returns:
        Corners, `(B, 2, 2)` float32 xy pixels, and their labels, `(B, 2)` int32.

    Source:
        The jitter (a tenth of the side, at most 20 of 1024 pixels) is SAM's, appendix A.
    """
    corners = []
    for mask in masks.numpy():
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = np.array([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]], np.float32)
        bound = np.minimum(0.1 * (box[1] - box[0]), 20 / 1024 * mask.shape[0])
        corners.append(box + rng.uniform(-1, 1, (2, 2)) * bound)
    points = torch.from_numpy(np.clip(np.stack(corners), 0, masks.shape[-1])).float()
    labels = torch.tensor([[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]], dtype=torch.int32)
    return points, labels.expand(len(masks), 2)


def draw_clicks(
    masks: Tensor, predicted: Tensor | None, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one click per object, in the region where the prediction is wrong.

    Args:
        masks: `(B, S, S)` bool, the ground truth.
        predicted: `(B, S, S)` bool, or None for a first click.
        rng: Source of randomness.

    Returns:
        Clicks, `(B, 1, 2)` float32 xy pixels, and their labels, `(B, 1)` int32.
    """
    points, labels = [], []
    for index, truth in enumerate(masks.numpy()):
        guess = np.zeros_like(truth) if predicted is None else predicted[index].numpy()
        missed, extra = truth & ~guess, guess & ~truth
        region = missed if missed.sum() >= extra.sum() else extra
        if not region.any():
            region = truth
        points.append(_click(region, rng))
        labels.append(NEGATIVE if region is extra else POSITIVE)
    clicks = torch.tensor(np.array(points), dtype=torch.float32)[:, None]
    return clicks, torch.tensor(labels, dtype=torch.int32)[:, None]


def _click(region: Mask, rng: np.random.Generator) -> tuple[float, float]:
    """Pick the pixel deepest inside, as annotators do, or half of the time any pixel."""
    if rng.random() < 0.5:
        depth = cv2.distanceTransform(np.pad(region, 1).astype(np.uint8), cv2.DIST_L2, 3)
        row, column = np.unravel_index(int(depth[1:-1, 1:-1].argmax()), region.shape)
    else:
        rows, columns = np.nonzero(region)
        pick = int(rng.integers(len(rows)))
        row, column = rows[pick], columns[pick]
    return float(column), float(row)
