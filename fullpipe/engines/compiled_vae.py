"""The VAE's decoder through Inductor ahead of time: a package per size, one picture each."""

from __future__ import annotations

from pathlib import Path

import torch

from fullpipe.config import PipelineConfig
from fullpipe.engines.ahead_of_time import Package, check_package, compile_package
from fullpipe.engines.package_cache import PackageCache
from fullpipe.engines.packages import Wanted
from fullpipe.errors import SetupError
from fullpipe.stages import VaeDecoder


class CompiledVaeDecoder(VaeDecoder):
    """`VaeDecoder` that decodes some sizes with packages; the others in eager torch."""

    def __init__(self, folder: Path, config: PipelineConfig, device: str, dtype: torch.dtype):
        """Load the weights of `folder` and what was made of `decoder_packages`.

        Raises:
            SetupError: the weights or a package are missing or broken.
        """
        super().__init__(folder, device=device, dtype=dtype, is_packed=False)
        self._packages = {}
        for height, width in _latent_sizes(config):
            path = folder / _file(height, width)
            if not path.is_file():
                raise SetupError(f"{folder} lacks {path.name}; assemble it again")
            self._packages[height, width] = Package(path, self.decoder, torch.device(device))

    def decode_one(self, latents: torch.Tensor) -> torch.Tensor:
        """See `VaeDecoder`."""
        decode = self._packages.get((latents.shape[2], latents.shape[3]), self.decoder)
        return decode(latents.contiguous())


def decoder_packages(folder: Path, config: PipelineConfig, dtype: torch.dtype) -> list[Wanted]:
    """A package of the decoder of a diffusers `vae` folder for every one of `config.loop.sizes`.

    Args:
        folder: the packages belong into it.
        dtype: as `VaeDecoder` takes it.
    """
    device = config.loop.devices[0]
    cache = PackageCache(folder / "config.json", device, str(dtype))
    packages = []
    for size in _latent_sizes(config):
        shape = [1, config.checkpoint.latent_channels, *size]
        facts = {"part": "decoder", "latents": shape}
        path = folder / _file(*size)
        packages.append(
            Wanted(path, device, cache, facts, _build_one, (path, device, dtype, shape))
        )
    return packages


def _build_one(path: Path, device: str, dtype: torch.dtype, shape: list[int]) -> None:
    decoder = VaeDecoder(path.parent, device=device, dtype=dtype, is_packed=False).decoder
    latents = torch.randn(shape, device=device)
    compile_package(decoder, [latents], path)
    check_package(path, decoder, [latents])


def _latent_sizes(config: PipelineConfig) -> list[tuple[int, int]]:
    scale = config.checkpoint.vae_scale_factor
    return [(height // scale, width // scale) for width, height in config.loop.sizes]


def _file(height: int, width: int) -> str:
    return f"decoder-{height}x{width}.pt2"
