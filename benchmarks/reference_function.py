"""`references.PerObjectLoop` as an auto-annotation function, for `benchmarks/agent.py`.

cvat-cli function run-agent <id> --function-file benchmarks/reference_function.py
"""

import os
import sys
from pathlib import Path

import cvat_sdk.auto_annotation as cvataa
from cvat_sdk.masks import decode_mask, encode_mask
from PIL import Image

# cvat-cli loads this file by its path; the project's modules are in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.references import LoopFrame, LoopObject, PerObjectLoop
from model_loader import load_predictor
from settings import Settings


class ReferenceFunction:
    """A cvat-sdk tracking function for masks; model and device come from the environment."""

    spec = cvataa.TrackingFunctionSpec(supported_shape_types=["mask"])

    def __init__(self) -> None:
        model, _ = load_predictor(Settings.from_env(os.environ))
        self._loop = PerObjectLoop(model)

    def preprocess_image(
        self,
        context: cvataa.TrackingFunctionContext,  # noqa: ARG002  # cvat-sdk's interface
        image: Image.Image,
    ) -> LoopFrame:
        """Encode a frame."""
        return self._loop.encode(image)

    def init_tracking_state(
        self,
        context: cvataa.TrackingFunctionShapeContext,  # noqa: ARG002  # cvat-sdk's interface
        pp_image: LoopFrame,
        shape: cvataa.TrackableShape,
    ) -> LoopObject:
        """Start an object."""
        height, width = pp_image.size_hw
        mask = decode_mask(shape.points, image_width=width, image_height=height)
        return self._loop.start(pp_image, mask)

    def track(
        self,
        context: cvataa.TrackingFunctionShapeContext,  # noqa: ARG002  # cvat-sdk's interface
        pp_image: LoopFrame,
        state: LoopObject,
    ) -> cvataa.TrackableShape | None:
        """Track an object; None where it is not in the frame."""
        mask = self._loop.track(pp_image, state)
        return cvataa.TrackableShape(type="mask", points=encode_mask(mask)) if mask.any() else None


create = ReferenceFunction
