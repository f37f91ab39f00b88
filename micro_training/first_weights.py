"""Set initial weights with which attention starts at the same image position.

With PyTorch's initial weights, attention is uniform over the image: the model needed hundreds of
steps until it began to track masks, and in this short training it never began to make masks from
boxes or clicks.
"""

import numpy as np
import torch
from sam2.modeling.sam.transformer import Attention
from sam2.modeling.sam2_base import SAM2Base

from micro_training.mask_copying import CELLS, clear_features, set_mask_copying

# Strength of the initial attention to the same position; some weight remains for others.
_ROTARY_BIAS = 3.0
_NEARBY_GAIN = 3.0
_SIDE_GAIN = 5.0
# Strength of the initial self-attention of a token to itself.
_SELF_GAIN = 2.0
# Factor for prompts, so that they count against the image's features.
_PROMPT_GAIN = 3.0


def set_first_weights(model: SAM2Base) -> None:
    """Overwrite some of a new model's random weights, in place.

    Between frames, equal constant queries and keys leave only the rotary position encoding, whose
    product is largest at equal positions. Between prompts and image, some heads start as kernels:
    the product of two position encodings is largest at equal positions, or, shifted by a quarter
    of a wave, has a sign that depends on the side of the prompt's point on which a pixel lies.
    """
    # Start with "visible": an object judged absent leaves no memory to learn from.
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 2.0)
    for layer in model.memory_attention.layers:
        for attention in (layer.self_attn, layer.cross_attn_image):
            for projection in (attention.q_proj, attention.k_proj):
                torch.nn.init.constant_(projection.bias, _ROTARY_BIAS)
    with torch.no_grad():
        columns = _set_prompt_weights(model)
    free = [i for i in range(model.hidden_dim) if i not in columns]
    set_mask_copying(model, free[:CELLS])


def _set_prompt_weights(model: SAM2Base) -> list[int]:
    prompts = model.sam_prompt_encoder
    code = prompts.pe_layer.positional_encoding_gaussian_matrix
    waves = _Waves(code.shape[1])
    code.copy_(torch.from_numpy(waves.matrix).to(code))
    columns = _reserve_columns(model, waves)
    transformer = model.sam_mask_decoder.transformer
    # The first self-attention has no residual connection: if it mixed all tokens, the kinds of the
    # prompts would be lost.
    first = transformer.layers[0].self_attn
    for projection in (first.q_proj, first.k_proj):
        torch.nn.init.eye_(projection.weight).mul_(_SELF_GAIN)
        torch.nn.init.zeros_(projection.bias)
    _attend_same_position(transformer.final_attn_token_to_image, range(4), waves)
    for layer in transformer.layers:
        _attend_same_position(layer.cross_attn_token_to_image, range(4), waves)
        _attend_same_position(layer.cross_attn_image_to_token, range(4, 6), waves)
        _attend_one_side(layer.cross_attn_image_to_token, waves)
        layer.cross_attn_image_to_token.out_proj.weight.mul_(_PROMPT_GAIN)
    return columns


class _Waves:
    """The position encoding's waves per half image; SAM draws them from a normal distribution.

    A wave below 0.25 is monotonic over the image, so that it distinguishes left from right.
    `matrix` is `(2, W)`.
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
        """Return the column of a sine in the encoding: all sines, then all cosines."""
        return axis * self.per_axis + wave

    def cosine(self, axis: int, wave: int) -> int:
        """Return the column of a cosine in the encoding."""
        return self.sine(axis, wave) + 2 * self.per_axis


def _reserve_columns(model: SAM2Base, waves: _Waves) -> list[int]:
    """Reserve the columns that these heads read for the position encoding; return them."""
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
    clear_features(model, columns)
    return columns


def _attend_same_position(attention: Attention, heads: range, waves: _Waves) -> None:
    """Make heads attend to keys at the query's position."""
    size = attention.internal_dim // attention.num_heads
    for head in heads:
        columns = [
            encode(axis, wave)
            for axis in range(2)
            for wave in (waves.medium, waves.fast)
            for encode in (waves.sine, waves.cosine)
        ]
        for offset, column in enumerate(columns):
            _set_pair(attention, head * size + offset, column, column, _NEARBY_GAIN, 1.0)


def _attend_one_side(attention: Attention, waves: _Waves) -> None:
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
