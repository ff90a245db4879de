"""The engine that runs anywhere: diffusers' UNet in eager torch, no build step.

On a CPU the rows of a call are shared out to as many threads as there are cores, each of which
computes alone. Rows are independent, so the threads never wait for each other inside a call,
where torch's own way (all threads on every small operation) meets at a barrier hundreds of times
a step and collapses as soon as another process wants a core.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from fullpipe.engines import Engine
from fullpipe.engines.onednn import pack
from fullpipe.errors import SetupError


class TorchUNet(Engine):
    """A diffusers UNet folder as an `Engine`."""

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32):
        """Load config.json and the safetensors of `folder`.

        Raises:
            SetupError: the folder is missing or its files are broken.
        """
        try:
            unet = UNet2DConditionModel.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise SetupError(
                f"{folder} holds no readable UNet ({error}); `fullpipe assemble` writes one"
            ) from error
        self._unet = pack(unet.to(device=device, memory_format=torch.channels_last).eval())
        self._dtype = dtype
        self._cores = torch.get_num_threads() if device == "cpu" else 1
        self._threads = ThreadPoolExecutor(
            self._cores, "unet", initializer=torch.set_num_threads, initargs=(1,)
        )

    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Predict noise for every row; see `Engine`."""
        rows = len(tensors["sample"])
        if self._cores == 1 or rows < self._cores:
            return {"noise_pred": self._predict(tensors)}
        parts = zip(*(tensor.tensor_split(self._cores) for tensor in tensors.values()), strict=True)
        shares = [dict(zip(tensors, part, strict=True)) for part in parts]
        return {"noise_pred": torch.cat(list(self._threads.map(self._predict, shares)))}

    @torch.inference_mode()
    def _predict(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
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
        return noise_pred.float().contiguous()
