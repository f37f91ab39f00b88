"""First weights that know where things are; left to chance, a short training never finds out.

With PyTorch's own first weights, attention looks everywhere alike: following a mask took hundreds
of steps to begin, and a mask from a box or a click did not begin at all in the time we give.
"""

import numpy as np
import torch
from sam2.modeling.sam.transformer import Attention
from sam2.modeling.sam2_base import SAM2Base

from micro_training.mask_copying import CELLS, carry_masks, keep_features_clear

# strengths of the first attention to the same place: some mass is left for other places
_ROTARY_BIAS = 3.0
_NEARBY_GAIN = 3.0
_SIDE_GAIN = 5.0
# how much of a token's own content its first self-attention keeps
_SELF_GAIN = 2.0
# prompts must be heard against the image's own features
_PROMPT_GAIN = 3.0


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
    with torch.no_grad():
        columns = _set_prompt_weights(model)
    free = [i for i in range(model.hidden_dim) if i not in columns]
    carry_masks(model, free[:CELLS])


def _set_prompt_weights(model: SAM2Base) -> list[int]:
    prompts = model.sam_prompt_encoder
    code = prompts.pe_layer.positional_encoding_gaussian_matrix
    waves = _Waves(code.shape[1])
    code.copy_(torch.from_numpy(waves.matrix).to(code))
    columns = _keep_clear(model, waves)
    transformer = model.sam_mask_decoder.transformer
    # the first self-attention has no residual: where it mixes all tokens, a prompt's kind is lost
    first = transformer.layers[0].self_attn
    for projection in (first.q_proj, first.k_proj):
        torch.nn.init.eye_(projection.weight).mul_(_SELF_GAIN)
        torch.nn.init.zeros_(projection.bias)
    _look_nearby(transformer.final_attn_token_to_image, range(4), waves)
    for layer in transformer.layers:
        _look_nearby(layer.cross_attn_token_to_image, range(4), waves)
        _look_nearby(layer.cross_attn_image_to_token, range(4, 6), waves)
        _look_aside(layer.cross_attn_image_to_token, waves)
        layer.cross_attn_image_to_token.out_proj.weight.mul_(_PROMPT_GAIN)
    return columns


class _Waves:
    """The position code's waves per half image; SAM draws them from a normal distribution.

    Below 0.25 a wave rises all the way, so that it tells left from right. `matrix` is `(2, W)`.
    """

    def __init__(self, count: int) -> None:
        """Spread `count` waves over both axes."""
        self.per_axis = count // 2
        waves = np.geomspace(0.125, 2.0, self.per_axis + 1)[:-1]
        none = np.zeros_like(waves)
        self.matrix = np.stack([np.concatenate([waves, none]), np.concatenate([none, waves])])
        self.slowest, self.slow, self.medium, self.fast = (
            eighths * self.per_axis // 8 for eighths in (0, 2, 4, 7)
        )

    def sine(self, axis: int, wave: int) -> int:
        """Return the column of a sine in the code, which holds all sines, then all cosines."""
        return axis * self.per_axis + wave

    def cosine(self, axis: int, wave: int) -> int:
        """Return the column of a cosine in the code."""
        return self.sine(axis, wave) + 2 * self.per_axis


def _keep_clear(model: SAM2Base, waves: _Waves) -> list[int]:
    """Let only the position code write to the columns that the heads above read it from."""
    columns = [
        column(axis, wave)
        for column in (waves.sine, waves.cosine)
        for axis in range(2)
        for wave in (waves.slowest, waves.slow, waves.medium, waves.fast)
    ]
    prompts, decoder = model.sam_prompt_encoder, model.sam_mask_decoder
    tokens = (
        *prompts.point_embeddings,
        prompts.not_a_point_embed,
        decoder.iou_token,
        decoder.mask_tokens,
        decoder.obj_score_token,
    )
    for token in tokens:
        token.weight[:, columns] = 0
    norms = [model.memory_attention.norm]
    for layer in decoder.transformer.layers:
        norms += [layer.norm1, layer.norm2, layer.norm3, layer.norm4]
    for norm in norms:
        norm.weight[columns] = 0
    keep_features_clear(model, columns)
    return columns


def _look_nearby(attention: Attention, heads: range, waves: _Waves) -> None:
    """Make heads attend to where the query's position code is the key's."""
    size = attention.internal_dim // attention.num_heads
    for head in heads:
        places = [
            column(axis, wave)
            for axis in range(2)
            for wave in (waves.medium, waves.fast)
            for column in (waves.sine, waves.cosine)
        ]
        for offset, place in enumerate(places):
            _set_pair(attention, head * size + offset, place, place, _NEARBY_GAIN, 1.0)


def _look_aside(attention: Attention, waves: _Waves) -> None:
    """Make heads 0 to 3 attend to points to the left, right, above and below of the query."""
    size = attention.internal_dim // attention.num_heads
    for head in range(4):
        axis, sign = head // 2, (1.0, -1.0)[head % 2]
        for part, speed in enumerate((waves.slowest, waves.slow)):
            row = head * size + 2 * part
            sine, cosine = waves.sine(axis, speed), waves.cosine(axis, speed)
            # sin(q - k) = sin q cos k - cos q sin k
            _set_pair(attention, row, sine, cosine, _SIDE_GAIN, sign)
            _set_pair(attention, row + 1, cosine, sine, _SIDE_GAIN, -sign)


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
