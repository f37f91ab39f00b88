"""Owns SAM 2 on single pictures: frame -> features, prompt -> mask; knows no JSON and no tracks.

The masks equal those of `sam2.sam2_image_predictor.SAM2ImagePredictor` for the same frame, weights
and prompt: the same modules are called in the same order on the same numbers. They are not those
of the video predictor, which shrinks frames in another way.
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

from interaction.protocol import Prompt
from mask_regions import small_regions
from model_handler import IMAGE_MEAN, IMAGE_STD, inference
from settings import Settings
from shapes import Mask, SizeHW

# sam2/modeling/sam/prompt_encoder.py, _embed_points
NEGATIVE, POSITIVE, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = 0, 1, 2, 3

# Answers whose scores are kept for the next click: 256 KB each at 1024 px.
HINTS_KEPT = 64


@dataclass(frozen=True, eq=False)
class Segment:
    """What SAM 2 takes for the object.

    Attributes:
        mask: `(H, W)`, at the frame's size.
        confidence: SAM 2's guess of the mask's IoU with the truth, 0 to 1.
        encoded: Whether the frame had to be encoded.
        refined: Whether an earlier answer was refined.
    """

    mask: Mask
    confidence: float
    encoded: bool
    refined: bool


class Segmenter:
    """A SAM 2 model on one device, with the frames and answers it saw last.

    Args:
        model: In evaluation mode, on its device.
        frames_kept: Encoded frames to keep on the device.
        hole_area: Largest hole to fill, in pixels of the low-resolution mask; 0 fills none.
        island_area: Largest island to remove, likewise.
    """

    def __init__(
        self, model: SAM2VideoPredictor, *, frames_kept: int, hole_area: int, island_area: int
    ) -> None:
        self._model = model
        self._device: torch.device = model.device
        self._hole_area = hole_area
        self._island_area = island_area
        self._frames: cachetools.LRUCache[str, _Features] = cachetools.LRUCache(frames_kept)
        self._hints: cachetools.LRUCache[tuple[str, Prompt], torch.Tensor] = cachetools.LRUCache(
            HINTS_KEPT
        )

    def segment(self, key: str, image: Callable[[], Image.Image], prompt: Prompt) -> Segment:
        """Find the object of a prompt.

        Where this replica answered the same prompt with fewer clicks, SAM 2 refines that answer,
        as it is trained to. Another replica answers from the prompt alone.

        Args:
            key: Names the frame's content; a known frame is not encoded again.
            image: Gives the RGB frame; called only when needed.
            prompt: At least a box or a positive point.
        """
        features = self._frames.get(key)
        encoded = features is None
        if features is None:
            features = self._frames[key] = self._encode(image())
        hint = self._hint(key, prompt)
        with inference(self._device):
            low_res_logits, confidence = self._decode(features, prompt, hint)
            # SAM2ImagePredictor.predict clamps what it hands out to be fed back
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
        """Source: `SAM2ImagePredictor.set_image`, `SAM2Transforms` and torchvision's parts of it.

        The frame is shrunk on the CPU, as there, so that a GPU sees the same numbers.
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
        """Return the scores of the longest prompt on the frame that this one continues."""
        earlier = [one for frame, one in self._hints if frame == key and prompt.continues(one)]
        return self._hints[key, max(earlier, key=len)] if earlier else None

    def _decode(
        self, features: _Features, prompt: Prompt, hint: torch.Tensor | None
    ) -> tuple[torch.Tensor, float]:
        """Return one mask's scores, `(1, 1, S/4, S/4)`, and its predicted IoU.

        A single click leaves open what is meant, the sleeve or the shirt: then SAM 2 proposes three
        masks, and the one it expects most of is taken.

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
        """Return the points in the model's pixels, `(1, N, 2)`, and their labels, `(1, N)`."""
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
        """Fill small holes and remove small islands; an object that is one small island stays.

        Source: `SAM2Transforms.postprocess_masks`, which needs SAM 2's CUDA extension for it and
            skips it elsewhere. It also removes small objects altogether.
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


def build_segmenter(model: SAM2VideoPredictor, settings: Settings) -> Segmenter:
    """Tie a segmenter to a loaded model as the settings say, and warm it up.

    A click and a box are asked for, so that the first annotator does not pay for them.
    """
    segmenter = Segmenter(
        model,
        frames_kept=settings.feature_cache_frames,
        hole_area=settings.interactor.hole_area,
        island_area=settings.interactor.island_area,
    )
    blank = Image.new("RGB", (64, 64))
    segmenter.segment("warm-up", lambda: blank, Prompt(positive=((32.0, 32.0),)))
    segmenter.segment("warm-up", lambda: blank, Prompt(box=(16.0, 16.0, 48.0, 48.0)))
    return segmenter


@dataclass(frozen=True, eq=False)
class _Features:
    """One encoded frame.

    Attributes:
        size_hw: Height and width of the frame itself.
        embedding: The coarsest level, `(1, C, S/16, S/16)`.
        high_res: The finer ones from fine to coarse, each `(1, C, h, w)`.
    """

    size_hw: SizeHW
    embedding: torch.Tensor
    high_res: list[torch.Tensor]
