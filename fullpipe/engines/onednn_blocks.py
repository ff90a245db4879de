"""Stable Diffusion's blocks from packed layers: diffusers' arithmetic in fewer passes.

Activations work in place, sums and products ride on the matrix products before them, an
upsampling is never computed apart from its convolution, and nothing leaves channels-last layout.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional

from fullpipe.engines.onednn_layers import (
    PackedConv2d,
    PackedDoubling,
    PackedLinear,
    matmul_transposed,
)
from fullpipe.engines.twins import spread

# Pixels whose attention to all others a VAE computes at a time: 64 MB at 128x128 latent pixels.
ATTENTION_STRIP = 1024


class PackedResnet(nn.Module):
    """`ResnetBlock2D` of a UNet or a VAE."""

    def __init__(self, block: Any):
        super().__init__()
        self._norm1, self._norm2 = block.norm1, block.norm2
        self._conv1, self._conv2 = PackedConv2d.of(block.conv1), PackedConv2d.of(block.conv2)
        self._time = None if block.time_emb_proj is None else PackedLinear.of(block.time_emb_proj)
        self._shortcut = (
            None if block.conv_shortcut is None else PackedConv2d.of(block.conv_shortcut)
        )

    @staticmethod
    def takes(block: Any) -> bool:
        """Whether it is one without resampling whose time embedding, if any, is added."""
        return (
            type(block) is ResnetBlock2D
            and block.upsample is block.downsample is None
            and (block.time_embedding_norm == "default" or block.time_emb_proj is None)
            and block.time_embedding_norm != "scale_shift"
            and not block.skip_time_act
            and type(block.nonlinearity) is nn.SiLU
            and block.output_scale_factor == 1.0
        )

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """[B, in, h, w] and [U, time] to [B, out, h, w]; see `fullpipe.engines.twins` for U."""
        h = self._conv1(functional.silu(self._norm1(x), inplace=True))
        if self._time is not None and temb is not None:
            h.add_(spread(self._time(functional.silu(temb)), len(h))[:, :, None, None])
        h = functional.silu(self._norm2(h), inplace=True)
        if self._shortcut is None:
            return self._conv2(h).add_(x)
        return self._conv2.add_to(self._shortcut(x), h)


class PackedUpsample(nn.Module):
    """`Upsample2D`, where a 3x3 convolution follows the doubling of every pixel.

    Under its window are two by two pixels of the small picture, by weights that depend on whether
    the row and the column are even or odd. That is a transposed convolution of the small picture.
    """

    def __init__(self, layer: Any):
        super().__init__()
        conv = layer.conv
        self._plain = PackedConv2d.of(conv)
        # [of four taps, of three]: a pixel reaches the rows -1 to 2 from its own first one, each by
        # the taps of the window around that row which see one of the pixel's two rows.
        seen = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.double)
        weight = torch.einsum("ai,bj,ocij->coab", seen, seen, conv.weight.detach().double())
        self._doubling = PackedDoubling(weight.float(), conv.bias)

    @staticmethod
    def takes(layer: Any) -> bool:
        """Whether it is the usual one."""
        return (
            type(layer) is Upsample2D
            and type(layer.conv) is nn.Conv2d
            and layer.conv.kernel_size == (3, 3)
            and layer.conv.stride == layer.conv.padding == layer.conv.dilation == (1, 1)
            and layer.conv.padding_mode == "zeros"
            and layer.conv.groups == 1
            and not layer.use_conv_transpose
            and layer.interpolate
            and layer.norm is None
        )

    def forward(self, x: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        """[B, in, h, w] to [B, out, 2 h, 2 w], or to an odd `output_size`."""
        height, width = x.shape[2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            return self._plain(functional.interpolate(x, size=output_size, mode="nearest"))
        return self._doubling(x)


class PackedAttention(nn.Module):
    """`Attention` of a VAE: one head, every pixel to every pixel of the same picture."""

    def __init__(self, attention: Any):
        super().__init__()
        self._norm, self._scale = attention.group_norm, attention.scale
        self._inner = PackedLinear(*_joined(attention.to_q, attention.to_k, attention.to_v))
        self._out = PackedLinear.of(attention.to_out[0])

    @staticmethod
    def takes(attention: Any) -> bool:
        """Whether it is the usual one."""
        return (
            type(attention) is Attention
            and type(attention.processor) is AttnProcessor2_0
            and attention.heads == 1
            and attention.group_norm is not None
            and attention.residual_connection
            and attention.spatial_norm is attention.norm_q is attention.norm_k is None
            and attention.added_kv_proj_dim is None
            and not attention.is_cross_attention
            and attention.rescale_output_factor == 1.0
        )

    def forward(self, x: torch.Tensor, temb: None = None) -> torch.Tensor:
        """[B, C, h, w] to the same shape."""
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        inner = self._inner(self._norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        attended = torch.stack([self._attend(*one.chunk(3, dim=-1)) for one in inner])
        out = self._out.plus(attended, pixels)
        return out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[pixels, C] three times to the same shape; by strips, for the sake of memory."""
        key, value = key * self._scale, value.t().contiguous()
        strips = [
            matmul_transposed(matmul_transposed(strip.contiguous(), key).softmax(-1), value)
            for strip in query.split(ATTENTION_STRIP)
        ]
        return torch.cat(strips)


class PackedTransformer(nn.Module):
    """`Transformer2DModel` of a UNet."""

    def __init__(self, model: Any):
        super().__init__()
        self._norm = model.norm
        self._into, self._out_of = _pack_projection(model.proj_in), _pack_projection(model.proj_out)
        self._blocks = nn.ModuleList(_Block(block) for block in model.transformer_blocks)

    @staticmethod
    def takes(model: Any) -> bool:
        """Whether it is the usual one: self-attention, cross-attention, GEGLU."""
        return (
            type(model) is Transformer2DModel
            and model.is_input_continuous
            and all(_Block.takes(block) for block in model.transformer_blocks)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool = False,
        **unused: None,
    ) -> tuple[torch.Tensor]:
        """[U, C, h, w] and [B, tokens, text] to [B, C, h, w]; `fullpipe.engines.twins` has U."""
        if return_dict or any(value is not None for value in unused.values()):
            raise ValueError(f"a packed transformer takes none of {sorted(unused)}")
        _, channels, height, width = hidden_states.shape
        rows = len(encoder_hidden_states)
        pixels = hidden_states.permute(0, 2, 3, 1).flatten(1, 2)
        h = self._into(self._norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2))
        for block in self._blocks:
            h = block(h, encoder_hidden_states)
        out = self._out_of.plus(h, spread(pixels, rows))
        return (out.view(rows, height, width, channels).permute(0, 3, 1, 2),)


class _Block(nn.Module):
    """`BasicTransformerBlock`."""

    def __init__(self, block: Any):
        super().__init__()
        own, cross, up, down = block.attn1, block.attn2, block.ff.net[0].proj, block.ff.net[2]
        self._norms = nn.ModuleList([block.norm1, block.norm2, block.norm3])
        self._own_heads, self._cross_heads = own.heads, cross.heads
        self._own = PackedLinear(*_joined(own.to_q, own.to_k, own.to_v))
        self._own_out = PackedLinear.of(own.to_out[0])
        self._cross_query = PackedLinear.of(cross.to_q)
        self._cross = PackedLinear(*_joined(cross.to_k, cross.to_v))
        self._cross_out = PackedLinear.of(cross.to_out[0])
        value, gate = up.weight.chunk(2)
        value_bias, gate_bias = (None, None) if up.bias is None else up.bias.chunk(2)
        self._value, self._gate = PackedLinear(value, value_bias), PackedLinear(gate, gate_bias)
        self._down = PackedLinear.of(down)

    @staticmethod
    def takes(block: Any) -> bool:
        return (
            type(block) is BasicTransformerBlock
            and block.norm_type == "layer_norm"
            and block.pos_embed is None
            and not block.only_cross_attention
            and not hasattr(block, "fuser")
            and type(block.ff.net[0]).__name__ == "GEGLU"
            and block.attn2 is not None
            and all(_is_usual(attention) for attention in (block.attn1, block.attn2))
        )

    def forward(self, h: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """[U, pixels, C] or [B, pixels, C], and [B, tokens, text], to [B, pixels, C]."""
        norm1, norm2, norm3 = self._norms
        query, key, value = self._own(norm1(h)).chunk(3, dim=-1)
        h = self._own_out.plus(_attend(query, key, value, self._own_heads), h)
        query = spread(self._cross_query(norm2(h)), len(text))
        key, value = self._cross(text).chunk(2, dim=-1)
        attended = _attend(query, key, value, self._cross_heads)
        h = self._cross_out.plus(attended, spread(h, len(text)))
        n = norm3(h)
        return self._down.plus(self._value.times(n, self._gate(n, "gelu")), h)


def _is_usual(attention: Any) -> bool:
    return (
        attention.norm_q is attention.norm_k is attention.group_norm is None
        and attention.spatial_norm is None
        and not attention.norm_cross
        and not attention.residual_connection
        and attention.rescale_output_factor == 1.0
    )


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int
) -> torch.Tensor:
    """[B, pixels, heads * d], [B, tokens, heads * d] twice, to the query's shape."""
    query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    attended = functional.scaled_dot_product_attention(query, key, value)
    return attended.transpose(1, 2).flatten(2)


def _joined(*layers: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of one layer with the outputs of all of them."""
    weights: list[torch.Tensor] = [layer.weight for layer in layers]
    biases: list[torch.Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    return torch.cat(weights), torch.cat(biases) if biases else None


def _pack_projection(layer: nn.Linear | nn.Conv2d) -> PackedLinear:
    """A linear layer, or a convolution of 1x1 which is one of every pixel."""
    return PackedLinear(layer.weight.flatten(1), layer.bias)
