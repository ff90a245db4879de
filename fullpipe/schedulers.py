"""Sigma schedules: from (scheduler, steps, denoise) to the noise levels a sampler visits.

The arithmetic, its precision included, is that of ComfyUI's `comfy.samplers` and
`comfy.model_sampling`, so that the same request visits bit for bit the same sigmas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy.stats import beta as beta_distribution

from fullpipe.errors import InvalidRequest, SetupError

# A denoise below 1 computes int(steps / denoise) sigmas and keeps the last ones.
MAX_SCHEDULE_STEPS = 10_000

# These visit one sigma more than asked for and skip the last one before zero.
DISCARDS_PENULTIMATE_SIGMA = frozenset({"dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"})


class ModelSampling:
    """How a discrete-time diffusion model relates timesteps, noise levels and its output.

    Sigma is the noise-to-signal ratio √((1 - ᾱ)/ᾱ) (Karras et al. 2022); a sample at sigma is
    image + sigma · unit noise. ComfyUI's names: ModelSamplingDiscrete, EPS, V_PREDICTION.

    Attributes:
        sigmas: [num_train_timesteps] fp32 on the CPU, ascending.
        log_sigmas: [num_train_timesteps] fp32, log of the unrounded sigmas.
        sigma_min, sigma_max: 0-d fp32.
        prediction_type: "epsilon" or "v_prediction".
    """

    def __init__(self, sigmas: torch.Tensor, prediction_type: str):
        """Take ascending float64 sigmas [num_train_timesteps] and what the network predicts."""
        if prediction_type not in ("epsilon", "v_prediction"):
            raise SetupError(
                f"scheduler_config.json: prediction_type={prediction_type!r} must be 'epsilon' or "
                "'v_prediction'"
            )
        self.sigmas = sigmas.float()
        self.log_sigmas = sigmas.log().float()
        self.sigma_min = self.sigmas[0]
        self.sigma_max = self.sigmas[-1]
        self.prediction_type = prediction_type

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> ModelSampling:
        """Read the training noise schedule from a diffusers `scheduler_config.json`.

        Args:
            config: the parsed file; uses beta_start, beta_end, beta_schedule,
                num_train_timesteps, prediction_type and rescale_betas_zero_snr.
        Raises:
            SetupError: the schedule is not one that ComfyUI and this library know.
        """
        if config.get("trained_betas") is not None:
            raise SetupError("scheduler_config.json: trained_betas must be null")
        start, end = config.get("beta_start", 0.00085), config.get("beta_end", 0.012)
        steps = config.get("num_train_timesteps", 1000)
        schedule = config.get("beta_schedule", "scaled_linear")
        if schedule == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        elif schedule == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        else:
            raise SetupError(
                f"scheduler_config.json: beta_schedule={schedule!r} must be 'scaled_linear' or "
                "'linear'"
            )
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
        if config.get("rescale_betas_zero_snr", False):
            sigmas = _rescale_zero_terminal_snr(sigmas)
        return cls(sigmas, config.get("prediction_type", "epsilon"))

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """The training timestep nearest in log sigma: fp32 of any shape -> int64, same shape."""
        distance = sigma.log().reshape(-1) - self.log_sigmas.to(sigma.device)[:, None]
        return distance.abs().argmin(dim=0).view(sigma.shape)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Sigma at a fractional timestep, linear in log sigma: any shape -> fp32, same shape."""
        timestep = timestep.float().clamp(min=0, max=len(self.sigmas) - 1)
        log_sigmas = self.log_sigmas.to(timestep.device)
        low, high, weight = timestep.floor().long(), timestep.ceil().long(), timestep.frac()
        return ((1 - weight) * log_sigmas[low] + weight * log_sigmas[high]).exp()

    def percent_to_sigma(self, percent: float) -> float:
        """Sigma after this share of the denoising, 0.0 (all noise) to 1.0 (none)."""
        if percent <= 0.0:
            return 999999999.9
        if percent >= 1.0:
            return 0.0
        return self.sigma(torch.tensor((1.0 - percent) * 999.0)).item()

    def is_max_denoise(self, sigma: float | torch.Tensor) -> bool:
        """Whether sampling that starts at this sigma starts from pure noise."""
        sigma, sigma_max = float(sigma), float(self.sigma_max)
        return math.isclose(sigma_max, sigma, rel_tol=1e-05) or sigma > sigma_max

    def start(
        self, noise: torch.Tensor, latent: torch.Tensor, sigma: float | torch.Tensor
    ) -> torch.Tensor:
        """The sample at the first sigma.

        Args:
            noise: [B, 4, h, w] fp32, unit normal.
            latent: [B, 4, h, w] fp32, scaled image latents; zeros for text to image.
            sigma: the first of the request's sigmas.
        Returns:
            [B, 4, h, w] fp32, new storage.
        """
        sigma = torch.as_tensor(sigma, dtype=noise.dtype, device=noise.device)
        scale = torch.sqrt(1.0 + sigma**2.0) if self.is_max_denoise(sigma) else sigma
        return noise * scale + latent

    def input_scale(self, sigma: torch.Tensor) -> torch.Tensor:
        """What a sample at sigma is multiplied by before the network sees it: 1/√(σ² + 1)."""
        return 1 / (sigma**2 + 1.0) ** 0.5

    def denoised(
        self, x: torch.Tensor, sigma: torch.Tensor, model_output: torch.Tensor
    ) -> torch.Tensor:
        """The image latents that the network's output stands for.

        Args:
            x: [B, 4, h, w], the unscaled sample.
            sigma: [B] or 0-d.
            model_output: [B, 4, h, w], predicted noise or velocity.
        Returns:
            [B, 4, h, w], the prediction of x at sigma 0.
        """
        sigma = sigma.view(sigma.shape + (1,) * (x.ndim - 1)) if sigma.ndim else sigma
        if self.prediction_type == "epsilon":
            return x - model_output * sigma
        return x / (sigma**2 + 1) - model_output * sigma / (sigma**2 + 1) ** 0.5


def calculate_sigmas(
    sampling: ModelSampling,
    scheduler: str,
    steps: int,
    denoise: float = 1.0,
    sampler_name: str = "euler",
) -> torch.Tensor:
    """The noise levels of a request, as ComfyUI's KSampler computes them.

    Args:
        sampling: the checkpoint's noise schedule.
        scheduler: one of SCHEDULERS.
        steps: how many steps the user asked for, at least 1. `ddim_uniform` and `beta` may take
            a few more or less.
        denoise: in (0, 1]; below 1 only the last `steps` of int(steps / denoise) are kept.
        sampler_name: some samplers skip the last sigma before zero.
    Returns:
        [n + 1] fp32 on the CPU, descending, the last is 0.
    Raises:
        InvalidRequest: an unknown scheduler, or a combination without a finite schedule.
    """
    if scheduler not in _SCHEDULES:
        raise InvalidRequest(f"scheduler={scheduler!r} must be one of {', '.join(SCHEDULERS)}")
    if steps < 1:
        raise InvalidRequest(f"steps={steps} must be at least 1")
    if not 0.0 < denoise <= 1.0:
        raise InvalidRequest(f"denoise={denoise} must be above 0 and at most 1")
    if steps / denoise > MAX_SCHEDULE_STEPS:
        raise InvalidRequest(
            f"steps={steps} with denoise={denoise} must give steps/denoise at most "
            f"{MAX_SCHEDULE_STEPS}"
        )

    total = steps if denoise > 0.9999 else int(steps / denoise)
    if sampler_name in DISCARDS_PENULTIMATE_SIGMA:
        sigmas = _SCHEDULES[scheduler](sampling, total + 1)
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    else:
        sigmas = _SCHEDULES[scheduler](sampling, total)
    if denoise <= 0.9999:
        sigmas = sigmas[-(steps + 1) :]

    if len(sigmas) < 2 or not bool(torch.isfinite(sigmas).all()):
        raise InvalidRequest(
            f"scheduler={scheduler!r} has no schedule of steps={steps} with denoise={denoise} "
            f"for sampler_name={sampler_name!r}; take more steps"
        )
    return sigmas


def _simple(sampling: ModelSampling, steps: int) -> torch.Tensor:
    """Every (1000/steps)-th training sigma, from the noisiest down."""
    stride = len(sampling.sigmas) / steps
    picked = [float(sampling.sigmas[-(1 + int(i * stride))]) for i in range(steps)]
    return torch.tensor([*picked, 0.0])


def _normal(sampling: ModelSampling, steps: int) -> torch.Tensor:
    """Timesteps evenly spaced from the last training timestep to the first."""
    timesteps = torch.linspace(len(sampling.sigmas) - 1, 0, steps)
    return torch.tensor([*(float(sampling.sigma(t)) for t in timesteps), 0.0])


def _sgm_uniform(sampling: ModelSampling, steps: int) -> torch.Tensor:
    """As `normal` with one more, of which the last is left out (Stability's sgm)."""
    timesteps = torch.linspace(len(sampling.sigmas) - 1, 0, steps + 1)[:-1]
    return torch.tensor([*(float(sampling.sigma(t)) for t in timesteps), 0.0])


def _karras(sampling: ModelSampling, steps: int, rho: float = 7.0) -> torch.Tensor:
    """Equation 5 of Karras et al. (2022), arXiv:2206.00364."""
    low, high = float(sampling.sigma_min) ** (1 / rho), float(sampling.sigma_max) ** (1 / rho)
    sigmas = (high + torch.linspace(0, 1, steps) * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _exponential(sampling: ModelSampling, steps: int) -> torch.Tensor:
    """Evenly spaced in log sigma."""
    low, high = math.log(float(sampling.sigma_min)), math.log(float(sampling.sigma_max))
    sigmas = torch.linspace(high, low, steps).exp()
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _ddim_uniform(sampling: ModelSampling, steps: int) -> torch.Tensor:
    """Timesteps 1, 1 + stride, ... of DDIM, Song et al. (2021), arXiv:2010.02502."""
    stride = max(len(sampling.sigmas) // steps, 1)
    return torch.cat([sampling.sigmas.new_zeros(1), sampling.sigmas[1::stride]]).flip(0)


def _beta(
    sampling: ModelSampling, steps: int, alpha: float = 0.6, beta: float = 0.6
) -> torch.Tensor:
    """Timesteps at quantiles of a beta distribution, without repeats; arXiv:2407.12173."""
    quantiles = 1 - np.linspace(0, 1, steps, endpoint=False)
    last = len(sampling.sigmas) - 1
    timesteps = np.rint(beta_distribution.ppf(quantiles, alpha, beta) * last).astype(int)
    distinct = timesteps[np.diff(timesteps, prepend=-1) != 0]
    return torch.tensor([*sampling.sigmas[distinct].tolist(), 0.0])


def _linear_quadratic(
    sampling: ModelSampling, steps: int, threshold_noise: float = 0.025
) -> torch.Tensor:
    """Half of the steps linear down to 1 - threshold, then quadratic (Mochi 1, Movie Gen)."""
    if steps == 1:
        return torch.tensor([1.0, 0.0]) * sampling.sigma_max
    linear_steps = steps // 2
    quadratic_steps = steps - linear_steps
    excess = linear_steps - threshold_noise * steps
    quadratic = excess / (linear_steps * quadratic_steps**2)
    linear = threshold_noise / linear_steps - 2 * excess / quadratic_steps**2
    constant = quadratic * linear_steps**2
    done = [i * threshold_noise / linear_steps for i in range(linear_steps)]
    done += [quadratic * i**2 + linear * i + constant for i in range(linear_steps, steps)]
    return torch.tensor([*(1.0 - share for share in done), 0.0]) * sampling.sigma_max


def _kl_optimal(sampling: ModelSampling, steps: int) -> torch.Tensor:
    """Evenly spaced in arctan sigma: Sabour et al., Align Your Steps (2024), arXiv:2404.14507."""
    low, high = math.atan(float(sampling.sigma_min)), math.atan(float(sampling.sigma_max))
    ramp = torch.arange(steps, dtype=torch.float) / (steps - 1)
    sigmas = (ramp * low + (1 - ramp) * high).tan()
    return torch.cat([sigmas, sigmas.new_zeros(1)])


_SCHEDULES: dict[str, Callable[[ModelSampling, int], torch.Tensor]] = {
    "simple": _simple,
    "sgm_uniform": _sgm_uniform,
    "karras": _karras,
    "exponential": _exponential,
    "ddim_uniform": _ddim_uniform,
    "beta": _beta,
    "normal": _normal,
    "linear_quadratic": _linear_quadratic,
    "kl_optimal": _kl_optimal,
}

SCHEDULERS = tuple(_SCHEDULES)


def _rescale_zero_terminal_snr(sigmas: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of Lin et al. (2024), arXiv:2305.08891: no signal at the last timestep.

    The last ᾱ is a tiny number instead of 0, ComfyUI's own, so that sigma stays finite.
    """
    root = (1 / (sigmas * sigmas + 1)).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    alphas_cumprod[-1] = 4.8973451890853435e-08
    return ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
