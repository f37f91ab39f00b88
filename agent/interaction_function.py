"""Owns what cvat-cli's agents call of the interactor: prompts on a frame in, a mask out.

Adds no segmenting of its own; `interactor.py` is the file that cvat-cli is given.
"""

from __future__ import annotations

import os
from functools import cached_property

import cvat_sdk.auto_annotation as cvataa
from cvat_sdk.models import AttributeValRequest
from PIL import Image

from agent.shared_states import refusals
from agent.worker import MODEL_PARAMETERS, log, make
from images import upright_rgb
from interaction.protocol import parse_prompt
from interaction.segmenter import Segmenter, build_segmenter
from model_loader import load_predictor
from settings import Settings
from shapes import ShapeType, encode_cvat_rle
from tracker import Frame


class InteractionFunction:
    """An interaction function in cvat-sdk's sense (`cvat_sdk.auto_annotation.InteractionFunction`).

    Args:
        settings: Model, device, how prompts are read.
    """

    # a box alone is enough, and so is a point
    spec = cvataa.InteractionFunctionSpec(min_pos_points=0, min_neg_points=0, min_bounding_boxes=0)

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def start_agent(self) -> None:
        """Load the model, before the first request.

        Raises:
            SettingsError: Weights or the device are missing; see `model_loader.load_model`.
        """
        self._segmenter  # noqa: B018  # loads it

    def preprocess_image(
        self,
        context: cvataa.InteractionFunctionContext,  # noqa: ARG002  # cvat-sdk's interface
        image: Image.Image,
    ) -> Frame:
        """Name the frame; it is encoded at its first prompt.

        cvat-cli keeps what comes out for minutes, however many frames there are. So it is the
        picture; the segmenter knows how many encoded frames the device can hold.
        """
        return Frame.from_image(upright_rgb(image))

    def detect(
        self,
        context: cvataa.InteractionFunctionContext,  # noqa: ARG002  # cvat-sdk's interface
        pp_image: Frame,
        prompts: cvataa.InteractionPrompts,
    ) -> list[cvataa.InteractionResultShape]:
        """Find the object of a prompt.

        Returns:
            One mask with SAM 2's guess of its IoU; none where the mask is empty.

        Raises:
            BadArError: A point or the box cannot be used, or there is nothing to segment.
        """
        fields = {
            "pos_points": [list(point) for point in prompts.pos_points],
            "neg_points": [list(point) for point in prompts.neg_points],
            "obj_bbox": [list(corner) for corner in prompts.bounding_box or ()],
        }
        with refusals():
            prompt = parse_prompt(
                fields,
                pp_image.size_hw,
                extreme_points=self._settings.interactor.extreme_points,
            )
        found = self._segmenter.segment(pp_image.key, pp_image.image, prompt)
        log.info("segmented: %s", {"encoded": found.encoded, "refined": found.refined})
        if not found.mask.any():
            return []
        confidence = AttributeValRequest(
            spec_id=cvataa.InteractionResultAttributes.CONFIDENCE.value,
            value=f"{found.confidence:.2f}",
        )
        return [
            cvataa.InteractionResultShape(
                type=ShapeType.MASK.value,
                points=encode_cvat_rle(found.mask),
                attributes=[confidence],
            )
        ]

    @cached_property
    def _segmenter(self) -> Segmenter:
        model, fingerprint = load_predictor(self._settings)
        segmenter = build_segmenter(model, self._settings)
        ready = {"model": fingerprint, "device": str(model.device), "process": str(os.getpid())}
        log.info("ready: %s", ready)
        return segmenter


def create(**parameters: object) -> InteractionFunction:
    """Make the function; what cvat-cli calls with the values of its `-p` options.

    Args:
        parameters: See `worker.MODEL_PARAMETERS`.

    Raises:
        SystemExit: See `worker.make`.
    """
    return make(InteractionFunction, parameters, MODEL_PARAMETERS)
