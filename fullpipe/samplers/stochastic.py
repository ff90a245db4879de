"""Solvers of the reverse-time stochastic equation with noise from an ordinary generator.

In the formulas s is the step's sigma, t the next one, and h = log(s/t).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

from fullpipe.samplers.table import DENOISED, NOISE, R1, R2, Row, X, row
from fullpipe.schedulers import ModelSampling


def er_sde(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """ER-SDE-Solver-3, Cui et al. (2023), arXiv:2309.06169, algorithm 3.

    R1: the previous denoised; R2: its previous first difference quotient.
    """
    for i, (s, t) in enumerate(pairwise(sigmas)):
        if t == 0:
            yield row(s, DENOISED)
            continue
        r = _noise_scale(t) / _noise_scale(s)
        moved = r * X + (1 - r) * DENOISED
        quotient = 0 * X
        if i > 0:
            area, moment = _noise_scale_integrals(s, t)
            quotient = (DENOISED - R1) / (s - sigmas[i - 1])
            moved = moved + (t - s + area * _noise_scale(t)) * quotient
        if i > 1:
            second = (quotient - R2) / ((s - sigmas[i - 2]) / 2)
            moved = moved + ((t - s) ** 2 / 2 + moment * _noise_scale(t)) * second
        up = np.sqrt(max(t**2 - (s * r) ** 2, 0.0))
        yield row(s, moved + up * NOISE, DENOISED, quotient, noise=(s, t))


def _noise_scale(sigma: float) -> float:
    """The noise scaling function that the paper finds best (ER-SDE 5)."""
    return sigma * (np.exp(sigma**0.3) + 10.0)


def _noise_scale_integrals(s: float, t: float, points: int = 200) -> tuple[float, float]:
    """The integrals of 1/scale and (σ - s)/scale from t to s, summed in fp32 as ComfyUI does."""
    width = torch.tensor((s - t) / points)
    sigma = torch.tensor(t) + torch.arange(points, dtype=torch.float32) * width
    scale = sigma * ((sigma**0.3).exp() + 10.0)
    area, moment = torch.sum(1 / scale), torch.sum((sigma - torch.tensor(s)) / scale)
    return float(area * width), float(moment * width)


def seeds_2(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """SEEDS-2, Gonzalez et al. (2023), arXiv:2305.14267, data prediction, r = 1/2, eta 1.

    R1: the part of the result that comes from the sample and the first noise.
    """
    for s, t in pairwise(sigmas):
        if t == 0:
            yield row(s, DENOISED)
            continue
        h, middle = np.log(s / t), np.sqrt(s * t)
        first = np.sqrt(-np.expm1(-h)) * NOISE
        moved = middle / s * np.exp(-h / 2) * X - np.expm1(-h) * DENOISED + middle * first
        rest = t / s * np.exp(-h) * X + t * np.exp(-h / 2) * first
        yield row(s, moved, rest, noise=(s, middle), is_step_end=False)
        second = np.sqrt(-np.expm1(-h)) * NOISE
        yield row(middle, R1 - np.expm1(-2 * h) * DENOISED + t * second, noise=(middle, t))


def seeds_3(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """SEEDS-3, Gonzalez et al. (2023), arXiv:2305.14267, data prediction, r = 1/3, 2/3, eta 1.

    R1, R2: the parts of the second stage and of the result that come from what is known so far.
    """
    for s, t in pairwise(sigmas):
        if t == 0:
            yield row(s, DENOISED)
            continue
        h = np.log(s / t)
        s1, s2 = s * np.exp(-h / 3), s * np.exp(-2 * h / 3)
        # Each third of the step adds its own noise and damps the noise before it.
        fresh, damped = np.sqrt(-np.expm1(-2 * h / 3)) * NOISE, np.exp(-h / 3)
        a2 = 2 * _h_phi_2(-4 * h / 3)
        a1 = np.expm1(-4 * h / 3) - a2
        b3 = 1.5 * _h_phi_2(-2 * h)
        b1 = np.expm1(-2 * h) - b3

        moved = s1 / s * np.exp(-h / 3) * X - np.expm1(-2 * h / 3) * DENOISED + s1 * fresh
        stage = s2 / s * np.exp(-2 * h / 3) * X - a1 * DENOISED + s2 * damped * fresh
        rest = t / s * np.exp(-h) * X - b1 * DENOISED + t * damped**2 * fresh
        yield row(s, moved, stage, rest, noise=(s, s1), is_step_end=False)
        stage = R1 - a2 * DENOISED + s2 * fresh
        yield row(s1, stage, R2 + t * damped * fresh, noise=(s1, s2), is_step_end=False)
        yield row(s2, R1 - b3 * DENOISED + t * fresh, noise=(s2, t))


def _h_phi_2(h: float) -> float:
    """h·φ₂(h) of exponential integrators."""
    return (np.expm1(h) - h) / h
