"""J and F of the DAVIS benchmark: how well masks overlap, and how well their outlines agree.

Source: Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object
Segmentation", CVPR 2016, and `davis2017/metrics.py` of davisvideochallenge/davis2017-evaluation
(the outline of a mask, the tolerance of 0.8 % of the diagonal, the cases of empty masks).
"""

import cv2
import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

_TOLERANCE_OF_DIAGONAL = 0.008


def region_iou(predicted: Mask, truth: Mask) -> float:
    """Return J, the intersection over union of two masks.

    A hidden object answered with an empty mask counts as 1, as in DAVIS: both are empty.

    Args:
        predicted: `(H, W)` bool; empty for a lost object.
        truth: `(H, W)` bool.
    """
    union = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / union if union else 1.0


def boundary_f(predicted: Mask, truth: Mask) -> float:
    """Return F, the harmonic mean of precision and recall of the outline.

    An outline pixel is right when the other outline passes within 0.8 % of the image's diagonal.

    Args:
        predicted: `(H, W)` bool; empty for a lost object.
        truth: `(H, W)` bool.
    """
    radius = int(np.ceil(_TOLERANCE_OF_DIAGONAL * np.linalg.norm(truth.shape)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.uint8)
    drawn, true = _outline(predicted), _outline(truth)
    drawn_count, true_count = np.count_nonzero(drawn), np.count_nonzero(true)
    if drawn_count == 0 or true_count == 0:
        return float(drawn_count == true_count)
    precision = np.count_nonzero(drawn & _grow(true, disk)) / drawn_count
    recall = np.count_nonzero(true & _grow(drawn, disk)) / true_count
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _outline(mask: Mask) -> Mask:
    """Mark pixels that differ from the next pixel to the right, below, or diagonally."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here = padded[:-1, :-1]
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return np.asarray((here != right) | (here != below) | (here != diagonal))


def _grow(outline: Mask, disk: npt.NDArray[np.uint8]) -> Mask:
    return np.asarray(cv2.dilate(outline.astype(np.uint8), disk), dtype=np.bool_)
