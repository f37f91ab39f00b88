"""Build the bundled model from its config, and write its checkpoint."""

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from micro_training.first_weights import set_first_weights

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "micro"
CONFIG, CHECKPOINT = WEIGHTS / "config.yaml", WEIGHTS / "checkpoint.pt"


def build_model() -> SAM2Base:
    """Build the model with the initial weights for training."""
    model = instantiate(OmegaConf.load(CONFIG).model, _recursive_=True)
    assert isinstance(model, SAM2Base)
    set_first_weights(model)
    return model


def write_checkpoint(weights: dict[str, Tensor], path: Path) -> None:
    """Write weights in half precision, in SAM 2's checkpoint format."""
    half = {
        name: value.detach().cpu().to(torch.float16 if value.is_floating_point() else value.dtype)
        for name, value in weights.items()
    }
    torch.save({"model": half}, path)
