"""Draw training batches: synthetic clips and the objects to track in them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from micro_training.clips import TRAINING_SEEDS, Clip, Script, make_clip

# Objects that cover a smaller share of the first frame are not prompted.
_MIN_START_SHARE = 0.0025
_RENDER_SIZES_HW = ((288, 512), (216, 384), (360, 640), (320, 320), (300, 400))


@dataclass(frozen=True, eq=False)
class Batch:
    """Clips with their objects.

    `frames` is `(C, T, S, S, 3)` uint8 RGB, `masks` is `(C * O, T, S, S)` bool, the visible part of
    each object; the objects of a clip are consecutive.
    """

    frames: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Phase:
    """A part of a training run: its share of the steps, and the length and number of clips.

    `burn_in` is the number of frames after the first that are tracked without gradients, so that
    later frames learn from an old memory at little cost. `mask_prompts` is the share of batches
    prompted by masks; the others are prompted by boxes or clicks.
    """

    share: float
    frames: int
    burn_in: int
    clips: int
    mask_prompts: float


def find_phase(phases: tuple[Phase, ...], progress: float) -> Phase:
    """Return the phase at a share of the run's steps, 0..1."""
    for phase in phases:
        progress -= phase.share
        if progress < 0:
            return phase
    return phases[-1]


class BatchStream(IterableDataset[Batch]):
    """Batches from number `first` on; a batch depends only on its number and the rank."""

    def __init__(
        self,
        *,
        first: int,
        steps: int,
        phases: tuple[Phase, ...],
        objects: int,
        image_size: int,
        rank: int = 0,
    ) -> None:
        """Create a stream.

        Args:
            first: Number of the first batch (to resume).
            steps: Number of batches in the whole run.
            phases: The parts of the run, in order; their shares sum to 1.
            objects: Objects to track in each clip, O.
            image_size: Side of the frames in pixels, S.
            rank: Index of this process in distributed training; each draws its own batches.
        """
        self._rank = rank
        self._first = first
        self._steps = steps
        self._phases = phases
        self._objects = objects
        self._image_size = image_size

    def __iter__(self) -> Iterator[Batch]:
        """Yield this worker's share of the batches, in order."""
        worker = torch.utils.data.get_worker_info()
        offset, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(self._first + offset, self._steps, step):
            yield self._make(number)

    def _make(self, number: int) -> Batch:
        rng = np.random.default_rng([number, self._rank, 4])
        frames: list[Tensor] = []
        masks: list[Tensor] = []
        phase = find_phase(self._phases, number / self._steps)
        while len(frames) < phase.clips:
            clip = self._draw_clip(rng, phase.frames)
            bodies = _choose_bodies(clip, self._objects, rng)
            if bodies is not None:
                frames.append(torch.from_numpy(clip.frames))
                masks += [torch.from_numpy(clip.labels == body + 1) for body in bodies]
        return Batch(torch.stack(frames), torch.stack(masks))

    def _draw_clip(self, rng: np.random.Generator, frames: int) -> Clip:
        """Draw a clip, half of the time backwards."""
        clip = make_clip(
            int(rng.integers(len(TRAINING_SEEDS))),
            frames=frames,
            size_hw=(self._image_size, self._image_size),
            render_hw=_RENDER_SIZES_HW[int(rng.integers(len(_RENDER_SIZES_HW)))],
            stride=rng.uniform(0.7, 3.0),
            script=Script(hidden=(1, max(1.5, 0.7 * frames))),
        )
        if rng.random() < 0.5:
            return clip
        # A copy, because torch accepts no negative strides.
        return Clip(clip.frames[::-1].copy(), clip.labels[::-1].copy(), clip.roles, clip.target)


def _choose_bodies(clip: Clip, count: int, rng: np.random.Generator) -> list[int] | None:
    """Choose visible bodies of the first frame: target, then look-alikes, then others."""
    areas = np.bincount(clip.labels[0].ravel(), minlength=len(clip.roles) + 1)[1:]
    visible = [
        body
        for body in rng.permutation(len(clip.roles))
        if areas[body] >= _MIN_START_SHARE * clip.labels[0].size
    ]
    if len(visible) < count:
        return None
    target = [body for body in visible if body == clip.target]
    lookalikes = [body for body in visible if clip.roles[body] == "lookalike"]
    others = [body for body in visible if body not in target and body not in lookalikes]
    return [int(body) for body in (target + lookalikes + others)[:count]]


def load_batches(stream: BatchStream, workers: int) -> DataLoader[Batch]:
    """Load the batches of a stream in worker processes."""
    return DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=2)
