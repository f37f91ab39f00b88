"""Owns SAM 2: frame -> features, prompt -> memory, memory -> mask; knows no JSON and no store.

The masks equal those of `sam2.sam2_video_predictor.SAM2VideoPredictor` for the same frames, weights
and prompts: the same modules are called in the same order on the same numbers. What the predictor
keeps in one growing session, this module takes in and gives back as small immutable pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import cachetools
import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sam2.sam2_video_predictor import SAM2VideoPredictor
from torch.nn import functional

from shapes import Box, Mask, SizeHW
from track_state import MEMORY_REACH, TrackState

# sam2/utils/misc.py, load_video_frames
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

# A stream has no known length. From 16 frames up the length changes nothing in SAM 2 but a bound
# (sam2_base.py, max_obj_ptrs_in_encoder), so any number beyond every video will do.
NUM_FRAMES = 1 << 40


@dataclass(frozen=True, eq=False)
class FrameFeatures:
    """One encoded frame, shared by all objects on it.

    Attributes:
        size_hw: Height and width of the frame itself.
        feature_maps: The encoder's levels from fine to coarse, each `(1, C, h, w)`.
        position_encoding: Of the coarsest level, `(1, C, h, w)`.
    """

    size_hw: SizeHW
    feature_maps: tuple[torch.Tensor, ...]
    position_encoding: torch.Tensor


@dataclass(frozen=True, eq=False)
class ObjectOutput:
    """What SAM 2 says of one object on one frame.

    Attributes:
        low_res_logits: Mask scores before thresholding, small holes filled, `(1, 1, S/4, S/4)`.
        object_score: Whether the object is visible at all: a logit, above 0 for yes.
        obj_ptr: Object pointer `(C,)`, float32, on the CPU.
        memory: Memory features `(M, S/16, S/16)`, bfloat16, on the model's device.
    """

    low_res_logits: torch.Tensor
    object_score: float
    obj_ptr: torch.Tensor
    memory: torch.Tensor


class ModelHandler:
    """A SAM 2 model on one device.

    Args:
        model: In evaluation mode, on its device.
        fingerprint: Names model, weights and input size; states of another are refused.
        batch_objects: Objects per forward pass. One at a time is bit-exact; a batch is the same
            mathematics with other rounding.
        feature_cache_frames: Encoded frames to keep on the device.
    """

    def __init__(
        self,
        model: SAM2VideoPredictor,
        *,
        fingerprint: str,
        batch_objects: int,
        feature_cache_frames: int,
    ) -> None:
        self.fingerprint = fingerprint
        self.device: torch.device = model.device
        self.image_size: int = model.image_size
        self.obj_ptr_size: int = model.hidden_dim
        side = model.sam_image_embedding_size
        self.memory_shape: tuple[int, int, int] = (model.mem_dim, side, side)
        self._model = model
        self._batch_objects = batch_objects
        self._features: cachetools.LRUCache[str, FrameFeatures] = cachetools.LRUCache(
            feature_cache_frames
        )
        self._shades = _normalised_shades()
        with inference(self.device):
            blank = torch.zeros(1, *self.memory_shape, dtype=self.dtype, device=self.device)
            position = model.memory_encoder.position_encoding(blank)
            self._memory_position: torch.Tensor = position.to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Type the network computes in, see `compute_dtype`."""
        return compute_dtype(self.device)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Return what the model sees of an RGB frame: `(3, S, S)`, float32, not yet on its device.

        Source: `sam2/utils/misc.py`, `_load_img_as_tensor` and `load_video_frames`.
        """
        resized = np.asarray(image.resize((self.image_size, self.image_size)))
        return torch.from_numpy(cv2.LUT(resized, self._shades)).permute(2, 0, 1)

    def encode_frame(
        self, key: str, size_hw: SizeHW, pixels: Callable[[], torch.Tensor]
    ) -> FrameFeatures:
        """Encode a frame, or return it as it was encoded for an earlier request.

        Args:
            key: Names the frame's content.
            size_hw: Of the frame itself.
            pixels: Gives what `pixels` made of it; called only when needed.
        """
        features = self._features.get(key)
        if features is None:
            features = self._features[key] = self._encode(size_hw, pixels())
        return features

    def mask_prompt(self, mask: Mask) -> torch.Tensor:
        """Return a mask `(H, W)` at the size the model takes it, `(1, 1, S, S)`, bool.

        Source: `SAM2VideoPredictor.add_new_mask`.
        """
        size = (self.image_size, self.image_size)
        prompt = torch.from_numpy(mask)[None, None].float().to(self.device)
        if prompt.shape[-2:] != size:
            prompt = functional.interpolate(
                prompt, size, mode="bilinear", align_corners=False, antialias=True
            )
        return prompt >= 0.5

    def start_from_mask(self, frame: FrameFeatures, prompt: torch.Tensor) -> ObjectOutput:
        """Begin an object at a mask of the frame's, as `mask_prompt` returned it."""
        return self._start(frame, mask_inputs=prompt.float(), point_inputs=None)

    def start_from_box(self, frame: FrameFeatures, box: Box) -> ObjectOutput:
        """Begin an object at a box XYXY in the frame's pixels, far edge excluded.

        Source: `SAM2VideoPredictor.add_new_points_or_box`: a box is two points labelled 2 and 3.
        """
        height, width = frame.size_hw
        corners = torch.tensor(box, dtype=torch.float32).reshape(1, 2, 2)
        corners = corners / torch.tensor([width, height]) * self.image_size
        labels = torch.tensor([[2, 3]], dtype=torch.int32)
        points = {
            "point_coords": corners.to(self.device),
            "point_labels": labels.to(self.device),
        }
        return self._start(frame, mask_inputs=None, point_inputs=points)

    def step(
        self,
        frame: FrameFeatures,
        states: Sequence[TrackState],
        memories: Mapping[str, torch.Tensor],
        before_batch: Callable[[], None] = lambda: None,
    ) -> list[ObjectOutput]:
        """Find objects on the frame that follows their states'.

        Args:
            frame: The next frame.
            states: One per object, of any ages.
            memories: Memory features by id, on the device, for all `memory_ids` of the states.
            before_batch: Called before each forward pass; may raise to give up.

        Returns:
            One output per state, in order.
        """
        outputs: dict[int, ObjectOutput] = {}
        by_layout = sorted(range(len(states)), key=lambda index: _layout(states[index]))
        for _, group in groupby(by_layout, key=lambda index: _layout(states[index])):
            while batch := list(islice(group, self._batch_objects)):
                before_batch()
                found = self._step_batch(frame, [states[index] for index in batch], memories)
                outputs.update(zip(batch, found, strict=True))
        return [outputs[index] for index in range(len(states))]

    def full_size_mask(self, frame: FrameFeatures, output: ObjectOutput) -> Mask:
        """Return the boolean mask `(H, W)` at the frame's size.

        Source: `SAM2VideoPredictor._get_orig_video_res_output`.
        """
        with inference(self.device):
            logits = functional.interpolate(
                output.low_res_logits, frame.size_hw, mode="bilinear", align_corners=False
            )
            mask: Mask = (logits[0, 0] > 0).cpu().numpy()
        return mask

    def _encode(self, size_hw: SizeHW, pixels: torch.Tensor) -> FrameFeatures:
        with inference(self.device):
            encoded = self._model.forward_image(pixels.to(self.device)[None])
        levels = self._model.num_feature_levels
        return FrameFeatures(
            size_hw=size_hw,
            feature_maps=tuple(encoded["backbone_fpn"][-levels:]),
            position_encoding=encoded["vision_pos_enc"][-1],
        )

    def _start(
        self,
        frame: FrameFeatures,
        *,
        mask_inputs: torch.Tensor | None,
        point_inputs: dict[str, torch.Tensor] | None,
    ) -> ObjectOutput:
        with inference(self.device):
            inputs = self._frame_inputs(frame, 1)
            out = self._model.track_step(
                frame_idx=0,
                is_init_cond_frame=True,
                **inputs,
                mask_inputs=mask_inputs,
                point_inputs=point_inputs,
                output_dict={},
                num_frames=NUM_FRAMES,
                run_mem_encoder=False,
            )
            low_res_logits = fill_holes(out["pred_masks"], self._model.fill_hole_area)
            # `propagate_in_video_preflight` makes the memory of a prompted frame anew, from the
            # low-resolution scores of all objects together.
            high_res_logits = functional.interpolate(
                low_res_logits,
                (self.image_size, self.image_size),
                mode="bilinear",
                align_corners=False,
            )
            memory, _ = self._model._encode_new_memory(  # noqa: SLF001  # as the predictor does
                current_vision_feats=inputs["current_vision_feats"],
                feat_sizes=inputs["feat_sizes"],
                pred_masks_high_res=high_res_logits,
                object_score_logits=out["object_score_logits"],
                is_mask_from_pts=True,
            )
            return _outputs(low_res_logits, out, memory)[0]

    def _step_batch(
        self,
        frame: FrameFeatures,
        states: Sequence[TrackState],
        memories: Mapping[str, torch.Tensor],
    ) -> list[ObjectOutput]:
        """Step objects of one layout in one forward pass, on the clock of the first."""
        with inference(self.device):
            first = states[0]
            entries = [state.conditioning + state.past for state in states]
            in_reach = len(first.conditioning) + max(0, len(first.past) - MEMORY_REACH)
            remembered: list[dict[str, Any]] = []
            for place, objects in enumerate(zip(*entries, strict=True)):
                pointers = torch.stack([past_frame.obj_ptr for past_frame in objects])
                memory: dict[str, Any] = {"obj_ptr": pointers.to(self.device)}
                if place < len(first.conditioning) or place >= in_reach:
                    features = torch.stack([memories[past_frame.id] for past_frame in objects])
                    position = self._memory_position.expand(len(states), -1, -1, -1)
                    memory |= {"maskmem_features": features, "maskmem_pos_enc": [position]}
                remembered.append(memory)
            by_step = [
                (entry.step, memory) for entry, memory in zip(entries[0], remembered, strict=True)
            ]
            out = self._model.track_step(
                frame_idx=first.newest.step + 1,
                is_init_cond_frame=False,
                **self._frame_inputs(frame, len(states)),
                mask_inputs=None,
                point_inputs=None,
                output_dict={
                    "cond_frame_outputs": dict(by_step[: len(first.conditioning)]),
                    "non_cond_frame_outputs": dict(by_step[len(first.conditioning) :]),
                },
                num_frames=NUM_FRAMES,
                run_mem_encoder=True,
            )
            low_res_logits = fill_holes(out["pred_masks"], self._model.fill_hole_area)
            return _outputs(low_res_logits, out, out["maskmem_features"])

    def _frame_inputs(self, frame: FrameFeatures, count: int) -> dict[str, Any]:
        """Lay one frame out for `count` objects, without copying it.

        Source: `SAM2VideoPredictor._get_image_feature`, `SAM2Base._prepare_backbone_features`.
        """

        def flat(maps: torch.Tensor) -> torch.Tensor:  # (1, C, h, w) -> (h * w, count, C)
            return maps.expand(count, -1, -1, -1).flatten(2).permute(2, 0, 1)

        return {
            "current_vision_feats": [flat(maps) for maps in frame.feature_maps],
            "current_vision_pos_embeds": [flat(frame.position_encoding)],
            "feat_sizes": [(maps.shape[-2], maps.shape[-1]) for maps in frame.feature_maps],
        }


def _normalised_shades() -> npt.NDArray[np.float32]:
    """Return what SAM 2 makes of each shade 0...255 of each colour, `(1, 256, 3)`, to the bit.

    Source: `sam2/utils/misc.py`, `_load_img_as_tensor` and `load_video_frames`.
    """
    shades = torch.from_numpy(np.arange(256) / 255.0).float()[:, None]
    normalised = (shades - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    return np.asarray(normalised.numpy()[None])


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return what SAM 2 computes in: bfloat16 on CUDA, as its own examples; float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@contextmanager
def inference(device: torch.device) -> Iterator[None]:
    """Compute without gradients, in the type for the device."""
    dtype = compute_dtype(device)
    reduced = dtype != torch.float32
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=reduced):
        yield


def fill_holes(logits: torch.Tensor, max_area: int) -> torch.Tensor:
    """Make small holes of a mask foreground.

    Args:
        logits: Mask scores `(B, 1, h, w)`; holes are 8-connected regions at or below zero.
        max_area: Largest hole to fill, in pixels of `logits`; 0 fills none.

    Source: `sam2/utils/misc.py`, `fill_holes_in_mask_scores`. SAM 2 needs its CUDA extension for
        it and skips it elsewhere; OpenCV finds the same regions on every machine.
    """
    if max_area <= 0:
        return logits
    holes = np.zeros(logits.shape, dtype=np.bool_)
    for hole, background in zip(holes, (logits <= 0).cpu().numpy(), strict=True):
        hole[0] = small_regions(background[0], max_area)
    if not holes.any():
        return logits
    return torch.where(torch.from_numpy(holes).to(logits.device), 0.1, logits)


def small_regions(foreground: Mask, max_area: int) -> npt.NDArray[np.bool_]:
    """Mark the 8-connected regions of a mask `(h, w)` that have at most `max_area` pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(
        foreground.view(np.uint8), connectivity=8
    )
    small = stats[:, cv2.CC_STAT_AREA] <= max_area
    small[0] = False  # label 0 is what is not foreground
    return np.asarray(small[labels])


def _layout(state: TrackState) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how far back the conditioning and past frames lie; equal ones can share a batch."""
    now = state.newest.step + 1
    return (
        tuple(now - frame.step for frame in state.conditioning),
        tuple(now - frame.step for frame in state.past),
    )


def _outputs(
    low_res_logits: torch.Tensor, out: Mapping[str, torch.Tensor], memory: torch.Tensor
) -> list[ObjectOutput]:
    scores = out["object_score_logits"].float().cpu()
    pointers = out["obj_ptr"].float().cpu()
    # Each object its own: a view would keep the whole batch alive.
    memories = [one.clone() for one in memory.to(torch.bfloat16)]
    return [
        ObjectOutput(
            low_res_logits[index : index + 1], float(scores[index]), pointer, memories[index]
        )
        for index, pointer in enumerate(pointers)
    ]
