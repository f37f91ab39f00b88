"""Turn an annotator's shape into the prompt that SAM 2 starts from: a box, or a small mask."""

from __future__ import annotations

import torch

from errors import BadRequestError
from model_handler import MIN_COVERAGE, ModelHandler
from shapes import Box, Shape, ShapeType, SizeHW, rectangle_to_box, shape_to_mask


def shape_to_prompt(model: ModelHandler, shape: Shape, size_hw: SizeHW) -> torch.Tensor | Box:
    """Return the prompt that a shape on a frame of the given height and width makes.

    Returns:
        A rectangle's box XYXY in the frame's pixels; else a mask at the model's input size, see
        `ModelHandler.mask_prompt`: at the frame's size, hundreds of masks would not fit.

    Raises:
        BadRequestError: The shape cannot be drawn on the frame, or is too small for the model:
            SAM 2 would take the object for absent and never find it.
    """
    side = model.image_size
    if shape.type is ShapeType.RECTANGLE:
        x1, y1, x2, y2 = box = rectangle_to_box(shape, size_hw)
        width, height = (x2 - x1) * side / size_hw[1], (y2 - y1) * side / size_hw[0]
        # SAM 2 sees a box as its two corners, here nearly the same point: the bundled model makes
        # no mask of it. It does make masks of boxes thinner than a pixel in one direction.
        if width < 1 and height < 1:
            raise BadRequestError(
                f"{_too_small(shape.type, side)}: it has {int(100 * width) / 100} x "
                f"{int(100 * height) / 100} of them, one side must have 1; set a larger "
                "SAM2_IMAGE_SIZE, or draw a larger rectangle"
            )
        return box
    mask = shape_to_mask(shape, size_hw)
    prompt = model.mask_prompt(mask)
    if not prompt.any():
        coverage = float(model.mask_coverage(mask).max())
        raise BadRequestError(
            f"{_too_small(shape.type, side)}: it covers at most {int(100 * coverage)} % of "
            f"any of them, {100 * MIN_COVERAGE:.0f} % is needed; set a larger SAM2_IMAGE_SIZE, or "
            "draw a rectangle around the object"
        )
    return prompt


def _too_small(shape_type: ShapeType, side: int) -> str:
    return f"{shape_type} is too small for the model, whose input has {side} x {side} pixels"
