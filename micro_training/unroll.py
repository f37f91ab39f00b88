"""Runs a SAM 2 over clips as inference does, with gradients, and keeps what the losses need."""

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
# point prompts as SAM 2 takes them: "point_coords" and "point_labels"
Points = dict[str, Tensor]

# SAM 2's image normalisation, as in sam2/utils/misc.py
_MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
_STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
# from 16 frames up the length of the video has no effect on SAM 2
_MANY_FRAMES = 10_000


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the mask decoder said about one frame, before SAM 2 drops masks of absent objects.

    `time` is the frame; `masks` is `(B, M, S/4, S/4)` logits; `ious` is `(B, M)`, 0..1; `score` is
    `(B, 1)`, the object score logits.
    """

    time: int
    masks: Tensor
    ious: Tensor
    score: Tensor


class Unroller:
    """Runs one model, in eval mode, so that every branch is the one inference takes."""

    def __init__(self, model: SAM2Base) -> None:
        """Wrap a model and listen to its mask decoder."""
        self._model = model.eval()
        self._heard: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        model.sam_mask_decoder.register_forward_hook(
            lambda _module, _args, output: self._heard.append(output)
        )

    def __call__(
        self,
        batch: Batch,
        prompt: PromptKind,
        corrections: int,
        gap: int,
        aged: int,
        rng: np.random.Generator,
    ) -> list[Prediction]:
        """Prompt on the first frame, follow through the others.

        Args:
            batch: Clips and objects.
            prompt: How the first frame is prompted, for all objects.
            corrections: Correction clicks on the first frame, after a box or a click.
            gap: Frames that passed unseen between the first and the second frame.
            aged: Frames after the first that are followed without gradients and not returned.
            rng: Source of randomness for the prompts.

        Returns:
            The predictions of every decoder call that tells of a mask: one for each prompt of the
            first frame, one for each later frame. Where masks are followed, the first frame is
            also prompted by boxes or clicks, which are not followed.
        """
        device = self._model.device
        clips, frames = batch.frames.shape[:2]
        objects = len(batch.masks) // clips
        pixels = batch.frames.to(device).permute(0, 1, 4, 2, 3).float() / 255
        pixels = (pixels - _MEAN.to(device)) / _STD.to(device)
        owner = torch.arange(clips, device=device).repeat_interleave(objects)
        memory: dict[str, dict[int, Any]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
        features = self._features(pixels[:, 0], owner)
        predictions = self._start(features, batch, prompt, corrections, memory, rng)
        if prompt == "mask":
            # the decoder learns nothing from a mask prompt; the frame is encoded, so ask
            aside: PromptKind = "box" if rng.random() < 0.5 else "click"
            predictions += self._start(features, batch, aside, corrections, {}, rng)
        for time in range(1, frames):
            with torch.set_grad_enabled(time > aged):
                self._follow(self._features(pixels[:, time], owner), time + gap, memory)
            if time > aged:
                predictions.append(self._last_heard(time))
        return predictions

    def _follow(
        self, features: dict[str, Any], moment: int, memory: dict[str, dict[int, Any]]
    ) -> None:
        self._heard.clear()
        memory["non_cond_frame_outputs"][moment] = self._model.track_step(
            frame_idx=moment,
            is_init_cond_frame=False,
            point_inputs=None,
            mask_inputs=None,
            output_dict=memory,
            num_frames=_MANY_FRAMES,
            **features,
        )

    def _features(self, images: Tensor, owner: Tensor) -> dict[str, Any]:
        """Encode one frame of each clip and hand each object the frame of its clip."""
        encoded = self._model.forward_image(images)
        picked = {
            "backbone_fpn": [level[owner] for level in encoded["backbone_fpn"]],
            "vision_pos_enc": [level[owner] for level in encoded["vision_pos_enc"]],
        }
        _, feats, pos_embeds, sizes = self._model._prepare_backbone_features(picked)  # noqa: SLF001
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
        """Prompt the first frame; write its conditioning memory if there is any memory to fill."""
        device = self._model.device
        truth = batch.masks[:, 0]
        predictions: list[Prediction] = []
        points: Points | None = None
        logits: Tensor | None = None
        for _ in range(1 if prompt == "mask" else 1 + corrections):
            if prompt != "mask":
                points = self._add_points(truth, prompt, points, logits, rng)
            self._heard.clear()
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
            # SAM 2 clamps the logits that it feeds back, see sam2_video_predictor.py
            logits = out["pred_masks"].detach().clamp(-32, 32)
            if points is not None:
                predictions.append(self._last_heard(0))
        if memory:
            self._memorise(out, features)
            memory["cond_frame_outputs"][0] = out
        return predictions

    def _memorise(self, out: dict[str, Any], features: dict[str, Any]) -> None:
        """Write the conditioning memory of a prompted frame as SAM 2's video predictor does."""
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

    def _last_heard(self, time: int) -> Prediction:
        masks, ious, _, score = self._heard[-1]
        return Prediction(time, masks, ious, score)
