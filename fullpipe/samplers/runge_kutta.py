"""Samplers that integrate Karras et al.'s ODE dx/dσ = (x - denoised)/σ within one step.

"Karras" is Karras et al. (2022), Elucidating the Design Space of Diffusion-Based Generative Models,
arXiv:2206.00364. In the formulas s is the step's sigma and t the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from fullpipe.samplers.table import DENOISED, NOISE, R1, UNCOND, Row, X, row
from fullpipe.schedulers import ModelSampling


def ancestral_step(s: float, t: float, eta: float = 1.0) -> tuple[float, float]:
    """Where to step down to, and how much noise then leads back up to t.

    Song et al. (2021), DDIM, equation 16, in sigmas; k-diffusion's get_ancestral_step.
    """
    up = min(t, eta * np.sqrt(t**2 * (s**2 - t**2) / s**2))
    return np.sqrt(t**2 - up**2), up


def euler(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """Karras, algorithm 2 without its second order; DDIM with eta 0 in sigmas."""
    for s, t in pairwise(sigmas):
        slope = (X - DENOISED) / s
        yield row(s, X + slope * (t - s))


def euler_ancestral(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """DDPM-like ancestral sampling with Euler steps; k-diffusion's sample_euler_ancestral."""
    for s, t in pairwise(sigmas):
        if t == 0:
            yield row(s, DENOISED)
        else:
            down, up = ancestral_step(s, t)
            slope = (X - DENOISED) / s
            yield row(s, X + slope * (down - s) + NOISE * up, noise=(s, t))


def euler_cfg_pp(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """CFG++, Chung et al. (2024), arXiv:2406.08070: renoise along the unconditional slope."""
    for s, t in pairwise(sigmas):
        yield row(s, DENOISED + (X - UNCOND) / s * t)


def euler_ancestral_cfg_pp(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """CFG++ (arXiv:2406.08070) with ancestral noise."""
    for s, t in pairwise(sigmas):
        if t == 0:
            yield row(s, DENOISED)
        else:
            down, up = ancestral_step(s, t)
            yield row(s, DENOISED + (X - UNCOND) / s * down + NOISE * up, noise=(s, t))


def heun(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """Karras, algorithm 2 without churn. R1: the sample after half of the first slope."""
    for s, t in pairwise(sigmas):
        slope = (X - DENOISED) / s
        if t == 0:
            yield row(s, DENOISED)
        else:
            half = (t - s) / 2
            yield row(s, X + slope * (t - s), X + slope * half, is_step_end=False)
            yield row(t, R1 + (X - DENOISED) / t * half)


def heunpp2(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """Heun++ of sd-webui-samplers-scheduler: up to three slopes, weighted by their sigma.

    R1: the sample moved along the slopes so far, each with its weight.
    """
    for i, (s, t) in enumerate(pairwise(sigmas)):
        slope, step = (X - DENOISED) / s, t - s
        if t == sigmas[-1]:
            yield row(s, X + slope * step)
            continue
        ahead = sigmas[i + 2]
        has_third = ahead != sigmas[-1]
        total = (3 if has_third else 2) * sigmas[0]
        second, third = t / total, (ahead / total if has_third else 0.0)
        yield row(s, X + slope * step, X + slope * (1 - second - third) * step, is_step_end=False)
        slope = (X - DENOISED) / t
        if has_third:
            yield row(t, X + slope * (ahead - t), R1 + slope * second * step, is_step_end=False)
            yield row(ahead, R1 + (X - DENOISED) / ahead * third * step)
        else:
            yield row(t, R1 + slope * second * step)


def dpm_2(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """Midpoint steps in log sigma, after DPM-Solver-2 and Karras' algorithm 2. R1: the sample."""
    for s, t in pairwise(sigmas):
        if t == 0:
            yield row(s, DENOISED)
        else:
            middle = np.sqrt(s * t)
            slope = (X - DENOISED) / s
            yield row(s, X + slope * (middle - s), X, is_step_end=False)
            yield row(middle, R1 + (X - DENOISED) / middle * (t - s))


def dpm_2_ancestral(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """`dpm_2` with ancestral noise. R1: the sample."""
    for s, t in pairwise(sigmas):
        if t == 0:
            yield row(s, DENOISED)
        else:
            down, up = ancestral_step(s, t)
            middle = np.sqrt(s * down)
            slope = (X - DENOISED) / s
            yield row(s, X + slope * (middle - s), X, is_step_end=False)
            slope = (X - DENOISED) / middle
            yield row(middle, R1 + slope * (down - s) + NOISE * up, noise=(s, t))


def ddpm(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """Ho et al. (2020), DDPM, arXiv:2006.11239, equation 11 and the smaller variance of 3.2."""
    for s, t in pairwise(sigmas):
        if t == 0:
            yield row(s, DENOISED)
        else:
            alpha_bar, alpha_bar_next = 1 / (s**2 + 1), 1 / (t**2 + 1)
            alpha = alpha_bar / alpha_bar_next
            x, eps = X / np.sqrt(1 + s**2), (X - DENOISED) / s
            mean = (x - (1 - alpha) * eps / np.sqrt(1 - alpha_bar)) / np.sqrt(alpha)
            deviation = np.sqrt((1 - alpha) * (1 - alpha_bar_next) / (1 - alpha_bar))
            yield row(s, (mean + deviation * NOISE) * np.sqrt(1 + t**2), noise=(s, t))


def lcm(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """Multistep consistency sampling, Luo et al. (2023), arXiv:2310.04378, algorithm 3."""
    for s, t in pairwise(sigmas):
        if t == 0:
            yield row(s, DENOISED)
        else:
            yield row(s, DENOISED + t * NOISE, noise=(s, t))
