"""The interactor as cvat-cli's agents call it: a prompt on a frame in, a mask out.

cvat-cli loads it through `interactor.py`.
"""

from __future__ import annotations

import os
from functools import cached_property

import cvat_sdk.auto_annotation as cvataa
from cvat_sdk.models import AttributeValRequest
from PIL import Image

from agent.shared_states import bad_requests
from agent.worker import MODEL_PARAMETERS, create_function, log
from images import upright_rgb
from interaction.protocol import parse_prompt
from interaction.segmenter import Segmenter, build_segmenter
from settings import Settings
from shapes import ShapeType, encode_cvat_rle
from tracker import Frame


class InteractionFunction:
    """A `cvat_sdk.auto_annotation.InteractionFunction`.

    Args:
        settings: Model, device, how prompts are read.
    """

    # a box or a point is enough
    spec = cvataa.InteractionFunctionSpec(min_pos_points=0, min_neg_points=0, min_bounding_boxes=0)

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def start_agent(self) -> None:
        """Load the model, before the first request.

        Raises:
            SettingsError: Weights or the device are missing; see `model_loader.load_predictor`.
        """
        self._segmenter  # noqa: B018  # loads the model

    def preprocess_image(
        self,
        context: cvataa.InteractionFunctionContext,  # noqa: ARG002  # cvat-sdk's interface
        image: Image.Image,
    ) -> Frame:
        """Return the frame; it is encoded at its first prompt.

        cvat-cli caches the result for minutes, without a limit on the number of frames. So the
        result is the picture, and the segmenter limits the number of encoded frames.
        """
        return Frame.from_image(upright_rgb(image))

    def detect(
        self,
        context: cvataa.InteractionFunctionContext,  # noqa: ARG002  # cvat-sdk's interface
        pp_image: Frame,
        prompts: cvataa.InteractionPrompts,
    ) -> list[cvataa.InteractionResultShape]:
        """Segment the object of a prompt.

        Returns:
            One mask with SAM 2's predicted IoU; no shape if the mask is empty.

        Raises:
            BadArError: A point or the box is invalid, or there is nothing to segment.
        """
        fields = {
            "pos_points": [list(point) for point in prompts.pos_points],
            "neg_points": [list(point) for point in prompts.neg_points],
            "obj_bbox": [list(corner) for corner in prompts.bounding_box or ()],
        }
        with bad_requests():
            prompt = parse_prompt(
                fields,
                pp_image.size_hw,
                extreme_points=self._settings.interactor.extreme_points,
            )
        segment = self._segmenter.segment(pp_image.key, pp_image.image, prompt)
        log.info("segmented: %s", {"encoded": segment.encoded, "refined": segment.refined})
        if not segment.mask.any():
            return []
        confidence = AttributeValRequest(
            spec_id=cvataa.InteractionResultAttributes.CONFIDENCE.value,
            value=f"{segment.confidence:.2f}",
        )
        return [
            cvataa.InteractionResultShape(
                type=ShapeType.MASK.value,
                points=encode_cvat_rle(segment.mask),
                attributes=[confidence],
            )
        ]

    @cached_property
    def _segmenter(self) -> Segmenter:
        segmenter = build_segmenter(self._settings)
        log.info("ready: %s", segmenter.describe() | {"process": str(os.getpid())})
        return segmenter


def create(**parameters: object) -> InteractionFunction:
    """Create the function; cvat-cli calls this with the values of its `-p` options.

    Args:
        parameters: See `worker.MODEL_PARAMETERS`.

    Raises:
        SystemExit: See `worker.create_function`.
    """
    return create_function(InteractionFunction, parameters, MODEL_PARAMETERS)
