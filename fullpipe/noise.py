"""The random numbers of a request: where ComfyUI would draw the same ones.

A request owns its generators, so its noise depends on its seed and shape alone and never on who
else is in the batch.
"""

from __future__ import annotations

import warnings

import torch
import torchsde

# It rounds the ends of its interval to its tolerance, and then warns of every query at an end.
warnings.filterwarnings("ignore", r"Should have t[ab][<>]=t[01]", module="torchsde")


def start_noise(seed: int, batch: int, height: int, width: int, channels: int = 4) -> torch.Tensor:
    """The noise that sampling starts from (ComfyUI's prepare_noise).

    Args:
        seed: 0 ... 2^64 - 1.
        batch: images of the request; the first of them equals the request of a single image.
        height, width: of the latents.
        channels: of the latents.
    Returns:
        [batch, channels, height, width] fp32, unit normal, on the CPU.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn([batch, channels, height, width], generator=generator, device="cpu")


class SamplerNoise:
    """The noise that a stochastic sampler adds on its way, one draw per table row that asks.

    "normal" is k-diffusion's default_noise_sampler: a second generator with the same seed, on the
    sample's device. "brownian" and "brownian_gpu" are its BrownianTreeNoiseSampler, increments of
    one Brownian motion over sigma, so that a sampler that looks at the same interval twice sees the
    same path; the tree grows on the CPU or on the sample's device.
    """

    def __init__(
        self,
        kind: str,
        seed: int,
        shape: tuple[int, ...],
        sigma_min: float,
        sigma_max: float,
        device: torch.device | str = "cpu",
    ):
        """Prepare the draws of one request.

        Args:
            kind: `Sampler.noise_kind`.
            seed: the request's seed.
            shape: [B, 4, h, w] of the request's latents.
            sigma_min: the least sigma above 0 that the request visits.
            sigma_max: the greatest.
            device: where the sample lives and the draws are wanted.
        """
        if kind not in ("none", "normal", "brownian", "brownian_gpu"):
            raise ValueError(f"unknown kind of noise: {kind}")
        self._kind, self._seed, self._shape = kind, seed, tuple(shape)
        self._span = torch.tensor([sigma_min, sigma_max], dtype=torch.float32)
        self._device = torch.device(device)
        self._tree_device = torch.device("cpu") if kind == "brownian" else self._device
        self._tree: torchsde.BrownianTree | None = None
        if kind == "normal":
            self._generator = torch.Generator(device=self._device).manual_seed(seed)

    @property
    def is_drawn_on_cpu(self) -> bool:
        """Whether drawing keeps the CPU busy and no GPU."""
        return (self._tree_device if self._kind == "brownian" else self._device).type == "cpu"

    def draw(self, interval: tuple[float, float]) -> torch.Tensor:
        """The next noise of the request; rows must ask in the order of their table.

        Args:
            interval: `Row.noise`, the sigmas that the draw lies between.
        Returns:
            [B, 4, h, w] fp32, unit normal, on the request's device.
        """
        if self._kind == "none":
            raise ValueError("this sampler draws no noise")
        if self._kind == "normal":
            return torch.randn(self._shape, generator=self._generator, device=self._device)
        if self._tree is None:
            start, end = self._span.to(self._tree_device)
            w0 = torch.zeros(self._shape, device=self._tree_device)
            self._tree = torchsde.BrownianTree(start, w0, end, entropy=self._seed)
        sigma, sigma_next = torch.tensor(interval, dtype=torch.float32, device=self._tree_device)
        increment = -self._tree(sigma_next, sigma)
        return (increment / (sigma - sigma_next).abs().sqrt()).to(self._device)
