"""Set initial weights that copy a mask from one frame to the next, as a start for training.

A memory token covers 16 x 16 pixels. Its first channels hold the mask's 4 x 4 cells, 4 pixels each,
attention copies them to the token at the same position, and the decoder unpacks them. All of this
is done by the network's own layers, so that training can change it.
"""

import torch
from sam2.modeling.memory_attention import MemoryAttention
from sam2.modeling.memory_encoder import MaskDownSampler
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn

CELLS = 16  # cells of a token, 4 x 4
# Next to constants this large, a layer norm over channels only scales the other values.
_ANCHOR = 100.0
_MASK_LOGIT = 10.0  # the memory encoder's input for a pixel of the mask
_CELL = 2.0  # a full cell's value in a token's channel
_ROTARY_BIAS = 4.0
_CONTENT_GAIN = 5.0
_RECENCY = 1.0  # decrease of the attention logits per frame of age
_READ = 4.0  # weight of the cells in the decoder's masks
# The elements of a 3 x 3 kernel of stride 2 that cover a 2 x 2 block.
_TAPS = ((1, 1), (1, 2), (2, 1), (2, 2))


def set_mask_copying(model: SAM2Base, columns: list[int]) -> None:
    """Set the weights, in place.

    Args:
        model: A model with PyTorch's initial weights.
        columns: The 16 channels of a token for its cells.
    """
    with torch.no_grad():
        encoder = model.memory_encoder
        _pack(encoder.mask_downsampler, columns)
        others = [i for i in range(encoder.pix_feat_proj.out_channels) if i not in columns]
        channels = encoder.out_proj.out_channels
        appearance = list(range(CELLS, channels - 1))
        nn.init.dirac_(encoder.pix_feat_proj.weight)
        encoder.pix_feat_proj.bias.zero_()
        _clear(columns, encoder.pix_feat_proj)
        encoder.out_proj.weight.zero_()
        encoder.out_proj.bias.zero_()
        encoder.out_proj.weight[range(CELLS), columns, 0, 0] = 1.0
        sketch = torch.linalg.qr(torch.randn(len(others), len(appearance)))[0].T
        encoder.out_proj.weight[CELLS : channels - 1, others, 0, 0] = sketch
        for layer in encoder.fuser.layers:
            layer.gamma[columns] = 0.02
        _attend(model.memory_attention, columns, others, sketch, channels)
        ages = model.num_maskmem - 1
        model.maskmem_tpos_enc[..., -1] = 0
        for index in range(ages):  # the oldest first; the prompted frame has the index `ages`
            model.maskmem_tpos_enc[index, ..., -1] = -_RECENCY * (ages - 1 - index)
        model.maskmem_tpos_enc[ages, ..., -1] = -2 * _RECENCY
        _unpack(model, columns)


def _clear(columns: list[int], *layers: nn.Module) -> None:
    """Set the weights of some output channels of layers to zero."""
    for layer in layers:
        for values in (layer.weight, layer.bias):
            assert isinstance(values, Tensor)
            values[columns] = 0


def clear_features(model: SAM2Base, columns: list[int]) -> None:
    """Keep some channels of a frame's features zero, where prompts and memories are added."""
    # The features are the sum of the neck's coarsest levels.
    _clear(columns, *(level.conv for level in model.image_encoder.neck.convs[:2]))
    model.sam_prompt_encoder.no_mask_embed.weight[:, columns] = 0
    model.no_mem_embed[..., columns] = 0


def _pack(sampler: MaskDownSampler, columns: list[int]) -> None:
    """Write a mask's cells into a token's channels.

    Two convolutions average to cells of 4 pixels, two more move 2 x 2 neighbours into channels.
    Each value is a pair of channels, itself and its negative, because GELU(x) - GELU(-x) = x.
    """
    convs = [layer for layer in sampler.encoder if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in sampler.encoder if not isinstance(layer, nn.Conv2d | nn.GELU)]
    cells = 1
    for depth, (conv, norm) in enumerate(zip(convs[:-1], norms, strict=True)):
        splits = 1 if depth < 2 else 4
        used = 2 * cells * splits
        conv.weight[: used + 2].zero_()
        conv.weight[used + 2 :].mul_(0.1)
        assert conv.bias is not None
        conv.bias.zero_()
        for cell in range(cells):
            for part in range(splits):
                taps = _TAPS if splits == 1 else _TAPS[part : part + 1]
                pair = 2 * (cell * splits + part)
                for y, x in taps:
                    if depth == 0:
                        _set_signs(conv.weight[pair : pair + 2, :1, y, x], 1 / _MASK_LOGIT)
                    else:
                        _set_signs(conv.weight[pair : pair + 2, 2 * cell : 2 * cell + 2, y, x], 1.0)
                    conv.weight[pair : pair + 2, :, y, x] /= len(taps)
        conv.bias[used], conv.bias[used + 1] = _ANCHOR, -_ANCHOR
        norm.weight.fill_(1.0)
        norm.weight[:used] = (2 * _ANCHOR**2 / norm.weight.numel()) ** 0.5
        norm.weight[used : used + 2] = 0.0
        cells *= splits
    last = convs[-1]
    last.weight[:, : 2 * CELLS].zero_()
    assert last.bias is not None
    last.bias.zero_()
    _clear(columns, last)
    for cell, column in enumerate(columns):
        _set_signs(last.weight[column : column + 1, 2 * cell : 2 * cell + 2, 0, 0], _CELL)


def _set_signs(block: Tensor, value: float) -> None:
    """Fill a block of weights between pairs of channels: plus where their signs agree."""
    rows, columns = (torch.tensor([1.0, -1.0])[:size] for size in block.shape)
    block.copy_(value * rows[:, None] * columns[None])


def _attend(
    attention: MemoryAttention,
    columns: list[int],
    others: list[int],
    sketch: Tensor,
    channels: int,
) -> None:
    """Attend to the same position, to similar appearance, and more to newer frames."""
    for layer in attention.layers:
        cross = layer.cross_attn_image
        size = cross.internal_dim
        # Rotary pairs: x from fast to slow, then y. The fast half distinguishes positions.
        pairs = size // 4
        fast = [2 * p + o for a in (0, pairs) for p in range(a, a + pairs // 2) for o in (0, 1)]
        slow = [2 * p for a in (0, pairs) for p in range(a + pairs // 2, a + pairs)]
        for projection in (cross.q_proj, cross.k_proj):
            projection.bias.zero_()
            projection.bias[fast] = _ROTARY_BIAS
            projection.weight.mul_(0.3)
        gain = _CONTENT_GAIN**0.5
        for row, index in zip(slow, range(len(sketch)), strict=False):
            _clear([row], cross.q_proj, cross.k_proj)
            cross.q_proj.weight[row, others] = gain * sketch[index]
            cross.k_proj.weight[row, CELLS + index] = gain
        age = slow[len(sketch)]
        _clear([age], cross.q_proj, cross.k_proj)
        cross.q_proj.bias[age] = size**0.5
        cross.k_proj.weight[age, channels - 1] = 1.0
        _clear(list(range(CELLS)), cross.v_proj)
        cross.v_proj.weight[range(CELLS), range(CELLS)] = 1.0
        _clear(columns, layer.linear2, layer.self_attn.out_proj, cross.out_proj)
        cross.out_proj.weight[columns, range(CELLS)] = 1.0 / len(attention.layers)


def _unpack(model: SAM2Base, columns: list[int]) -> None:
    """Unpack a token's cells into the decoder's mask; nothing else writes to their channels."""
    decoder = model.sam_mask_decoder
    clear_features(model, columns)
    for layer in decoder.transformer.layers:
        _clear(columns, layer.cross_attn_image_to_token.out_proj)
    first, _, _, second, _ = decoder.output_upscaling
    # Transposed convolutions have their input channels first.
    first.weight[:, :8] = 0
    first.bias[:8] = 0
    first.weight[columns] = 0
    second.weight[:8] = 0
    second.weight[:, :2] = 0
    second.bias[:2] = 0
    _clear(list(range(8)), decoder.conv_s1)
    _clear([0, 1], decoder.conv_s0)
    for cell, column in enumerate(columns):
        coarse, fine = divmod(cell, 4)
        y, x = divmod(coarse, 2)
        _set_signs(first.weight[column : column + 1, 2 * fine : 2 * fine + 2, y, x], 1.0)
    for fine in range(4):
        y, x = divmod(fine, 2)
        _set_signs(second.weight[2 * fine : 2 * fine + 2, :2, y, x], 1.0)
    for mlp in decoder.output_hypernetworks_mlps:
        mlp.layers[-1].bias[:2] = torch.tensor([_READ, -_READ])
