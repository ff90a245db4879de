"""The `compiled` engine: the UNet through Inductor ahead of time, a package per size and rows.

`unet_packages` says what is compiled when a repository is assembled, once for all checkpoints of
an architecture; `CompiledUNet.load` only opens packages. What no package was built for, a prompt of
several chunks for example, goes through the same weights in eager torch: the same image, later. For
step caching there are two packages per size and rows, one for each kind of pass.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fullpipe.config import LoopSettings
from fullpipe.engines import TOKENS, Engine, in_order
from fullpipe.engines.ahead_of_time import Package, check_package, compile_package
from fullpipe.engines.loading import torch_dtype
from fullpipe.engines.package_cache import PackageCache
from fullpipe.engines.packages import Wanted
from fullpipe.engines.shallow import SHALLOW_LAYERS, ShallowPass, WholePass
from fullpipe.engines.torch_engine import Fp32Ends, load_network
from fullpipe.errors import SetupError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Signature:
    """What one package was built for: latent height and width, prompt tokens, UNet rows, pass.

    Attributes:
        part: for step caching "whole" or "shallow", a pass of `fullpipe.engines.shallow`; "" is
            the UNet as it is.
    """

    height: int
    width: int
    tokens: int
    rows: int
    part: str = ""

    @property
    def file(self) -> str:
        """Name of its package."""
        part = f"-{self.part}" if self.part else ""
        return f"{self.height}x{self.width}-{self.tokens}-{self.rows}{part}.pt2"

    @property
    def facts(self) -> dict[str, Any]:
        """What `PackageCache` knows it by."""
        facts = dataclasses.asdict(self)
        if self.part:
            return {**facts, "shallow_layers": SHALLOW_LAYERS}
        del facts["part"]
        return facts


class CompiledUNet(Engine):
    """A UNet of which some shapes run from packages."""

    def __init__(
        self,
        network: Fp32Ends,
        device: torch.device,
        packages: Mapping[Signature, Path],
        dtype: torch.dtype,
    ):
        """Open the packages for a network whose weights, of `dtype`, are on `device`."""
        parts = {signature.part for signature in packages}
        self.is_capturable = device.type == "cuda"
        self.has_shallow_pass = "shallow" in parts
        self._network = network
        self._parts = {part: _part(network, part, dtype) for part in parts}
        self._packages = {
            signature: Package(path, self._parts[signature.part], device)
            for signature, path in packages.items()
        }

    @classmethod
    def load(cls, folder: Path, settings: LoopSettings) -> CompiledUNet:
        """Load the weights of `folder` and what was made of `unet_packages`.

        Raises:
            SetupError: the weights or a package are missing or broken.
        """
        network = _load_fused(folder, settings)
        paths = {s: folder / s.file for s in _signatures(network, settings)}
        missing = [path.name for path in paths.values() if not path.is_file()]
        if missing:
            raise SetupError(f"{folder} lacks {', '.join(missing)}; assemble it again")
        dtype = torch_dtype(settings.precision)
        return cls(network, torch.device(settings.device), paths, dtype)

    @property
    def network(self) -> nn.Module:
        """The module whose weights every package reads; to be changed in place only."""
        return self._network

    def row_counts(self, height: int, width: int, tokens: int) -> tuple[int, ...]:
        """See `Engine`."""
        shape = (height, width, tokens)
        return tuple(
            sorted({s.rows for s in self._packages if (s.height, s.width, s.tokens) == shape})
        )

    @torch.inference_mode()
    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Engine`."""
        inputs = [tensor.contiguous() for tensor in in_order(tensors)]
        rows, _, height, width = tensors["sample"].shape
        tokens = tensors["encoder_hidden_states"].shape[1]
        part = ""
        if self.has_shallow_pass:
            part = "shallow" if "deep" in tensors else "whole"
        if part == "shallow":
            inputs = [tensors["deep"].contiguous(), *inputs]
        package = self._packages.get(Signature(height, width, tokens, rows, part))
        answer = (package or self._parts[part])(*inputs)
        if part != "whole":
            return {"noise_pred": answer}
        noise_pred, deep = answer
        return {"noise_pred": noise_pred, "deep": deep}


def unet_packages(folder: Path, settings: LoopSettings) -> list[Wanted]:
    """A package for every one of `settings.sizes` with every one of `settings.buckets`.

    With `settings.step_cache` there are two each, one for either pass.

    Args:
        folder: a diffusers `unet` folder; the packages belong into it.
        settings: `device` must be here, as kernels are made for its architecture.
    Raises:
        SetupError: the weights are broken.
    """
    device = settings.devices[0]
    settings = dataclasses.replace(settings, device=device)
    on_cpu = dataclasses.replace(settings, device="cpu")
    cache = PackageCache(folder / "config.json", device, settings.precision)
    return [
        Wanted(folder / s.file, device, cache, s.facts, _build_one, (folder, settings, s))
        for s in _signatures(_load_fused(folder, on_cpu), settings)
    ]


def _build_one(folder: Path, settings: LoopSettings, signature: Signature) -> None:
    network = _load_fused(folder, settings)
    dtype = torch_dtype(settings.precision)
    inputs = _example(network, signature, torch.device(settings.device))
    if signature.part == "shallow":
        with torch.inference_mode():
            _, deep = WholePass(network.unet, dtype)(*inputs)
        inputs = (deep.clone(), *inputs)
    module = _part(network, signature.part, dtype)
    compile_package(module, inputs, folder / signature.file)
    check_package(folder / signature.file, module, inputs)


def _part(network: Fp32Ends, part: str, dtype: torch.dtype) -> nn.Module:
    if not part:
        return network
    return {"whole": WholePass, "shallow": ShallowPass}[part](network.unet, dtype).eval()


def _signatures(network: Fp32Ends, settings: LoopSettings) -> list[Signature]:
    """Sizes come in pixels, the native one first, which the UNet's configuration has in latents."""
    config: Any = network.unet.config
    scale = settings.sizes[0][0] // config.sample_size
    parts = ("whole", "shallow") if settings.step_cache else ("",)
    return [
        Signature(height // scale, width // scale, TOKENS, rows, part)
        for (width, height), rows, part in itertools.product(
            settings.sizes, settings.buckets, parts
        )
    ]


def _example(
    network: Fp32Ends, signature: Signature, device: torch.device
) -> tuple[torch.Tensor, ...]:
    config: Any = network.unet.config
    rows = signature.rows
    sample = torch.randn(rows, config.in_channels, signature.height, signature.width)
    timestep = torch.full((rows,), 500)
    inputs = [sample, timestep, torch.randn(rows, signature.tokens, config.cross_attention_dim)]
    if config.addition_embed_type == "text_time":
        sizes = 6
        pooled = (
            config.projection_class_embeddings_input_dim - sizes * config.addition_time_embed_dim
        )
        inputs += [torch.randn(rows, pooled), torch.full((rows, sizes), 512.0)]
    return tuple(tensor.to(device) for tensor in inputs)


def _load_fused(folder: Path, settings: LoopSettings) -> Fp32Ends:
    """The network with one projection for what has one input; its parts stay as views into it."""
    network = load_network(folder, device=settings.device, dtype=torch_dtype(settings.precision))
    network.unet.fuse_qkv_projections()
    for module in network.modules():
        for whole, parts in (("to_qkv", "qkv"), ("to_kv", "kv")):
            if (fused := getattr(module, whole, None)) is not None:
                split = fused.weight.data.chunk(len(parts))
                for part, weight in zip(parts, split, strict=True):
                    getattr(module, f"to_{part}").weight.data = weight
    return network.requires_grad_(False)
