"""The one-shot stages as plain objects: pure functions of their inputs, weights aside.

Triton serves them through `backends/diffusion/model.py`; `LocalStages` runs them in one process,
for tests and for benchmarks that show what the server costs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn

from fullpipe.engines import full_fp32
from fullpipe.engines.onednn import pack
from fullpipe.errors import SetupError
from fullpipe.text import PromptEncoder


class PixelDecoder(nn.Module):
    """latents [N, 4, h, w] fp32, in the VAE's own units → images [N, H, W, 3] uint8.

    Truncated as ComfyUI's SaveImage does.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.decoder, self.post_quant_conv, self.dtype = vae.decoder, vae.post_quant_conv, vae.dtype

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """See the class."""
        latents = latents.to(self.dtype, memory_format=torch.channels_last)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        pixels = ((self.decoder(latents).float() + 1.0) / 2.0).clamp(0.0, 1.0) * 255.0
        return pixels.permute(0, 2, 3, 1).to(torch.uint8).contiguous()


class VaeDecoder:
    """Latents to pixels.

    Attributes:
        decoder: the module that does it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        is_packed: bool = True,
    ):
        """Load a diffusers `vae` folder; raises what `load_vae` raises."""
        vae = load_vae(folder, device, dtype, is_packed=is_packed)
        self.decoder = PixelDecoder(vae).requires_grad_(False)
        self._device = device

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode one picture after the other, which bounds memory.

        Args:
            latents: [N, 4, h, w] fp32 in the VAE's own units.
        Returns:
            [N, H, W, 3] uint8 on the CPU.
        """
        latents = latents.to(self._device, torch.float32)
        return torch.cat([self.decode_one(latent[None]).cpu() for latent in latents])

    def decode_one(self, latents: torch.Tensor) -> torch.Tensor:
        """[1, 4, h, w] fp32 → [1, H, W, 3] uint8, both on the device."""
        return self.decoder(latents)


class VaeEncoder:
    """Pixels to latents."""

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32):
        """Load a diffusers `vae` folder; raises SetupError when it is missing or broken."""
        vae = load_vae(folder, device, dtype)
        del vae.decoder
        self._vae = vae

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode to the mode of the latent distribution, as ComfyUI does.

        Args:
            images: [N, H, W, 3] uint8, H and W multiples of 8.
        Returns:
            [N, 4, H/8, W/8] fp32 in the VAE's own units, on the CPU.
        """
        vae = self._vae
        pixels = images.permute(0, 3, 1, 2).float() / 255.0 * 2.0 - 1.0
        latents = [
            vae.encode(picture[None].to(vae.device, vae.dtype)).latent_dist.mode().float().cpu()
            for picture in pixels
        ]
        return torch.cat(latents)


class LocalStages:
    """All stages of a checkpoint in this process; see `fullpipe.pipeline.Stages`."""

    def __init__(
        self, checkpoint: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ):
        self._text = PromptEncoder.from_folder(checkpoint, device=device, dtype=dtype)
        self._decoder = VaeDecoder(checkpoint / "vae", device=device, dtype=dtype)
        self._encoder = VaeEncoder(checkpoint / "vae", device=device, dtype=dtype)

    def encode_text(
        self, prompt: str, negative_prompt: str, clip_skip: int | None
    ) -> Mapping[str, torch.Tensor]:
        """See `Stages`."""
        return self._text.encode(prompt, negative_prompt, clip_skip)

    def encode_images(self, images: np.ndarray) -> torch.Tensor:
        """See `Stages`."""
        return self._encoder.encode(torch.from_numpy(np.ascontiguousarray(images)))

    def decode_latents(self, latents: torch.Tensor) -> np.ndarray:
        """See `Stages`."""
        return self._decoder.decode(latents).numpy()


def load_vae(
    folder: Path, device: str, dtype: torch.dtype, *, is_packed: bool = True
) -> AutoencoderKL:
    """Read a diffusers AutoencoderKL folder.

    Args:
        dtype: of weights and arithmetic; SDXL's overflows in fp16 and is computed in bf16 then.
        is_packed: whether its layers are replaced by `fullpipe.engines.onednn`'s on a CPU.
    Raises:
        SetupError: it is missing or broken.
    """
    full_fp32(dtype)
    try:
        if dtype == torch.float16 and needs_range(folder):
            dtype = torch.bfloat16
        vae = AutoencoderKL.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise SetupError(
            f"{folder} holds no readable VAE ({error}); `fullpipe assemble` writes one"
        ) from error
    vae = vae.to(device=device, memory_format=torch.channels_last).eval()
    return pack(vae) if is_packed else vae


def needs_range(folder: Path) -> bool:
    """Whether a VAE overflows in fp16, which is `force_upcast` in its configuration."""
    return bool(json.loads((folder / "config.json").read_text()).get("force_upcast", False))
