"""Owns SAM 2's costly parts in fewer operations, for a CPU: equal mathematics, other rounding.

Knows nothing of frames, objects or tracks. Float32 in, float32 out; what is won, and how far masks
move, is in benchmarks/RESULTS.md. A step at 1024 px is mostly one product: 4096 queries with 28 672
keys of 256 channels, and then with as many values. Here
- values stay the memory's own 64 channels, and are projected after the attention, which is linear;
- of a key's 256 channels 128 are rotated by its column, 128 by its row: for the keys of one row the
  latter rotation and projection are moved to the queries, which leaves 128 + 64 channels;
- the first self-attention sees the frame only: its objects share it;
- what never changes is computed once.
The trunk's fine levels are as many operations as before, but strip by strip, for the cache.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from sam2.modeling.backbones.hieradet import MultiScaleBlock
from sam2.modeling.memory_attention import MemoryAttention
from sam2.modeling.sam.transformer import RoPEAttention
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn
from torch.nn import functional

# What the trunk's blocks make of so many tokens on the way stays in a core's cache.
_STRIP_TOKENS = 2048


def rearrange(model: SAM2Base) -> None:
    """Rearrange a loaded model in place; what is not built as in SAM 2's own configs stays.

    Args:
        model: On a CPU, in evaluation mode, with its weights.
    """
    with torch.inference_mode():
        if model.use_obj_ptrs_in_encoder and _is_as_in_sam2(model.memory_attention):
            side = model.sam_image_embedding_size
            model.memory_attention = RearrangedMemoryAttention(model.memory_attention, side)
        neck = model.image_encoder.neck
        neck.position_encoding = _ConstantEncoding(neck.position_encoding)
        trunk, prompts = model.image_encoder.trunk, model.sam_prompt_encoder
        trunk.blocks = nn.ModuleList(
            _InStrips(block) if block.window_size > 0 else block for block in trunk.blocks
        )
        trunk._get_pos_embed = functools.cache(trunk._get_pos_embed)  # noqa: SLF001  # has no other name
        prompts.get_dense_pe = functools.cache(prompts.get_dense_pe)
        _fold_high_res_convs(model)


class RearrangedMemoryAttention(nn.Module):
    """SAM 2's memory attention for objects that are all on one frame.

    Args:
        attention: The one to replace; its modules are used, not copied.
        side: Of the frame's feature map.
    """

    def __init__(self, attention: MemoryAttention, side: int) -> None:
        super().__init__()
        self.layers = attention.layers
        self.norm = attention.norm
        self._cross = nn.ModuleList(
            _CrossAttention(layer.cross_attn_image, side) for layer in attention.layers
        )
        self._side = side
        self._beginning: _Beginning | None = None

    def forward(
        self,
        curr: list[Tensor],
        memory: Tensor,
        curr_pos: list[Tensor],
        memory_pos: Tensor,
        num_obj_ptr_tokens: int,
    ) -> Tensor:
        """Let a frame's features attend to the memories of B objects.

        Args:
            curr: The frame's features, one tensor `(side * side, B, C)`, equal for all objects.
            memory: `(M, B, c)`, frame memories first, object pointers last.
            curr_pos: Position encoding of `curr`, one tensor of its shape.
            memory_pos: Position encoding of `memory`, of its shape.
            num_obj_ptr_tokens: How many of the M are object pointers.

        Returns:
            `(side * side, B, C)`.
        """
        beginning = self._begin(curr[0], curr_pos[0])
        keys = memory + memory_pos
        return torch.stack(
            [
                self._follow(beginning, keys[:, one], memory[:, one], num_obj_ptr_tokens)
                for one in range(memory.shape[1])
            ],
            dim=1,
        )

    def _begin(self, curr: Tensor, curr_pos: Tensor) -> _Beginning:
        """Return what the first layer makes of a frame, as it was for the frame's last object."""
        known = self._beginning
        if known is not None and known.curr.data_ptr() == curr.data_ptr():
            return known
        output = self._attend_to_itself(0, curr[:, 0] + 0.1 * curr_pos[:, 0])
        self._beginning = _Beginning(curr, output, self._queries(0, output))
        return self._beginning

    def _follow(self, beginning: _Beginning, keys: Tensor, values: Tensor, pointers: int) -> Tensor:
        """Do for one object what comes after the beginning; keys and values are `(M, c)`."""
        count = len(keys) - pointers
        rows_of_keys, rows_of_values = (
            tokens[:count]
            .view(-1, self._side, self._side, tokens.shape[1])
            .transpose(0, 1)
            .flatten(1, 2)
            for tokens in (keys, values)
        )
        output, queries = beginning.output, beginning.queries
        for index, (layer, cross) in enumerate(zip(self.layers, self._cross, strict=True)):
            if index > 0:
                output = self._attend_to_itself(index, output)
                queries = self._queries(index, output)
            output = output + cross(
                queries, rows_of_keys, rows_of_values, keys[count:], values[count:]
            )
            hidden = layer.linear1(layer.norm3(output))
            output = output + layer.linear2(functional.relu_(hidden))
        normed: Tensor = self.norm(output)
        return normed

    def _attend_to_itself(self, index: int, output: Tensor) -> Tensor:
        layer = self.layers[index]
        normed = layer.norm1(output)[None]
        attended: Tensor = layer.self_attn(q=normed, k=normed, v=normed)[0]
        return output + attended

    def _queries(self, index: int, output: Tensor) -> Tensor:
        cross, layer = self._cross[index], self.layers[index]
        assert isinstance(cross, _CrossAttention)
        return cross.queries(layer.norm2(output))


class _Beginning(NamedTuple):
    """What the first layer makes of a frame before any memory: `(side * side, C)`."""

    curr: Tensor  # kept alive, so that no other frame can lie where it lies
    output: Tensor
    queries: Tensor


class _CrossAttention(nn.Module):
    """One layer's attention to memories, with rotary position encoding.

    Args:
        cross: The one to replace.
        side: Of all feature maps.
    """

    def __init__(self, cross: RoPEAttention, side: int) -> None:
        super().__init__()
        channels = cross.internal_dim
        half = channels // 2
        # in powers of two, which a CPU raises faster
        scale = math.log2(math.e) / math.sqrt(channels)
        self._q_weight, self._q_bias = cross.q_proj.weight * scale, cross.q_proj.bias * scale
        self._k_proj = cross.k_proj
        self._output = _compose(cross.out_proj, cross.v_proj)
        self._rotations = cross.compute_cis(end_x=side, end_y=side)
        # the first half of the channels is rotated by the column, the second by the row
        self._by_column = self._rotations[:side, : half // 2]
        by_row = self._rotations[::side, half // 2 :]
        weight, bias = cross.k_proj.weight, cross.k_proj.bias
        self._column_weight, self._column_bias = weight[:half], bias[:half]
        # for each row: `(side, half, c)`, and `(half, side)`
        self._row_weights = _rotate(weight[half:].T, by_row[:, None]).transpose(1, 2).contiguous()
        self._row_biases = _rotate(bias[half:], by_row).T.contiguous()

    def queries(self, tokens: Tensor) -> Tensor:
        """Project tokens `(side * side, C)` to queries of the same shape."""
        queries = functional.linear(tokens, self._q_weight, self._q_bias)
        return _rotate(queries, self._rotations)

    def forward(
        self,
        queries: Tensor,
        rows_of_keys: Tensor,
        rows_of_values: Tensor,
        pointer_keys: Tensor,
        pointer_values: Tensor,
    ) -> Tensor:
        """Attend to memories `(side, n, c)`, row by row, and to object pointers `(p, c)`."""
        half = len(self._column_weight)
        columns = functional.linear(rows_of_keys, self._column_weight, self._column_bias)
        of_frames = columns.view(len(columns), -1, len(self._by_column), half)
        columns = _rotate(of_frames, self._by_column).flatten(1, 2)
        keys = torch.cat([columns, rows_of_keys], dim=2)
        row_queries = queries[:, half:].contiguous()
        shifts = row_queries @ self._row_biases
        mixed = queries.new_empty(len(queries), keys.shape[2])
        mixed[:, :half] = queries[:, :half]
        found = _RunningSoftmax(len(queries), rows_of_values.shape[2])
        for row, weight in enumerate(self._row_weights):
            torch.mm(row_queries, weight, out=mixed[:, half:])
            found.add(mixed, keys[row], rows_of_values[row], shifts[:, row : row + 1])
        found.add(queries, self._k_proj(pointer_keys), pointer_values, torch.zeros(1, 1))
        attended: Tensor = self._output(found.mean())
        return attended


class _RunningSoftmax:
    """Means of values `(n, c)` for N queries, weighted by 2 ^ score, which come part by part.

    Source: FlashAttention (arXiv:2205.14135).
    """

    def __init__(self, count: int, channels: int) -> None:
        self._highest = torch.full((count, 1), -math.inf)
        self._weight = torch.zeros(count, 1)
        self._sum = torch.zeros(count, channels)
        self._scores = torch.empty(0)

    def add(self, queries: Tensor, keys: Tensor, values: Tensor, shift: Tensor) -> None:
        """Add values; their scores are queries `(N, d)` times keys `(n, d)` plus shift `(N, 1)`."""
        if self._scores.shape[1:] != keys.shape[:1]:
            self._scores = torch.empty(len(queries), len(keys))
        weights = torch.mm(queries, keys.T, out=self._scores)
        highest = torch.maximum(self._highest, weights.amax(dim=1, keepdim=True) + shift)
        weights.sub_(highest - shift).exp2_()
        shrink = (self._highest - highest).exp2_()
        self._weight.mul_(shrink).add_(weights.sum(dim=1, keepdim=True))
        self._sum.mul_(shrink).addmm_(weights, values)
        self._highest = highest

    def mean(self) -> Tensor:
        """Return the means, `(N, c)`."""
        return self._sum / self._weight


def _is_as_in_sam2(attention: MemoryAttention) -> bool:
    return attention.pos_enc_at_input and all(
        isinstance(layer.cross_attn_image, RoPEAttention)
        and layer.cross_attn_image.num_heads == 1
        and layer.activation_str == "relu"
        and layer.pos_enc_at_cross_attn_keys
        and not layer.pos_enc_at_cross_attn_queries
        and not layer.pos_enc_at_attn
        for layer in attention.layers
    )


def _rotate(tokens: Tensor, rotations: Tensor) -> Tensor:
    """Turn neighbouring channels `(..., 2 * k)` by complex numbers `(..., k)` of length one."""
    pairs = torch.view_as_complex(tokens.reshape(*tokens.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * rotations).flatten(-2)


class _ConstantEncoding(nn.Module):
    """A position encoding that depends on nothing but the size of what it is for."""

    def __init__(self, encoding: nn.Module) -> None:
        super().__init__()
        self._of_size = functools.cache(lambda size: encoding(torch.empty(1, 1, *size)))

    def forward(self, features: Tensor) -> Tensor:
        encoded: Tensor = self._of_size(features.shape[-2:])
        return encoded.expand(len(features), -1, -1, -1)


class _InStrips(nn.Module):
    """A block of the trunk whose tokens see no further than their window, strip by strip.

    Args:
        block: The block, with windows.
    """

    def __init__(self, block: MultiScaleBlock) -> None:
        super().__init__()
        self._block = block

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute tokens `(B, H, W, C)`; few are computed at once."""
        height, width = tokens.shape[1:3]
        if height * width <= 2 * _STRIP_TOKENS:
            whole: Tensor = self._block(tokens)
            return whole
        side = self._block.window_size
        rows = side * max(1, _STRIP_TOKENS // (side * width))
        return torch.cat([self._block(strip) for strip in torch.split(tokens, rows, dim=1)], dim=1)


def _fold_high_res_convs(model: SAM2Base) -> None:
    """Let the neck put out what the mask decoder takes of the two finest levels: fewer channels."""
    neck, decoder = model.image_encoder.neck, model.sam_mask_decoder
    laterals = [neck.convs[-1], neck.convs[-2]]  # the coarsest comes first
    if (
        not model.use_high_res_features_in_sam
        or not {0, 1}.isdisjoint(neck.fpn_top_down_levels)
        or any(lateral.conv.kernel_size != (1, 1) for lateral in laterals)
    ):
        return
    for lateral, name in zip(laterals, ("conv_s0", "conv_s1"), strict=True):
        lateral.conv = _compose(getattr(decoder, name), lateral.conv)
        setattr(decoder, name, nn.Identity())


def _compose(outer: nn.Linear | nn.Conv2d, inner: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """Return one linear layer, or convolution of 1 x 1 pixels, that does what two did."""
    assert outer.bias is not None
    assert inner.bias is not None
    both = outer.weight.flatten(1).double() @ inner.weight.flatten(1).double()
    shift = outer.weight.flatten(1).double() @ inner.bias.double() + outer.bias.double()
    sizes = both.shape[1], both.shape[0]
    layer = nn.Linear(*sizes) if isinstance(outer, nn.Linear) else nn.Conv2d(*sizes, kernel_size=1)
    layer.weight = nn.Parameter(both.float().view(layer.weight.shape), requires_grad=False)
    layer.bias = nn.Parameter(shift.float(), requires_grad=False)
    return layer
