"""Train the bundled model on synthetic clips, on a CPU or a GPU.

    python -m micro_training.train
    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -m micro_training.train

On a CPU, several processes of one thread each are faster than one process of many threads. Each
draws its own batches.
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, distributed
from tqdm import tqdm

from micro_training.batches import BatchStream, Phase, find_phase, load_batches
from micro_training.losses import Losses, compute_losses
from micro_training.model import CHECKPOINT, build_model, write_checkpoint
from micro_training.unroll import PromptKind, Unroller

# The initial weights already copy masks, so training starts with clips. They become longer, so
# that short memory is learned cheaply before long memory. Boxes and clicks are learned on the
# first frames.
PHASES = (
    Phase(share=0.57, frames=3, burn_in=0, clips=2, mask_prompts=0.7),
    Phase(share=0.17, frames=8, burn_in=3, clips=2, mask_prompts=0.7),
    Phase(share=0.26, frames=12, burn_in=7, clips=2, mask_prompts=0.7),
)
OBJECTS = 3
PEAK_LEARNING_RATE = 1e-3
LAST_LEARNING_RATE = 2e-5
WARM_UP_STEPS = 40
EMA_DECAY = 0.99
# Masks are compared at half the image's side; logits have a quarter of it, the truth all of it.
LOSS_SIDE = 128
SAVE_EVERY_STEPS = 50
LOG_EVERY_STEPS = 10


def learning_rate(step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine."""
    if step < WARM_UP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    swing = 0.5 * (1 + math.cos(math.pi * progress))
    return LAST_LEARNING_RATE + (PEAK_LEARNING_RATE - LAST_LEARNING_RATE) * swing


def draw_prompting(rng: np.random.Generator, phase: Phase) -> tuple[PromptKind, int, int]:
    """Draw how the first frame is prompted: kind, correction clicks, skipped frames after it."""
    kind: PromptKind = "mask"
    if rng.random() >= phase.mask_prompts:
        kind = "box" if rng.random() < 0.5 else "click"
    corrections = min(7, int(rng.geometric(0.6)) - 1)
    # A gap teaches that the prompted frame may be long ago.
    gap = int(rng.integers(1, 40)) if rng.random() < 0.4 else 0
    return kind, corrections, gap


class Trainer:
    """One training run: model, optimiser and moving average of the weights, saved to a folder."""

    def __init__(self, *, steps: int, run: Path, device: torch.device) -> None:
        """Start a run, or resume the one saved in `run`; all processes start equal."""
        self.step = 0
        self._steps = steps
        self._run = run
        torch.manual_seed(0)
        self.model = build_model().to(device)
        self._unroller = Unroller(self.model)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.02
        )
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        if self._state_path.exists():
            self._load(torch.load(self._state_path, map_location=device, weights_only=True))

    @property
    def _state_path(self) -> Path:
        return self._run / "state.pt"

    def train_step(self, batch: Any) -> Losses:  # noqa: ANN401
        """Take one optimiser step."""
        # Equal in all processes, so that none waits long for the others.
        rng = np.random.default_rng([self.step, 5])
        phase = find_phase(PHASES, self.step / self._steps)
        kind, corrections, gap = draw_prompting(rng, phase)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self._steps)
        predictions = self._unroller(batch, kind, corrections, gap, phase.burn_in, rng)
        losses = compute_losses(predictions, batch.masks.to(self.model.device), LOSS_SIDE)
        self._optimizer.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]  # torch ships none
        self._share_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self.step += 1
        self._update_average()
        return losses

    def save(self) -> None:
        """Save the run so that a later call resumes it; never leaves a half-written file."""
        self._run.mkdir(parents=True, exist_ok=True)
        draft = self._state_path.with_suffix(".draft")
        torch.save(
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "average": self.average,
                "optimizer": self._optimizer.state_dict(),
            },
            draft,
        )
        draft.replace(self._state_path)

    def _load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self._optimizer.load_state_dict(state["optimizer"])

    def _share_gradients(self) -> None:
        """Average the gradients of all processes; a missing gradient counts as zeros."""
        if not distributed.is_initialized():
            return
        parameters = list(self.model.parameters())
        flat = torch.cat(
            [
                (torch.zeros_like(value) if value.grad is None else value.grad).flatten()
                for value in parameters
            ]
        )
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        begin = 0
        for value in parameters:
            value.grad = flat[begin : begin + value.numel()].view_as(value)
            begin += value.numel()

    @torch.no_grad()
    def _update_average(self) -> None:
        # Early in the run, the average forgets the initial weights faster.
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        current: dict[str, Tensor] = self.model.state_dict()
        for name, value in self.average.items():
            value.lerp_(current[name], 1 - decay)


def join_processes() -> int:
    """Join the processes that `torchrun` started, if any; return the rank of this process."""
    if not distributed.is_torchelastic_launched():
        return 0
    distributed.init_process_group("gloo")
    return distributed.get_rank()


def main() -> None:
    """Train, or resume training, and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1650)
    parser.add_argument("--folder", type=Path, default=Path("micro_training/runs/micro"))
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    # Denormal numbers are many times slower on a CPU.
    torch.set_flush_denormal(True)
    rank = join_processes()
    trainer = Trainer(
        steps=arguments.steps, run=arguments.folder, device=torch.device(arguments.device)
    )
    stream = BatchStream(
        first=trainer.step,
        steps=arguments.steps,
        phases=PHASES,
        objects=OBJECTS,
        image_size=trainer.model.image_size,
        rank=rank,
    )
    workers = max(1, (os.cpu_count() or 1) // 2)
    bar = tqdm(
        load_batches(stream, workers),
        initial=trainer.step,
        total=arguments.steps,
        disable=rank > 0,
    )
    arguments.folder.mkdir(parents=True, exist_ok=True)
    recent: list[dict[str, float]] = []
    for batch in bar:
        losses = trainer.train_step(batch)
        if rank > 0:
            continue
        recent.append({name: float(value.detach()) for name, value in vars(losses).items()})
        if trainer.step % LOG_EVERY_STEPS == 0:
            means = {name: float(np.mean([row[name] for row in recent])) for name in recent[0]}
            recent.clear()
            bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
            with (arguments.folder / "log.jsonl").open("a") as log:
                frames = batch.frames.shape[1]
                log.write(json.dumps({"step": trainer.step, "frames": frames, **means}) + "\n")
        if trainer.step % SAVE_EVERY_STEPS == 0:
            trainer.save()
    if rank == 0:
        trainer.save()
        write_checkpoint(trainer.average, arguments.out)


if __name__ == "__main__":
    main()
