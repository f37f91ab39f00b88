"""Compute the losses of SAM 2: focal, dice, IoU score and object score.

Source: SAM 2 paper (arXiv:2408.00714), appendix D.2.2 for weights and rules.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from micro_training.unroll import Prediction

FOCAL_WEIGHT = 20.0
# SAM 2 takes 0.25; with a larger weight, small objects are found sooner.
_FOCAL_ALPHA = 0.75
_FOCAL_GAMMA = 2.0
_ABSENT_WEIGHT = 3.0


@dataclass(frozen=True, eq=False)
class Losses:
    """Mean losses over the objects and frames of a batch, scalars; `total` is their weighted sum.

    `iou` (of the chosen masks, 0..1, visible objects only) and `seen` (share of objects rightly
    judged visible or absent) are for the log.
    """

    total: Tensor
    focal: Tensor
    dice: Tensor
    iou_score: Tensor
    object_score: Tensor
    iou: Tensor
    seen: Tensor


def compute_losses(predictions: list[Prediction], masks: Tensor, side: int) -> Losses:
    """Compare predictions with the ground truth.

    Args:
        predictions: From `Unroller`.
        masks: `(B, T, S, S)` bool, the ground truth.
        side: Side in pixels at which masks are compared; S must be a multiple of it.
    """
    rows = [_compare(prediction, masks[:, prediction.time], side) for prediction in predictions]
    focal, dice, iou_score, object_score, iou, seen, visible = (
        torch.cat(column) for column in zip(*rows, strict=True)
    )
    count = visible.sum().clamp(min=1)
    focal, dice, iou_score = (
        (loss * visible).sum() / len(visible) for loss in (focal, dice, iou_score)
    )
    total = FOCAL_WEIGHT * focal + dice + iou_score + object_score.mean()
    return Losses(
        total,
        focal.detach(),
        dice.detach(),
        iou_score.detach(),
        object_score.mean().detach(),
        (iou * visible).sum() / count,
        seen.mean(),
    )


def _compare(prediction: Prediction, truth: Tensor, side: int) -> tuple[Tensor, ...]:
    """Return focal, dice, IoU and object score losses, IoU, rightness, visibility, each `(B,)`."""
    share = functional.avg_pool2d(truth[:, None].float(), truth.shape[-1] // side)
    visible = truth.flatten(1).any(dim=1).float()
    logits = functional.interpolate(
        prediction.masks, (side, side), mode="bilinear", align_corners=False
    )
    target = share.expand_as(logits)
    probability = logits.sigmoid()
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    agreement = probability * target + (1 - probability) * (1 - target)
    balance = _FOCAL_ALPHA * target + (1 - _FOCAL_ALPHA) * (1 - target)
    focal = (balance * (1 - agreement) ** _FOCAL_GAMMA * entropy).mean(dim=(2, 3))
    overlap = (probability * target).sum(dim=(2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum(dim=(2, 3)) + target.sum(dim=(2, 3)) + 1)

    guess, solid = logits.detach() > 0, target > 0.5
    union = (guess | solid).sum(dim=(2, 3)).clamp(min=1)
    ious = (guess & solid).sum(dim=(2, 3)) / union
    # SAM 2 takes the L1 distance. After the sigmoid its gradient vanishes near 0, where all IoUs
    # start, and the scores would stay 0 long after the masks have become good.
    iou_score = functional.binary_cross_entropy(prediction.ious, ious, reduction="none").mean(1)

    chosen = prediction.ious.detach().argmax(dim=1, keepdim=True)
    score = prediction.score[:, 0]
    object_score = functional.binary_cross_entropy_with_logits(score, visible, reduction="none")
    # Few objects are hidden: without this weight, "visible" is a good answer for a long time.
    object_score = object_score * (1 + (_ABSENT_WEIGHT - 1) * (1 - visible))
    return (
        # SAM 2 trains only the best mask, because its prompts are ambiguous. Whole shapes are not,
        # and each mask token would get a third of this short training.
        focal.mean(dim=1),
        dice.mean(dim=1),
        iou_score,
        object_score,
        ious.gather(1, chosen)[:, 0],
        ((score.detach() > 0) == (visible > 0)).float(),
        visible,
    )
