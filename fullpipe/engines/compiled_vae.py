"""The VAE's decoder through Inductor ahead of time: a package per size, one picture each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fullpipe.config import PipelineConfig
from fullpipe.engines.ahead_of_time import Package, check_package, compile_package
from fullpipe.engines.build_pool import build_apart
from fullpipe.engines.package_cache import PackageCache
from fullpipe.errors import SetupError
from fullpipe.stages import VaeDecoder


class CompiledVaeDecoder(VaeDecoder):
    """`VaeDecoder` that decodes some sizes with packages; the others in eager torch."""

    def __init__(self, folder: Path, config: PipelineConfig, device: str, dtype: torch.dtype):
        """Load the weights of `folder` and what `build_decoder` left there.

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


def build_decoder(
    folder: Path, config: PipelineConfig, dtype: torch.dtype, report: Callable[[str], None]
) -> None:
    """Compile the decoder of a diffusers `vae` folder for every one of `config.loop.sizes`.

    Raises:
        SetupError: the weights are broken, or a compiler is missing or failed.
    """
    device = config.loop.devices[0]
    cache = PackageCache(folder / "config.json", device, str(dtype))
    channels = config.checkpoint.latent_channels
    jobs, shapes = {}, {}
    for size in _latent_sizes(config):
        name = _file(*size)
        shapes[name] = {"part": "decoder", "latents": [1, channels, *size]}
        if cache.take(shapes[name], folder / name):
            report(f"{name} was compiled before")
        else:
            jobs[name] = (_build_one, (folder, device, dtype, shapes[name]["latents"], name))
    for name in build_apart(jobs, report):
        cache.keep(shapes[name], folder / name)


def _build_one(folder: Path, device: str, dtype: torch.dtype, shape: list[int], name: str) -> None:
    decoder = VaeDecoder(folder, device=device, dtype=dtype, is_packed=False).decoder
    latents = torch.randn(shape, device=device)
    compile_package(decoder, [latents], folder / name)
    check_package(folder / name, decoder, [latents])


def _latent_sizes(config: PipelineConfig) -> list[tuple[int, int]]:
    scale = config.checkpoint.vae_scale_factor
    return [(height // scale, width // scale) for width, height in config.loop.sizes]


def _file(height: int, width: int) -> str:
    return f"decoder-{height}x{width}.pt2"
