"""A tiny denoiser for both sides of the comparison; imports neither ComfyUI nor fullpipe."""

from __future__ import annotations

import torch
from torch.nn import functional


class TinyNetwork:
    """The exact denoiser of unit normal data plus a small random convolutional network.

    So samples stay of the size that they have in practice, and yet no step is linear in them.
    """

    def __init__(self, predicts_velocity: bool, dtype: torch.dtype):
        """Draw the weights from a fixed seed, in the given precision."""
        generator = torch.Generator().manual_seed(2024)
        self.predicts_velocity = predicts_velocity
        self.first, self.second = (
            (torch.randn(shape, generator=generator) * 0.25).to(dtype)
            for shape in ((8, 4, 3, 3), (4, 8, 3, 3))
        )

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The scaled sample [B, 4, h, w], its sigma [B] and a context [B, 8] to the prediction."""
        sigma = sigma.view(-1, 1, 1, 1).to(x.dtype)
        alpha = 1 / (sigma**2 + 1) ** 0.5
        hidden = functional.conv2d(x, self.first, padding=1)
        hidden = torch.tanh(hidden + context.to(x.dtype)[:, :, None, None] + 0.3 * (1 - alpha))
        velocity = functional.conv2d(hidden, self.second, padding=1)
        if self.predicts_velocity:
            return velocity
        return alpha * velocity + sigma * alpha * x


def contexts() -> tuple[torch.Tensor, torch.Tensor]:
    """The positive and the negative prompt: [1, 8] each."""
    positive, negative = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(7)) * 0.5
    return positive, negative


def start_latent(batch: int, size: int) -> torch.Tensor:
    """The picture that image to image starts from, in the model's own scale."""
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(11))


def noise_mask(size: int) -> torch.Tensor:
    """What to repaint, [1, size, size]: the right half, with a soft border."""
    return torch.linspace(-1.0, 2.0, size).clamp(0, 1).expand(1, size, size).clone()
