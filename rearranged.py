"""Faster CPU versions of SAM 2's slowest modules. Same formulas, different rounding.

Float32 in, float32 out; benchmarks/RESULTS.md has the gain and the differences in masks. At 1024 px
a step is mostly one attention: 4096 queries to 28 672 keys of 256 channels and as many values. Here
- values keep the memory's own 64 channels and are projected after the attention, which is linear;
- rotary position encoding rotates 128 of a key's 256 channels by its column and 128 by its row: for
  the keys of one row the latter rotation and projection are applied to the queries instead, which
  leaves 128 + 64 channels;
- the first self-attention depends on the frame only, so it is computed once for all its objects;
- constants are computed once.
The image trunk's fine levels take as many operations as before, but in strips that fit the cache.
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

# A trunk block's intermediate results for so many tokens fit into a core's cache.
_STRIP_TOKENS = 2048


def rearrange(model: SAM2Base) -> None:
    """Replace a loaded model's modules in place, where they are built as in SAM 2's own configs.

    Args:
        model: On a CPU, in evaluation mode, with its weights.
    """
    with torch.inference_mode():
        if model.use_obj_ptrs_in_encoder and _is_standard(model.memory_attention):
            side = model.sam_image_embedding_size
            model.memory_attention = RearrangedMemoryAttention(model.memory_attention, side)
        neck = model.image_encoder.neck
        neck.position_encoding = _CachedPositionEncoding(neck.position_encoding)
        trunk, prompts = model.image_encoder.trunk, model.sam_prompt_encoder
        trunk.blocks = nn.ModuleList(
            _StripwiseBlock(block) if block.window_size > 0 else block for block in trunk.blocks
        )
        trunk._get_pos_embed = functools.cache(trunk._get_pos_embed)  # noqa: SLF001  # SAM 2 has no public name for it
        prompts.get_dense_pe = functools.cache(prompts.get_dense_pe)
        _fold_high_res_convs(model)


class RearrangedMemoryAttention(nn.Module):
    """SAM 2's memory attention for objects on one frame.

    Args:
        attention: Module to replace; its submodules are used, not copied.
        side: Side of the frame's feature map.
    """

    def __init__(self, attention: MemoryAttention, side: int) -> None:
        super().__init__()
        self.layers = attention.layers
        self.norm = attention.norm
        self._cross = nn.ModuleList(
            _CrossAttention(layer.cross_attn_image, side) for layer in attention.layers
        )
        self._side = side
        self._first: _FirstSelfAttention | None = None

    def forward(
        self,
        curr: list[Tensor],
        memory: Tensor,
        curr_pos: list[Tensor],
        memory_pos: Tensor,
        num_obj_ptr_tokens: int,
    ) -> Tensor:
        """Attend from a frame's features to the memories of B objects.

        Args:
            curr: The frame's features, one tensor `(side * side, B, C)`, equal for all objects.
            memory: `(M, B, c)`, frame memories first, object pointers last.
            curr_pos: Position encoding of `curr`, one tensor of its shape.
            memory_pos: Position encoding of `memory`, of its shape.
            num_obj_ptr_tokens: How many of the M tokens are object pointers.

        Returns:
            `(side * side, B, C)`.
        """
        first = self._first_self_attention(curr[0], curr_pos[0])
        keys = memory + memory_pos
        return torch.stack(
            [
                self._attend_to_memory(first, keys[:, obj], memory[:, obj], num_obj_ptr_tokens)
                for obj in range(memory.shape[1])
            ],
            dim=1,
        )

    def _first_self_attention(self, curr: Tensor, curr_pos: Tensor) -> _FirstSelfAttention:
        """Return the first layer's self-attention, cached if the frame is the previous one."""
        cached = self._first
        if cached is not None and cached.curr.data_ptr() == curr.data_ptr():
            return cached
        output = self._self_attention(0, curr[:, 0] + 0.1 * curr_pos[:, 0])
        self._first = _FirstSelfAttention(curr, output, self._queries(0, output))
        return self._first

    def _attend_to_memory(
        self, first: _FirstSelfAttention, keys: Tensor, values: Tensor, pointers: int
    ) -> Tensor:
        """Compute all after the first self-attention for one object; keys and values `(M, c)`."""
        count = len(keys) - pointers
        rows_of_keys, rows_of_values = (
            tokens[:count]
            .view(-1, self._side, self._side, tokens.shape[1])
            .transpose(0, 1)
            .flatten(1, 2)
            for tokens in (keys, values)
        )
        output, queries = first.output, first.queries
        for index, (layer, cross) in enumerate(zip(self.layers, self._cross, strict=True)):
            if index > 0:
                output = self._self_attention(index, output)
                queries = self._queries(index, output)
            output = output + cross(
                queries, rows_of_keys, rows_of_values, keys[count:], values[count:]
            )
            hidden = layer.linear1(layer.norm3(output))
            output = output + layer.linear2(functional.relu_(hidden))
        normed: Tensor = self.norm(output)
        return normed

    def _self_attention(self, index: int, output: Tensor) -> Tensor:
        layer = self.layers[index]
        normed = layer.norm1(output)[None]
        attended: Tensor = layer.self_attn(q=normed, k=normed, v=normed)[0]
        return output + attended

    def _queries(self, index: int, output: Tensor) -> Tensor:
        cross, layer = self._cross[index], self.layers[index]
        assert isinstance(cross, _CrossAttention)
        return cross.queries(layer.norm2(output))


class _FirstSelfAttention(NamedTuple):
    """The first layer's self-attention and the queries after it, both `(side * side, C)`."""

    curr: Tensor  # the frame's features; referenced so that no other tensor gets their address
    output: Tensor
    queries: Tensor


class _CrossAttention(nn.Module):
    """One layer's attention to memories, with rotary position encoding.

    Args:
        cross: Module to replace.
        side: Side of all feature maps.
    """

    def __init__(self, cross: RoPEAttention, side: int) -> None:
        super().__init__()
        channels = cross.internal_dim
        half = channels // 2
        # for powers of two instead of e, which are faster on a CPU
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
        softmax = _OnlineSoftmax(len(queries), rows_of_values.shape[2])
        for row, weight in enumerate(self._row_weights):
            torch.mm(row_queries, weight, out=mixed[:, half:])
            softmax.add(mixed, keys[row], rows_of_values[row], shifts[:, row : row + 1])
        softmax.add(queries, self._k_proj(pointer_keys), pointer_values, torch.zeros(1, 1))
        attended: Tensor = self._output(softmax.mean())
        return attended


class _OnlineSoftmax:
    """Mean of values for N queries, weighted by 2 ^ score, over keys that are added in parts.

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


def _is_standard(attention: MemoryAttention) -> bool:
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
    """Rotate pairs of channels `(..., 2 * k)` by complex numbers `(..., k)` of length one."""
    pairs = torch.view_as_complex(tokens.reshape(*tokens.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * rotations).flatten(-2)


class _CachedPositionEncoding(nn.Module):
    """A position encoding that depends on the size of the features only, computed once per size."""

    def __init__(self, encoding: nn.Module) -> None:
        super().__init__()
        self._of_size = functools.cache(lambda size: encoding(torch.empty(1, 1, *size)))

    def forward(self, features: Tensor) -> Tensor:
        encoded: Tensor = self._of_size(features.shape[-2:])
        return encoded.expand(len(features), -1, -1, -1)


class _StripwiseBlock(nn.Module):
    """A trunk block with windowed attention, computed in strips of whole windows.

    Args:
        block: Module to replace.
    """

    def __init__(self, block: MultiScaleBlock) -> None:
        super().__init__()
        self._block = block

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute tokens `(B, H, W, C)`; few tokens are computed in one strip."""
        height, width = tokens.shape[1:3]
        if height * width <= 2 * _STRIP_TOKENS:
            whole: Tensor = self._block(tokens)
            return whole
        side = self._block.window_size
        rows = side * max(1, _STRIP_TOKENS // (side * width))
        return torch.cat([self._block(strip) for strip in torch.split(tokens, rows, dim=1)], dim=1)


def _fold_high_res_convs(model: SAM2Base) -> None:
    """Apply the mask decoder's 1 x 1 convolutions of the two finest levels in the neck.

    Two linear convolutions in a row equal a single one.
    """
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
    """Return one linear layer, or 1 x 1 convolution, that equals two in succession."""
    assert outer.bias is not None
    assert inner.bias is not None
    both = outer.weight.flatten(1).double() @ inner.weight.flatten(1).double()
    shift = outer.weight.flatten(1).double() @ inner.bias.double() + outer.bias.double()
    sizes = both.shape[1], both.shape[0]
    layer = nn.Linear(*sizes) if isinstance(outer, nn.Linear) else nn.Conv2d(*sizes, kernel_size=1)
    layer.weight = nn.Parameter(both.float().view(layer.weight.shape), requires_grad=False)
    layer.bias = nn.Parameter(shift.float(), requires_grad=False)
    return layer
