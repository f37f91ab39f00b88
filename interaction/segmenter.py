"""Segment one object on single frames with SAM 2: frame to features, prompt to mask.

The masks equal those of `sam2.sam2_image_predictor.SAM2ImagePredictor` for the same frame, weights
and prompt: the same modules run in the same order on the same numbers. They differ from the video
predictor's, which resizes frames in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cachetools
import numpy as np
import torch
from PIL import Image
from sam2.sam2_video_predictor import SAM2VideoPredictor
from torch.nn import functional

from errors import SettingsError, TooLargeError
from interaction.protocol import Prompt
from mask_regions import small_regions
from model_handler import IMAGE_MEAN, IMAGE_STD, compute_dtype, inference
from model_loader import load_predictor
from settings import Settings
from shapes import Mask, SizeHW

# sam2/modeling/sam/prompt_encoder.py, _embed_points
NEGATIVE, POSITIVE, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = 0, 1, 2, 3

# Answers whose low_res_logits are cached for the next click: 256 KB each at 1024 px.
CACHED_HINTS = 64


@dataclass(frozen=True, eq=False)
class Segment:
    """The mask of a prompt.

    Attributes:
        mask: `(H, W)`, at the frame's size.
        confidence: SAM 2's predicted IoU of the mask with the object, 0 to 1.
        encoded: Whether the frame had to be encoded.
        refined: Whether an earlier answer's scores were refined.
    """

    mask: Mask
    confidence: float
    encoded: bool
    refined: bool


class Segmenter:
    """A SAM 2 model on one device, with caches of recent frames and answers.

    Args:
        model: In evaluation mode, on its device.
        fingerprint: Names the model's weights and config.
        cached_frames: Number of encoded frames to cache on the device.
        hole_area: Largest hole to fill, in pixels of the low-resolution mask; 0 fills none.
        island_area: Largest island to remove, in the same pixels; 0 removes none.
    """

    def __init__(
        self,
        model: SAM2VideoPredictor,
        *,
        fingerprint: str,
        cached_frames: int,
        hole_area: int,
        island_area: int,
    ) -> None:
        self._model = model
        self._device: torch.device = model.device
        self._fingerprint = fingerprint
        self._hole_area = hole_area
        self._island_area = island_area
        self._frames: cachetools.LRUCache[str, _Features] = cachetools.LRUCache(cached_frames)
        self._hints: cachetools.LRUCache[tuple[str, Prompt], torch.Tensor] = cachetools.LRUCache(
            CACHED_HINTS
        )

    def describe(self) -> dict[str, str]:
        """Return what the model is and runs on, for the log."""
        return {
            "model": self._fingerprint,
            "device": str(self._device),
            "dtype": str(compute_dtype(self._device)),
            "image_size": str(self._model.image_size),
        }

    def segment(self, key: str, image: Callable[[], Image.Image], prompt: Prompt) -> Segment:
        """Segment the object of a prompt.

        If this replica has answered the same prompt with fewer clicks, SAM 2 refines that answer,
        as it is trained to. Other replicas answer from the prompt alone.

        Args:
            key: Names the frame's content; a cached frame is not encoded again.
            image: Returns the RGB frame; called only when needed.
            prompt: At least a box or a positive point.

        Raises:
            TooLargeError: The frame does not fit into the device's memory.
        """
        for _ in range(2):
            try:
                return self._segment(key, image, prompt)
            except torch.OutOfMemoryError:
                pass
            # Here, unlike in the except block, no traceback holds the attempt's tensors.
            self._frames.clear()
            self._hints.clear()
            torch.cuda.empty_cache()
        raise TooLargeError(
            f"{self._device} has too little memory for this frame: set a smaller SAM2_IMAGE_SIZE "
            "or SAM2_FEATURE_CACHE_FRAMES, or use a GPU with more memory"
        )

    def _segment(self, key: str, image: Callable[[], Image.Image], prompt: Prompt) -> Segment:
        features = self._frames.get(key)
        encoded = features is None
        if features is None:
            features = self._frames[key] = self._encode(image())
        hint = self._hint(key, prompt)
        with inference(self._device):
            low_res_logits, confidence = self._decode(features, prompt, hint)
            # SAM2ImagePredictor.predict clamps the logits that it returns for the next call
            self._hints[key, prompt] = low_res_logits.clamp(-32, 32).float()
            logits = functional.interpolate(
                self._tidy(low_res_logits.float()),
                features.size_hw,
                mode="bilinear",
                align_corners=False,
            )
            mask: Mask = (logits[0, 0] > 0).cpu().numpy()
        return Segment(mask, confidence, encoded, hint is not None)

    def _encode(self, image: Image.Image) -> _Features:
        """Encode an RGB frame.

        As in the source, the frame is resized on the CPU, so that a GPU gets the same numbers.

        Source: `SAM2ImagePredictor.set_image`, `SAM2Transforms` and torchvision's parts of it.
        """
        side = self._model.image_size
        with inference(self._device):
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous()
            pixels = functional.interpolate(
                pixels.float().div_(255),
                (side, side),
                mode="bilinear",
                align_corners=False,
                antialias=True,
            )
            pixels -= torch.tensor(IMAGE_MEAN).view(3, 1, 1)
            pixels /= torch.tensor(IMAGE_STD).view(3, 1, 1)
            encoded = self._model.forward_image(pixels.to(self._device))
            _, levels, _, sizes = self._model._prepare_backbone_features(encoded)  # noqa: SLF001  # as the predictor does
            if self._model.directly_add_no_mem_embed:
                levels[-1] = levels[-1] + self._model.no_mem_embed
        maps = [
            level.permute(1, 2, 0).view(1, -1, *size)
            for level, size in zip(levels, sizes, strict=True)
        ]
        return _Features((image.height, image.width), maps[-1], maps[:-1])

    def _hint(self, key: str, prompt: Prompt) -> torch.Tensor | None:
        """Return the logits of the longest earlier prompt that this prompt continues, or None."""
        earlier = [
            old_prompt
            for frame, old_prompt in self._hints
            if frame == key and prompt.continues(old_prompt)
        ]
        return self._hints[key, max(earlier, key=len)] if earlier else None

    def _decode(
        self, features: _Features, prompt: Prompt, hint: torch.Tensor | None
    ) -> tuple[torch.Tensor, float]:
        """Return the low_res_logits of one mask, `(1, 1, S/4, S/4)`, and its predicted IoU.

        A single click is ambiguous (the sleeve or the shirt?): SAM 2 then proposes three masks, and
        the mask with the highest predicted IoU is returned.

        Source: `SAM2ImagePredictor._prep_prompts` and `_predict`.
        """
        ambiguous = prompt.box is None and len(prompt) == 1
        encoder = self._model.sam_prompt_encoder
        sparse, dense = encoder(points=self._points(features, prompt), boxes=None, masks=hint)
        logits, ious, _, _ = self._model.sam_mask_decoder(
            image_embeddings=features.embedding,
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=ambiguous,
            repeat_image=False,
            high_res_features=features.high_res,
        )
        best = int(ious[0].argmax())
        return logits[:, best : best + 1], min(1.0, max(0.0, float(ious[0, best])))

    def _points(self, features: _Features, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
        """Return points in pixels of the model's input, `(1, N, 2)`, and their labels, `(1, N)`."""
        corners = [] if prompt.box is None else [prompt.box[:2], prompt.box[2:]]
        labels = [] if prompt.box is None else [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]
        labels += [POSITIVE] * len(prompt.positive) + [NEGATIVE] * len(prompt.negative)
        height, width = features.size_hw
        coords = torch.tensor([[*corners, *prompt.positive, *prompt.negative]], device=self._device)
        coords[..., 0] /= width
        coords[..., 1] /= height
        coords *= self._model.image_size
        return coords, torch.tensor([labels], dtype=torch.int, device=self._device)

    def _tidy(self, logits: torch.Tensor) -> torch.Tensor:
        """Fill small holes and remove small islands, unless no other foreground would be left.

        Source: `SAM2Transforms.postprocess_masks`, which needs SAM 2's CUDA extension and does
            nothing without it. It also removes objects that consist of small islands only.
        """
        if not (self._hole_area or self._island_area):
            return logits
        foreground = (logits[0, 0] > 0).cpu().numpy()
        holes = small_regions(~foreground, self._hole_area)
        islands = small_regions(foreground, self._island_area)
        if not (foreground & ~islands).any():
            islands[:] = False
        tidied = logits.masked_fill(torch.from_numpy(holes).to(logits.device), 10.0)
        return tidied.masked_fill(torch.from_numpy(islands).to(logits.device), -10.0)


def build_segmenter(settings: Settings) -> Segmenter:
    """Load the model that the settings name, and warm it up for a click and a box.

    Raises:
        SettingsError: See `model_loader.load_predictor`; or a frame does not fit into the memory of
            the device.
    """
    model, fingerprint = load_predictor(settings)
    segmenter = Segmenter(
        model,
        fingerprint=fingerprint,
        cached_frames=settings.feature_cache_frames,
        hole_area=settings.interactor.hole_area,
        island_area=settings.interactor.island_area,
    )
    blank = Image.new("RGB", (64, 64))
    try:
        segmenter.segment("warm-up", lambda: blank, Prompt(positive=((32.0, 32.0),)))
        segmenter.segment("warm-up", lambda: blank, Prompt(box=(16.0, 16.0, 48.0, 48.0)))
    except TooLargeError as err:
        raise SettingsError(f"SAM2_DEVICE={settings.device!r}: {err}") from err
    return segmenter


@dataclass(frozen=True, eq=False)
class _Features:
    """One encoded frame.

    Attributes:
        size_hw: Height and width of the frame itself.
        embedding: The coarsest level, `(1, C, S/16, S/16)`.
        high_res: The finer levels from fine to coarse, each `(1, C, h, w)`.
    """

    size_hw: SizeHW
    embedding: torch.Tensor
    high_res: list[torch.Tensor]
