"""Step caching: a UNet in two, so that most steps run its outermost layers alone.

From one step to the next, what the deep layers of a UNet make of a picture hardly changes; what
changes is fine, and the outermost layers see that in the sample itself. So a whole pass also gives
its deep features, and a shallow pass computes `conv_in`, the first layers of the first down block,
the last layers of the last up block and what follows it, and takes the rest from an earlier whole
pass. The idea is that of Ma, Fang, Wang, "DeepCache: Accelerating Diffusion Models for Free",
arXiv:2312.00858, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fullpipe.engines.twins import spread
from fullpipe.errors import SetupError

# Of the last up block's layers. Two of SD's three: a quarter of a whole pass's work with SD1.x and
# less with SDXL, where all three are two fifths; and deep features of half as many channels.
SHALLOW_LAYERS = 2


class _Pass(nn.Module):
    def __init__(self, unet: Any, dtype: torch.dtype):
        """
        Args:
            unet: a UNet2DConditionModel; its weights keep the names that `Fp32Ends` gives them.
            dtype: of its weights.
        Raises:
            SetupError: it has parts that no UNet of SD1.x, SD2.x or SDXL has.
        """
        super().__init__()
        _check(unet)
        self.unet = unet
        self._dtype = dtype


class WholePass(_Pass):
    """A diffusers UNet of any precision that also gives its deep features."""

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs as the UNet bindings of `Engine`; returns its noise_pred and deep."""
        unet, text = self.unet, encoder_hidden_states.to(self._dtype)
        x, temb = _enter(unet, sample, timestep, text, text_embeds, time_ids)
        skips = [x]
        for block in unet.down_blocks:
            x, left = block(hidden_states=x, temb=temb, **_prompt(block, text))
            skips += left
        x = unet.mid_block(x, temb, **_prompt(unet.mid_block, text))
        is_even = all(side % 2**unet.num_upsamplers == 0 for side in sample.shape[2:])
        for block in unet.up_blocks[:-1]:
            count = len(block.resnets)
            own, skips = tuple(skips[-count:]), skips[:-count]
            size = None if is_even else skips[-1].shape[2:]
            x = block(
                hidden_states=x,
                temb=temb,
                res_hidden_states_tuple=own,
                upsample_size=size,
                **_prompt(block, text),
            )
        last = unet.up_blocks[-1]
        for index in range(_first(last)):
            x = _up_layer(last, index, x, skips, temb, text)
        return _leave(unet, x, skips, temb, text), x.permute(0, 2, 3, 1).contiguous()


class ShallowPass(_Pass):
    """The outermost layers of the same UNet."""

    def forward(
        self,
        deep: torch.Tensor,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What an earlier `WholePass` gave and inputs as it took them; returns noise_pred."""
        unet, text = self.unet, encoder_hidden_states.to(self._dtype)
        x, temb = _enter(unet, sample, timestep, text, text_embeds, time_ids)
        skips = [x]
        last = unet.up_blocks[-1]
        for index in range(len(last.resnets) - _first(last) - 1):
            skips.append(_layer(unet.down_blocks[0], index, skips[-1], temb, text))
        return _leave(unet, deep.permute(0, 3, 1, 2), skips, temb, text)


def _check(unet: Any) -> None:
    config = unet.config
    odd = {
        "encoder_hid_dim_type": config.encoder_hid_dim_type,
        "class_embed_type": config.class_embed_type,
        "num_class_embeds": config.num_class_embeds,
        "center_input_sample": config.center_input_sample,
        "time_embedding_act_fn": config.time_embedding_act_fn,
    }
    found = [f"{name}={value}" for name, value in odd.items() if value]
    if config.addition_embed_type not in (None, "text_time"):
        found.append(f"addition_embed_type={config.addition_embed_type}")
    if found or unet.mid_block is None:
        raise SetupError(
            f"step caching with a UNet of {', '.join(found) or 'no middle block'};"
            " allowed are those of SD1.x, SD2.x and SDXL"
        )


def _enter(
    unet: Any,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    text: torch.Tensor,
    text_embeds: torch.Tensor | None,
    time_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `conv_in` makes of the sample, and the embedding of timestep and, for SDXL, sizes."""
    sample = sample.to(text.dtype, memory_format=torch.channels_last)
    temb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
    if text_embeds is not None and time_ids is not None:
        added = {"text_embeds": text_embeds.to(text.dtype), "time_ids": time_ids}
        temb = temb + unet.get_aug_embed(
            emb=temb, encoder_hidden_states=text, added_cond_kwargs=added
        )
    return unet.conv_in(sample), temb


def _leave(
    unet: Any, deep: torch.Tensor, skips: list[torch.Tensor], temb: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """The shallow layers of the last up block and what follows it: noise_pred, fp32."""
    last = unet.up_blocks[-1]
    x = deep
    for index in range(_first(last), len(last.resnets)):
        x = _up_layer(last, index, x, skips, temb, text)
    x = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
    return x.float().contiguous()


def _first(last: Any) -> int:
    """The last up block's first layer that is shallow."""
    return max(0, len(last.resnets) - SHALLOW_LAYERS)


def _up_layer(
    last: Any,
    index: int,
    x: torch.Tensor,
    skips: list[torch.Tensor],
    temb: torch.Tensor,
    text: torch.Tensor,
) -> torch.Tensor:
    """A layer of the last up block; its last one looks at the first of `skips`, and so on."""
    skip = spread(skips[len(last.resnets) - 1 - index], len(x))
    return _layer(last, index, torch.cat([x, skip], dim=1), temb, text)


def _layer(
    block: Any, index: int, x: torch.Tensor, temb: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """A residual network of a block and the attention after it, where there is one."""
    x = block.resnets[index](x, temb)
    if not getattr(block, "attentions", None):
        return x
    (x,) = block.attentions[index](x, encoder_hidden_states=text, return_dict=False)
    return x


def _prompt(block: Any, text: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
