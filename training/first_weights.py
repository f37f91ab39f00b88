"""First weights that know where things are; left to chance, a short training never finds out.

With PyTorch's own first weights, attention looks everywhere alike: following a mask took hundreds
of steps to begin, and a mask from a box or a click did not begin at all in the time we give.
"""

import numpy as np
import torch
from sam2.modeling.sam.transformer import Attention
from sam2.modeling.sam2_base import SAM2Base

# strengths of the first attention to the same place: some mass is left for other places
_ROTARY_BIAS = 3.0
_NEARBY_GAIN = 3.0
_SIDE_GAIN = 2.0
# Waves per half image of the position code, for each axis; SAM draws them from a normal
# distribution. Below 0.25 a wave rises all the way, so that it tells left from right.
_WAVES = np.geomspace(0.125, 2.0, 17)[:16]
_SLOWEST, _SLOW, _MEDIUM = 0, 4, 8
_HEAD_SIZE = 4


def set_first_weights(model: SAM2Base) -> None:
    """Overwrite some of a new model's random weights, in place.

    Between frames, equal constant queries and keys leave only the rotary position code, which is
    largest where both places agree. Between prompts and image, some heads start as kernels: the
    product of two position codes is largest at the same place, or, a quarter of a wave shifted,
    tells on which side of a prompt's point a pixel lies.
    """
    # start from "visible": an object that is thought absent leaves no memory to learn from
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 2.0)
    for layer in model.memory_attention.layers:
        for attention in (layer.self_attn, layer.cross_attn_image):
            for projection in (attention.q_proj, attention.k_proj):
                torch.nn.init.constant_(projection.bias, _ROTARY_BIAS)
    prompts = model.sam_prompt_encoder
    none = np.zeros_like(_WAVES)
    waves = np.stack([np.concatenate([_WAVES, none]), np.concatenate([none, _WAVES])])
    code = prompts.pe_layer.positional_encoding_gaussian_matrix
    code.copy_(torch.from_numpy(waves).to(code))
    with torch.no_grad():
        # these are added to the position code and must not drown it
        for embedding in (*prompts.point_embeddings, prompts.no_mask_embed):
            embedding.weight.mul_(0.3)
        transformer = model.sam_mask_decoder.transformer
        _look_nearby(transformer.final_attn_token_to_image, range(4))
        for layer in transformer.layers:
            _look_nearby(layer.cross_attn_token_to_image, range(4))
            _look_nearby(layer.cross_attn_image_to_token, range(4, 6))
            _look_aside(layer.cross_attn_image_to_token)


def _look_nearby(attention: Attention, heads: range) -> None:
    """Make heads attend to where the query's position code is the key's."""
    for head in heads:
        for axis in range(2):
            row, wave = head * _HEAD_SIZE + 2 * axis, axis * len(_WAVES) + _MEDIUM
            for offset in range(2):
                # the code holds all sines, then all cosines
                column = wave + offset * 2 * len(_WAVES)
                _set_pair(attention, row + offset, column, column, _NEARBY_GAIN, 1.0)


def _look_aside(attention: Attention) -> None:
    """Make heads 0 to 3 attend to points to the left, right, above and below of the query."""
    cosines = 2 * len(_WAVES)
    for head in range(4):
        axis, sign = head // 2, (1.0, -1.0)[head % 2]
        for part, speed in enumerate((_SLOWEST, _SLOW)):
            row, sine = head * _HEAD_SIZE + 2 * part, axis * len(_WAVES) + speed
            # sin(q - k) = sin q cos k - cos q sin k
            _set_pair(attention, row, sine, sine + cosines, _SIDE_GAIN, sign)
            _set_pair(attention, row + 1, sine + cosines, sine, _SIDE_GAIN, -sign)


def _set_pair(
    attention: Attention, row: int, query_column: int, key_column: int, gain: float, sign: float
) -> None:
    for projection, column, value in (
        (attention.q_proj, query_column, gain),
        (attention.k_proj, key_column, sign * gain),
    ):
        projection.weight[row].zero_()
        projection.bias[row].zero_()
        projection.weight[row, column] = value
