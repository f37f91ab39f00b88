"""Run SAM 2 over clips as at inference, with gradients, and return what the losses need."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor
from torch.nn import functional

from micro_training.batches import Batch
from micro_training.prompts import draw_boxes, draw_clicks

PromptKind = Literal["mask", "box", "click"]
# SAM 2's point prompts: "point_coords" and "point_labels".
Points = dict[str, Tensor]

# Source: SAM 2's image normalisation, sam2/utils/misc.py.
_MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
_STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
# From 16 frames up, the length of the video has no effect on SAM 2.
_MANY_FRAMES = 10_000


@dataclass(frozen=True, eq=False)
class Prediction:
    """The mask decoder's output for one frame, before SAM 2 drops masks of absent objects.

    `time` is the frame; `masks` is `(B, M, S/4, S/4)` logits; `ious` is `(B, M)`, 0..1; `score` is
    `(B, 1)`, the object score logits.
    """

    time: int
    masks: Tensor
    ious: Tensor
    score: Tensor


class Unroller:
    """Runs one model in eval mode, so that it takes the same branches as at inference."""

    def __init__(self, model: SAM2Base) -> None:
        """Wrap a model and record the outputs of its mask decoder."""
        self._model = model.eval()
        self._outputs: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        model.sam_mask_decoder.register_forward_hook(
            lambda _module, _args, output: self._outputs.append(output)
        )

    def __call__(
        self,
        batch: Batch,
        prompt: PromptKind,
        corrections: int,
        gap: int,
        burn_in: int,
        rng: np.random.Generator,
    ) -> list[Prediction]:
        """Prompt objects on the first frame and track them through the others.

        Args:
            batch: Clips and objects.
            prompt: Kind of prompt on the first frame, for all objects.
            corrections: Correction clicks on the first frame, after a box or a click.
            gap: Number of frames left out between the first and the second frame.
            burn_in: Frames after the first that are tracked without gradients and not returned.
            rng: Source of randomness for the prompts.

        Returns:
            The prediction of every decoder call that makes a mask: one for each prompt of the first
            frame, one for each later frame. For mask prompts, the first frame is also prompted by
            boxes or clicks, which are not tracked further.
        """
        device = self._model.device
        clips, frames = batch.frames.shape[:2]
        objects = len(batch.masks) // clips
        pixels = batch.frames.to(device).permute(0, 1, 4, 2, 3).float() / 255
        pixels = (pixels - _MEAN.to(device)) / _STD.to(device)
        clip_of_object = torch.arange(clips, device=device).repeat_interleave(objects)
        memory: dict[str, dict[int, Any]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
        features = self._features(pixels[:, 0], clip_of_object)
        predictions = self._start(features, batch, prompt, corrections, memory, rng)
        if prompt == "mask":
            # The decoder learns nothing from a mask prompt, so prompt the encoded frame again.
            further: PromptKind = "box" if rng.random() < 0.5 else "click"
            predictions += self._start(features, batch, further, corrections, {}, rng)
        for time in range(1, frames):
            with torch.set_grad_enabled(time > burn_in):
                self._track(self._features(pixels[:, time], clip_of_object), time + gap, memory)
            if time > burn_in:
                predictions.append(self._last_prediction(time))
        return predictions

    def _track(
        self, features: dict[str, Any], moment: int, memory: dict[str, dict[int, Any]]
    ) -> None:
        self._outputs.clear()
        memory["non_cond_frame_outputs"][moment] = self._model.track_step(
            frame_idx=moment,
            is_init_cond_frame=False,
            point_inputs=None,
            mask_inputs=None,
            output_dict=memory,
            num_frames=_MANY_FRAMES,
            **features,
        )

    def _features(self, images: Tensor, clip_of_object: Tensor) -> dict[str, Any]:
        """Encode one frame of each clip; return each object's frame features."""
        encoded = self._model.forward_image(images)
        per_object = {
            "backbone_fpn": [level[clip_of_object] for level in encoded["backbone_fpn"]],
            "vision_pos_enc": [level[clip_of_object] for level in encoded["vision_pos_enc"]],
        }
        _, feats, pos_embeds, sizes = self._model._prepare_backbone_features(per_object)  # noqa: SLF001
        return {
            "current_vision_feats": feats,
            "current_vision_pos_embeds": pos_embeds,
            "feat_sizes": sizes,
        }

    def _start(
        self,
        features: dict[str, Any],
        batch: Batch,
        prompt: PromptKind,
        corrections: int,
        memory: dict[str, dict[int, Any]],
        rng: np.random.Generator,
    ) -> list[Prediction]:
        """Prompt the first frame; add its conditioning memory to `memory` unless that is empty."""
        device = self._model.device
        truth = batch.masks[:, 0]
        predictions: list[Prediction] = []
        points: Points | None = None
        logits: Tensor | None = None
        for _ in range(1 if prompt == "mask" else 1 + corrections):
            if prompt != "mask":
                points = self._add_points(truth, prompt, points, logits, rng)
            self._outputs.clear()
            out = self._model.track_step(
                frame_idx=0,
                is_init_cond_frame=True,
                point_inputs=points,
                mask_inputs=truth[:, None].to(device).float() if points is None else None,
                output_dict=memory,
                num_frames=_MANY_FRAMES,
                run_mem_encoder=False,
                prev_sam_mask_logits=logits,
                **features,
            )
            # Source: sam2_video_predictor.py clamps the logits that it feeds back.
            logits = out["pred_masks"].detach().clamp(-32, 32)
            if points is not None:
                predictions.append(self._last_prediction(0))
        if memory:
            self._encode_memory(out, features)
            memory["cond_frame_outputs"][0] = out
        return predictions

    def _encode_memory(self, out: dict[str, Any], features: dict[str, Any]) -> None:
        """Compute the memory of a prompted frame as SAM 2's video predictor does."""
        size = (self._model.image_size, self._model.image_size)
        high = functional.interpolate(out["pred_masks"], size, mode="bilinear")
        out["maskmem_features"], out["maskmem_pos_enc"] = self._model._encode_new_memory(  # noqa: SLF001
            current_vision_feats=features["current_vision_feats"],
            feat_sizes=features["feat_sizes"],
            pred_masks_high_res=high,
            object_score_logits=out["object_score_logits"],
            is_mask_from_pts=True,
        )

    def _add_points(
        self,
        truth: Tensor,
        prompt: PromptKind,
        points: Points | None,
        logits: Tensor | None,
        rng: np.random.Generator,
    ) -> Points:
        """Add a box, or a click where the last prediction is wrong."""
        if points is None and prompt == "box":
            coords, labels = draw_boxes(truth, rng)
        else:
            guess = None
            if logits is not None:
                guess = functional.interpolate(logits, truth.shape[1:], mode="bilinear")[:, 0] > 0
            coords, labels = draw_clicks(truth, None if guess is None else guess.cpu(), rng)
        coords, labels = coords.to(self._model.device), labels.to(self._model.device)
        if points is None:
            return {"point_coords": coords, "point_labels": labels}
        return {
            "point_coords": torch.cat([points["point_coords"], coords], 1),
            "point_labels": torch.cat([points["point_labels"], labels], 1),
        }

    def _last_prediction(self, time: int) -> Prediction:
        masks, ious, _, score = self._outputs[-1]
        return Prediction(time, masks, ious, score)
