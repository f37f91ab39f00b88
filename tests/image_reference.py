"""The reference: sam2's own SAM2ImagePredictor, with its filling of holes as on CUDA."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from sam2.build_sam import build_sam2
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor

from interaction.protocol import Prompt
from model_loader import MICRO_FOLDER
from shapes import Mask
from tests.reference import hole_filling

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ReferenceAnswer:
    """A mask `(H, W)`, its predicted IoU, and its low_res_logits `(1, S/4, S/4)`."""

    mask: Mask
    iou: float
    low_res_logits: Logits


class ImageReference:
    """The official predictor around a model built by the official builder, or around `micro`.

    Args:
        config_name: One of sam2's configs, or `micro`.
        checkpoint: Its weights; not used for `micro`.
        image_size: Side of its input; not used for `micro`.
        area: Largest hole to fill and island to remove.
    """

    def __init__(
        self, config_name: str, checkpoint: Path | None, image_size: int, *, area: int
    ) -> None:
        model = (
            _build_micro()
            if config_name == "micro"
            else build_sam2(
                config_name,
                str(checkpoint),
                device="cpu",
                hydra_overrides_extra=[f"++model.image_size={image_size}"],
            )
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated")
            self._predictor = SAM2ImagePredictor(model, max_hole_area=area, max_sprinkle_area=area)
        # its constructor sets the feature maps' sizes for 1024 px
        side: int = model.image_size
        self._predictor._bb_feat_sizes = [(side // n, side // n) for n in (4, 8, 16)]

    def set_image(self, image: Image.Image) -> None:
        """Encode an RGB frame."""
        self._predictor.set_image(image)

    def predict(self, prompt: Prompt, hint: Logits | None = None) -> ReferenceAnswer:
        """Segment a prompt.

        If the official predictor removes the whole object as a small island, it is called again
        without removing islands: the only difference that the function makes.

        Args:
            prompt: Clicks and box.
            hint: low_res_logits of an earlier answer, to refine.
        """
        answer = self._predict(prompt, hint)
        if not answer.mask.any():
            transforms = self._predictor._transforms
            area, transforms.max_sprinkle_area = transforms.max_sprinkle_area, 0
            answer = self._predict(prompt, hint)
            transforms.max_sprinkle_area = area
        return answer

    def _predict(self, prompt: Prompt, hint: Logits | None) -> ReferenceAnswer:
        points = [*prompt.positive, *prompt.negative]
        labels = [1] * len(prompt.positive) + [0] * len(prompt.negative)
        with hole_filling():
            masks, ious, logits = self._predictor.predict(
                point_coords=np.array(points) if points else None,
                point_labels=np.array(labels) if points else None,
                box=None if prompt.box is None else np.array(prompt.box),
                mask_input=hint,
                multimask_output=prompt.box is None and len(points) == 1,
            )
        best = int(ious.argmax())
        return ReferenceAnswer(masks[best] > 0, float(ious[best]), logits[best : best + 1])


def _build_micro() -> SAM2Base:
    config = OmegaConf.load(MICRO_FOLDER / "config.yaml")
    options = {  # as build_sam2 adds them
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    }
    model = instantiate(
        OmegaConf.merge(config.model, {"sam_mask_decoder_extra_args": options}), _recursive_=True
    )
    checkpoint = torch.load(MICRO_FOLDER / "checkpoint.pt", weights_only=True)
    model.load_state_dict(checkpoint["model"])
    assert isinstance(model, SAM2Base)
    return model.eval()
