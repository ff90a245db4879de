"""The engine that runs anywhere: diffusers' UNet in eager torch, no build step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from fullpipe.errors import SetupError


class TorchUNet:
    """A diffusers UNet folder as an `Engine`."""

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32):
        """Load config.json and the safetensors of `folder`.

        Raises:
            SetupError: the folder is missing or its files are broken.
        """
        try:
            unet = UNet2DConditionModel.from_pretrained(
                folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise SetupError(
                f"{folder} holds no readable UNet ({error}); `fullpipe assemble` writes one"
            ) from error
        self._unet = unet.to(device=device, memory_format=torch.channels_last).eval()
        self._dtype = dtype

    @torch.inference_mode()
    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Predict noise for every row; see `Engine`."""
        added = None
        if "text_embeds" in tensors:
            added = {
                "text_embeds": tensors["text_embeds"].to(self._dtype),
                "time_ids": tensors["time_ids"].to(self._dtype),
            }
        (noise_pred,) = self._unet(
            tensors["sample"].to(self._dtype, memory_format=torch.channels_last),
            tensors["timestep"],
            encoder_hidden_states=tensors["encoder_hidden_states"].to(self._dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )
        return {"noise_pred": noise_pred.float().contiguous()}
