"""The usual way to track several objects with SAM 2, as a reference to measure against."""

from __future__ import annotations

import io
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision.transforms.functional as vision
from PIL import Image
from sam2.sam2_video_predictor import SAM2VideoPredictor
from torch.nn import functional

from model_handler import IMAGE_MEAN, IMAGE_STD
from shapes import Mask, SizeHW


@dataclass(frozen=True, eq=False)
class LoopFrame:
    """An encoded frame: its size, and the arguments of `track_step` that hold its features."""

    size_hw: SizeHW
    inputs: dict[str, Any]


@dataclass(eq=False)
class LoopObject:
    """The state of one object: the whole outputs of its first and its latest frames."""

    step: int
    first: dict[str, Any]
    latest: OrderedDict[int, dict[str, Any]] = field(default_factory=OrderedDict)


class PerObjectLoop:
    """Track one object after another on a frame that is encoded once.

    CVAT's own SAM 2 function for agents tracks this way (cvat-ai/cvat, ai-models/tracker/sam2). It
    keeps the first and the seven latest outputs in float32, with position encodings and masks. It
    resizes images and prompts differently from SAM 2's predictor, so its masks drift from SAM 2's.

    Args:
        model: In evaluation mode, on its device.
    """

    def __init__(self, model: SAM2VideoPredictor) -> None:
        self._model = model

    @torch.inference_mode()
    def encode(self, image: Image.Image) -> LoopFrame:
        """Encode a frame for all objects on it."""
        side = self._model.image_size
        pixels = vision.to_tensor(vision.resize(image.convert("RGB"), [side, side]))
        pixels = vision.normalize(pixels, list(IMAGE_MEAN), list(IMAGE_STD))
        encoded = self._model.forward_image(pixels[None].to(self._model.device))
        _, features, positions, sizes = self._model._prepare_backbone_features(encoded)  # noqa: SLF001  # as SAM 2's predictor
        inputs = {
            "current_vision_feats": features,
            "current_vision_pos_embeds": positions,
            "feat_sizes": sizes,
        }
        return LoopFrame((image.height, image.width), inputs)

    @torch.inference_mode()
    def start(self, frame: LoopFrame, mask: Mask) -> LoopObject:
        """Start an object from its mask `(H, W)`."""
        side = self._model.image_size
        prompt = torch.from_numpy(mask)[None, None].float()
        prompt = functional.interpolate(prompt, (side, side), mode="bilinear") >= 0.5
        prompt = prompt.float().to(self._model.device)
        return LoopObject(0, self._step(frame, 0, mask_inputs=prompt, output_dict={}))

    @torch.inference_mode()
    def track(self, frame: LoopFrame, obj: LoopObject) -> Mask:
        """Track an object to the next frame and return its mask `(H, W)`."""
        obj.step += 1
        outputs = {"cond_frame_outputs": {0: obj.first}, "non_cond_frame_outputs": obj.latest}
        out = self._step(frame, obj.step, mask_inputs=None, output_dict=outputs)
        obj.latest[obj.step] = out
        while len(obj.latest) > self._model.num_maskmem:
            obj.latest.popitem(last=False)
        logits = functional.interpolate(
            out["pred_masks"], frame.size_hw, mode="bilinear", antialias=True
        )
        mask: Mask = (logits[0, 0] > 0).cpu().numpy()
        return mask

    def _step(self, frame: LoopFrame, step: int, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401  # SAM 2's own
        out: dict[str, Any] = self._model.track_step(
            frame_idx=step,
            is_init_cond_frame=step == 0,
            num_frames=step + 1,
            point_inputs=None,
            **frame.inputs,
            **arguments,
        )
        names = ("maskmem_features", "maskmem_pos_enc", "pred_masks", "obj_ptr")
        return {name: out[name] for name in names}


def encode_object(obj: LoopObject) -> bytes:
    """Serialise an object's whole state, to store it between requests."""
    file = io.BytesIO()
    torch.save({"step": obj.step, "first": obj.first, "latest": obj.latest}, file)
    return file.getvalue()


def decode_object(data: bytes, device: torch.device) -> LoopObject:
    """Read the bytes of `encode_object`."""
    return LoopObject(**torch.load(io.BytesIO(data), map_location=device, weights_only=True))
