"""Run SAM 2: frame to features, prompt to mask and memory, memories to the next mask.

The masks equal those of `sam2.sam2_video_predictor.SAM2VideoPredictor` on the same frames, weights
and prompts, with its filling of small holes as on CUDA (a plain install of SAM 2 on a CPU skips
that step). The same modules are called in the same order on the same numbers. The predictor keeps
everything in one growing session; here a state and its memories are small immutable values that
the caller passes in and gets back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import cachetools
import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sam2.sam2_video_predictor import SAM2VideoPredictor
from torch.nn import functional

from mask_regions import fill_holes
from shapes import Box, Mask, SizeHW
from track_state import MEMORY_REACH, TrackState

# sam2/utils/misc.py, load_video_frames
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

# Share of a pixel from which it belongs to a mask prompt (sam2_video_predictor.py, add_new_mask).
MIN_COVERAGE = 0.5

# The length of a stream is unknown. From 16 frames up SAM 2 uses it only as an upper bound of frame
# numbers (sam2_base.py, max_obj_ptrs_in_encoder): any number above all videos' lengths is right.
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
    """SAM 2's output for one object on one frame.

    Attributes:
        low_res_logits: Mask scores before thresholding, small holes filled, `(1, 1, S/4, S/4)`.
        object_score: Object score logit, above 0 if the object is visible.
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
        fingerprint: Identifies model, weights and input size; states of another are refused.
        batch_objects: Most objects per forward pass. One at a time is bit-exact; a batch is the
            same formulas with different rounding.
        feature_cache_frames: Encoded frames to keep on the device.
        compiled: Whether the network is compiled, which it is for each size of a batch: then the
            sizes are powers of two.

    Attributes:
        batch_objects: As given; less after a batch did not fit into the device's memory.
    """

    def __init__(
        self,
        model: SAM2VideoPredictor,
        *,
        fingerprint: str,
        batch_objects: int,
        feature_cache_frames: int,
        compiled: bool = False,
    ) -> None:
        self.fingerprint = fingerprint
        self.batch_objects = batch_objects
        self.compiled = compiled
        self.device: torch.device = model.device
        self.image_size: int = model.image_size
        self.obj_ptr_size: int = model.hidden_dim
        side = model.sam_image_embedding_size
        self.memory_shape: tuple[int, int, int] = (model.mem_dim, side, side)
        self._model = model
        self._features: cachetools.LRUCache[str, FrameFeatures] = cachetools.LRUCache(
            feature_cache_frames
        )
        self._normalised_values = _normalised_values()
        with inference(self.device):
            blank = torch.zeros(1, *self.memory_shape, dtype=self.dtype, device=self.device)
            position = model.memory_encoder.position_encoding(blank)
            self._memory_position: torch.Tensor = position.to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Type the network computes in, see `compute_dtype`."""
        return compute_dtype(self.device)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Return the model's input for an RGB frame: `(3, S, S)`, float32, on the CPU.

        Source: `sam2/utils/misc.py`, `_load_img_as_tensor` and `load_video_frames`.
        """
        resized = np.asarray(image.resize((self.image_size, self.image_size)))
        return torch.from_numpy(cv2.LUT(resized, self._normalised_values)).permute(2, 0, 1)

    def encode_frame(
        self, key: str, size_hw: SizeHW, pixels: Callable[[], torch.Tensor]
    ) -> FrameFeatures:
        """Return a frame's features, from the cache if they are there.

        Args:
            key: Identifies the frame's content.
            size_hw: Height and width of the frame itself.
            pixels: Returns the model's input, see `pixels`; called only if it has to be encoded.
        """
        features = self._features.get(key)
        if features is None:
            features = self._features[key] = self._encode(size_hw, pixels())
        return features

    def mask_prompt(self, mask: Mask) -> torch.Tensor:
        """Return a mask `(H, W)` at the size the model takes it, `(1, 1, S, S)`, bool.

        Of a thin or tiny mask no pixel may be left.

        Source: `SAM2VideoPredictor.add_new_mask`.
        """
        return self.mask_coverage(mask) >= MIN_COVERAGE

    def mask_coverage(self, mask: Mask) -> torch.Tensor:
        """Return how much of each pixel of the model's input is in a mask `(H, W)`.

        Returns:
            Shares, `(1, 1, S, S)`, float32.
        """
        size = (self.image_size, self.image_size)
        coverage = torch.from_numpy(mask)[None, None].float().to(self.device)
        if coverage.shape[-2:] != size:
            coverage = functional.interpolate(
                coverage, size, mode="bilinear", align_corners=False, antialias=True
            )
        return coverage

    def start_from_mask(self, frame: FrameFeatures, prompt: torch.Tensor) -> ObjectOutput:
        """Start an object from a mask on the frame, as `mask_prompt` returned it."""
        return self._start(frame, mask_inputs=prompt.float(), point_inputs=None)

    def start_from_box(self, frame: FrameFeatures, box: Box) -> ObjectOutput:
        """Start an object from a box XYXY in the frame's pixels, far edge excluded.

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
        free_memory: Callable[[], None] = lambda: None,
    ) -> list[ObjectOutput]:
        """Track objects to the next frame.

        A batch that does not fit into the device's memory is halved; later ones are no larger.

        Args:
            frame: The next frame.
            states: One per object, of any ages.
            memories: Memory features by id, on the device, for all `memory_ids` of the states.
            before_batch: Called before each forward pass; may raise to stop.
            free_memory: Called before a smaller batch is tried.

        Returns:
            One output per state, in order.

        Raises:
            torch.OutOfMemoryError: One object alone does not fit.
        """
        outputs: dict[int, ObjectOutput] = {}
        by_layout = sorted(range(len(states)), key=lambda index: _layout(states[index]))
        for _, group in groupby(by_layout, key=lambda index: _layout(states[index])):
            indices = list(group)
            while indices:
                before_batch()
                batch = indices[: self._batch_size(len(indices))]
                stepped = self._try_batch(frame, [states[index] for index in batch], memories)
                if stepped is None:
                    self.batch_objects = len(batch) // 2
                    free_memory()
                else:
                    outputs.update(zip(batch, stepped, strict=True))
                    indices = indices[len(batch) :]
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

    def free_memory(self) -> None:
        """Forget all encoded frames, and give unused memory of the device back to its driver."""
        self._features.clear()
        torch.cuda.empty_cache()  # does nothing where CUDA is not in use

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
            # `propagate_in_video_preflight` encodes the memory of a prompted frame again, from the
            # low_res_logits of all objects together.
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

    def _batch_size(self, count: int) -> int:
        """Return how many of `count` objects the next batch takes."""
        size = min(count, self.batch_objects)
        return 1 << (size.bit_length() - 1) if self.compiled else size

    def _try_batch(
        self,
        frame: FrameFeatures,
        states: Sequence[TrackState],
        memories: Mapping[str, torch.Tensor],
    ) -> list[ObjectOutput] | None:
        """Step objects of one layout; return None if several do not fit into the memory."""
        try:
            return self._step_batch(frame, states, memories)
        except torch.OutOfMemoryError:
            if len(states) == 1:
                raise
        # Here, unlike in the except block, no traceback holds the tensors of the failed pass.
        return None

    def _step_batch(
        self,
        frame: FrameFeatures,
        states: Sequence[TrackState],
        memories: Mapping[str, torch.Tensor],
    ) -> list[ObjectOutput]:
        """Step objects of one layout in one forward pass, with the first one's frame numbers."""
        with inference(self.device):
            first = states[0]
            entries = [state.conditioning + state.past for state in states]
            first_in_reach = len(first.conditioning) + max(0, len(first.past) - MEMORY_REACH)
            frame_outputs: list[dict[str, Any]] = []  # in the predictor's terms
            for index, past_frames in enumerate(zip(*entries, strict=True)):
                pointers = torch.stack([past_frame.obj_ptr for past_frame in past_frames])
                outputs: dict[str, Any] = {"obj_ptr": pointers.to(self.device)}
                if index < len(first.conditioning) or index >= first_in_reach:
                    features = torch.stack([memories[past_frame.id] for past_frame in past_frames])
                    position = self._memory_position.expand(len(states), -1, -1, -1)
                    outputs |= {"maskmem_features": features, "maskmem_pos_enc": [position]}
                frame_outputs.append(outputs)
            by_step = [
                (entry.step, outputs)
                for entry, outputs in zip(entries[0], frame_outputs, strict=True)
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
        """Return one frame's features as inputs for `count` objects, without copying them.

        Source: `SAM2VideoPredictor._get_image_feature`, `SAM2Base._prepare_backbone_features`.
        """

        def flat(maps: torch.Tensor) -> torch.Tensor:  # (1, C, h, w) -> (h * w, count, C)
            return maps.expand(count, -1, -1, -1).flatten(2).permute(2, 0, 1)

        return {
            "current_vision_feats": [flat(maps) for maps in frame.feature_maps],
            "current_vision_pos_embeds": [flat(frame.position_encoding)],
            "feat_sizes": [(maps.shape[-2], maps.shape[-1]) for maps in frame.feature_maps],
        }


def _normalised_values() -> npt.NDArray[np.float32]:
    """Return the model's input for each pixel value 0...255 of each channel, `(1, 256, 3)`.

    Source: `sam2/utils/misc.py`, `_load_img_as_tensor` and `load_video_frames`, equal to the bit.
    """
    values = torch.from_numpy(np.arange(256) / 255.0).float()[:, None]
    normalised = (values - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    return np.asarray(normalised.numpy()[None])


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return SAM 2's computing type: bfloat16 on CUDA, as in its own examples; float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@contextmanager
def inference(device: torch.device) -> Iterator[None]:
    """Compute without gradients, in the device's `compute_dtype`."""
    dtype = compute_dtype(device)
    reduced = dtype != torch.float32
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=reduced):
        yield


def _layout(state: TrackState) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the distances to all remembered frames; if they are equal, objects share a batch."""
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
    memory = memory.to(torch.bfloat16)
    return [
        ObjectOutput(
            low_res_logits[index : index + 1],
            float(scores[index]),
            pointer,
            memory[index].clone(),  # a view would keep the whole batch's memory allocated
        )
        for index, pointer in enumerate(pointers)
    ]
