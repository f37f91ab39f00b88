"""Write SAM 2 checkpoints for the real configs with seeded random weights that react to memory.

With plain random weights a frame's scores hardly depend on the memory bank. Scaled as here they do,
so that small numerical differences show in the masks. The masks themselves mean nothing.
"""

from __future__ import annotations

from pathlib import Path

import sam2
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam2.modeling.sam2_base import SAM2Base


def write_checkpoint(config_name: str, path: Path, *, seed: int = 0) -> Path:
    """Write `{"model": state_dict}` for one of sam2's configs and return its path.

    Args:
        config_name: As in `configs/sam2.1/sam2.1_hiera_t.yaml`.
        path: The file to write.
        seed: Of the weights.
    """
    torch.manual_seed(seed)
    config = OmegaConf.load(Path(sam2.__path__[0]) / config_name)
    model = instantiate(config.model, _recursive_=True)
    make_sensitive(model)
    torch.save({"model": model.state_dict()}, path)
    return path


def make_sensitive(model: SAM2Base) -> None:
    """Scale random initial weights so that scores react to what the model remembers."""
    with torch.no_grad():
        decoder = model.sam_mask_decoder
        for hypernetwork in decoder.output_hypernetworks_mlps:
            _scale(hypernetwork.layers[-1], 30)
        _scale(decoder.iou_prediction_head.layers[-1], 10)
        for layer in model.memory_attention.layers:
            attention = layer.cross_attn_image
            _scale(attention.out_proj, 6)
            _scale(attention.q_proj, 3)
            _scale(attention.k_proj, 3)
        for parameter in (model.maskmem_tpos_enc, model.no_obj_embed_spatial, model.no_obj_ptr):
            parameter.mul_(25)
        _scale(model.memory_encoder.mask_downsampler.encoder[-1], 10)
        for layer in model.memory_encoder.fuser.layers:
            layer.gamma.fill_(0.5)
        decoder.pred_obj_score_head.layers[-1].bias.add_(1)


def _scale(layer: torch.nn.Module, factor: float) -> None:
    for parameter in layer.parameters():
        parameter.mul_(factor)
