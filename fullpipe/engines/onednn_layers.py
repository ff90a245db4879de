"""Convolutions and linear layers whose weights oneDNN has packed once, for inference on a CPU."""

from __future__ import annotations

import torch
from torch import nn


class PackedLinear(nn.Module):
    """`nn.Linear` with its weight in oneDNN's own layout."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self._bias = None if bias is None else bias.detach().contiguous()

    @classmethod
    def of(cls, layer: nn.Linear) -> PackedLinear:
        """The same layer, packed."""
        return cls(layer.weight, layer.bias)

    def forward(self, x: torch.Tensor, activation: str = "none") -> torch.Tensor:
        """[…, in] to […, out], through "none" or "gelu"."""
        algorithm = "none" if activation == "gelu" else ""  # without tanh
        return torch.ops.mkldnn._linear_pointwise.default(
            x, self._weight, self._bias, activation, [], algorithm
        )

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The layer's output plus `other` […, out]."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, "add")

    def times(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The layer's output times `other` […, out]."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, "mul")


def matmul_transposed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[m, k] and [n, k] to a b^T [m, n], by the kernels of the packed layers.

    Only for large matrices: `b` is brought into their layout in every call.
    """
    return torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")


class PackedConv2d(nn.Module):
    """`nn.Conv2d` with its weight in oneDNN's own layout."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        padding: tuple[int, ...] = (0, 0),
        stride: tuple[int, ...] = (1, 1),
        dilation: tuple[int, ...] = (1, 1),
        groups: int = 1,
    ):
        super().__init__()
        self._geometry = (list(padding), list(stride), list(dilation), groups)
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight.detach().contiguous(), *self._geometry
        )
        self._bias = None if bias is None else bias.detach().contiguous()

    @classmethod
    def of(cls, layer: nn.Conv2d) -> PackedConv2d:
        """The same layer, packed; one that pads with zeros, by numbers."""
        assert not isinstance(layer.padding, str)
        return cls(
            layer.weight,
            layer.bias,
            padding=layer.padding,
            stride=layer.stride,
            dilation=layer.dilation,
            groups=layer.groups,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, h, w] to [B, out, h', w'], new storage."""
        return torch.ops.mkldnn._convolution_pointwise.default(
            x, self._weight, self._bias, *self._geometry, "none", [], ""
        )

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add the layer's output to `total` [B, out, h', w'], in place, and return it."""
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            total, x, self._weight, self._bias, *self._geometry, "add", 1.0, None, [], None
        )


class PackedDoubling(nn.Module):
    """A transposed convolution of 4x4, stride 2, padding 1: twice the height and the width."""

    _GEOMETRY = ([1, 1], [0, 0], [2, 2], [1, 1], 1)

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        """Pack `weight` [in, out, 4, 4] and `bias` [out], both fp32."""
        super().__init__()
        self._weight = weight.detach().contiguous()
        # By 48 channels oneDNN has a layout for small pictures and another for large ones, and
        # from one to the other takes it longer than the layer; from the plain one, hardly anything.
        if weight.shape[1] % 48:
            self._weight = torch.ops.mkldnn._reorder_convolution_transpose_weight(
                self._weight, *self._GEOMETRY
            )
        self._bias = None if bias is None else bias.detach().contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, h, w] to [B, out, 2 h, 2 w], new storage."""
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            x, self._weight, self._bias, *self._GEOMETRY, "none", [], ""
        )
