"""Networks of Stable Diffusion on a CPU through oneDNN, with weights packed once.

Eager torch multiplies matrices with MKL, which takes its AVX-512 kernels on Intel's processors
only (on an AMD EPYC it reached 118 GFLOP/s a core where oneDNN reaches 260), and it unfolds small
convolutions by hand when it runs on one thread. oneDNN has one fast path for all, and saves the
reordering of the weights in every call. Results differ from eager torch's by fp32 rounding alone.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2DCrossAttn
from torch import nn

from fullpipe.engines.memory import keep_freed_memory
from fullpipe.engines.onednn_blocks import (
    PackedAttention,
    PackedResnet,
    PackedTransformer,
    PackedUpsample,
)
from fullpipe.engines.onednn_layers import PackedConv2d, PackedLinear
from fullpipe.engines.twins import spread_skips

Network = TypeVar("Network", bound=nn.Module)


def pack(network: Network) -> Network:
    """Replace the blocks, convolutions and linear layers of `network` that are plain, in place.

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
    keep_freed_memory()
    _pack_children(network)
    return network


def share_twins(unet: Any) -> bool:
    """Let a packed UNet take fewer samples than prompts; see `fullpipe.engines.twins`.

    Returns:
        Whether it is one that can; others stay as they are.
    """
    if unet.config.addition_embed_type is not None:
        return False
    if type(unet.mid_block) is not UNetMidBlock2DCrossAttn:
        return False
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        parts = (*block.resnets, *(getattr(block, "attentions", None) or ()))
        if not all(type(part) in (PackedResnet, PackedTransformer) for part in parts):
            return False
    for block in unet.up_blocks:
        block.register_forward_pre_hook(spread_skips, with_kwargs=True)
    return True


def _pack_children(parent: nn.Module) -> None:
    for name, child in list(parent.named_children()):
        for packed in (PackedResnet, PackedUpsample, PackedTransformer, PackedAttention):
            if packed.takes(child):
                setattr(parent, name, packed(child))
                break
        else:
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear.of(child))
            elif type(child) is nn.Conv2d and _pads_with_zeros(child):
                setattr(parent, name, PackedConv2d.of(child))
            else:
                _pack_children(child)


def _pads_with_zeros(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
