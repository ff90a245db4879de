"""The DPM-Solver family: exponential integrators in half the log signal-to-noise ratio, -log σ.

"DPM-Solver" is Lu et al. (2022), arXiv:2206.00927; "DPM-Solver++" is Lu et al. (2022),
arXiv:2211.01095. In the formulas s is the step's sigma, t the next one, and h = log(s/t).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from fullpipe.samplers.runge_kutta import ancestral_step
from fullpipe.samplers.table import DENOISED, NOISE, R1, R2, UNCOND, Row, X, row
from fullpipe.schedulers import ModelSampling


def dpm_fast(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """DPM-Solver-fast, section 3.4: as many evaluations as steps, in solver steps of order 3.

    It takes the ends of the schedule only, stops at the last sigma above 0, and counts every
    evaluation as a step of the user's. R1, R2: what the coming rows have of the solver step so far.
    """
    evaluations = len(sigmas) - 1
    end = sigmas[-1] if sigmas[-1] > 0 else sigmas[-2]
    solver_steps = evaluations // 3 + 1
    orders = [3] * (solver_steps - 1) + [evaluations % 3]
    if evaluations % 3 == 0:
        orders = [3] * (solver_steps - 2) + [2, 1]
    times = np.linspace(-np.log(sigmas[0]), -np.log(end), solver_steps + 1)
    for order, time, time_next in zip(orders, times, times[1:], strict=False):
        h = time_next - time
        s, t = np.exp(-time), np.exp(-time_next)
        eps = (X - DENOISED) / s
        whole = X - t * np.expm1(h) * eps
        if order == 1:
            yield row(s, whole)
        elif order == 2:
            middle = np.exp(-(time + h / 2))
            turn = t * np.expm1(h)
            yield row(s, X - middle * np.expm1(h / 2) * eps, whole + turn * eps)
            yield row(middle, R1 - turn * (X - DENOISED) / middle)
        else:
            s1, s2 = np.exp(-(time + h / 3)), np.exp(-(time + 2 * h / 3))
            turn1 = 2 * s2 * (np.expm1(2 * h / 3) / (2 * h / 3) - 1)
            turn2 = 1.5 * t * (np.expm1(h) / h - 1)
            third = X - s1 * np.expm1(h / 3) * eps
            two_thirds = X - s2 * np.expm1(2 * h / 3) * eps
            yield row(s, third, two_thirds + turn1 * eps, whole + turn2 * eps)
            yield row(s1, R1 - turn1 * (X - DENOISED) / s1, R2)
            yield row(s2, R1 - turn2 * (X - DENOISED) / s2)


def dpmpp_2s_ancestral(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """DPM-Solver++, algorithm 1 (2S), with ancestral noise. R1: the sample."""
    for s, t in pairwise(sigmas):
        if t == 0:
            yield row(s, DENOISED)
        else:
            down, up = ancestral_step(s, t)
            h, middle = np.log(s / down), np.sqrt(s * down)
            yield row(s, middle / s * X - np.expm1(-h / 2) * DENOISED, X, is_step_end=False)
            moved = down / s * R1 - np.expm1(-h) * DENOISED
            yield row(middle, moved + up * NOISE, noise=(s, t))


def dpmpp_2s_ancestral_cfg_pp(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """`dpmpp_2s_ancestral` along CFG++ (arXiv:2406.08070). R1: the sample plus its denoised.

    The second stage subtracts the unconditional prediction of the middle, not of the start, as
    ComfyUI does.
    """
    for s, t in pairwise(sigmas):
        if t == 0:
            yield row(s, DENOISED)
        else:
            down, up = ancestral_step(s, t)
            h, middle = np.log(s / down), np.sqrt(s * down)
            moved = middle / s * (X + DENOISED - UNCOND) - np.expm1(-h / 2) * DENOISED
            yield row(s, moved, X + DENOISED, is_step_end=False)
            moved = down / s * (R1 - UNCOND) - np.expm1(-h) * DENOISED
            yield row(middle, moved + up * NOISE, noise=(s, t))


def dpmpp_sde(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """DPM-Solver++(stochastic), k-diffusion's sample_dpmpp_sde with r = 1/2. R1: the sample."""
    for s, t in pairwise(sigmas):
        if t == 0:
            yield row(s, DENOISED)
        else:
            middle = np.sqrt(s * t)
            down, up = ancestral_step(s, middle)
            moved = down / s * X + (1 - down / s) * DENOISED + up * NOISE
            yield row(s, moved, X, noise=(s, _fp32_middle(s, t)), is_step_end=False)
            down, up = ancestral_step(s, t)
            moved = down / s * R1 + (1 - down / s) * DENOISED + up * NOISE
            yield row(middle, moved, noise=(s, t))


def _fp32_middle(s: float, t: float) -> float:
    """√(s·t) as ComfyUI rounds it: a Brownian path is rough, so its time must match exactly."""
    start, end = (-torch.tensor(sigma, dtype=torch.float32).log() for sigma in (s, t))
    return float((-(start + 0.5 * (end - start))).exp())


def dpmpp_2m(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """DPM-Solver++, algorithm 2 (2M). R1: the previous denoised."""
    for i, (s, t) in enumerate(pairwise(sigmas)):
        if t == 0:
            yield row(s, DENOISED)
            continue
        h = np.log(s / t)
        target = DENOISED
        if i > 0:
            r = np.log(sigmas[i - 1] / s) / h
            target = DENOISED + (DENOISED - R1) / (2 * r)
        yield row(s, t / s * X - np.expm1(-h) * target, DENOISED)


def dpmpp_2m_cfg_pp(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """`dpmpp_2m` along CFG++ (arXiv:2406.08070). R1: the previous unconditional denoised."""
    for i, (s, t) in enumerate(pairwise(sigmas)):
        if t == 0:
            yield row(s, DENOISED)
            continue
        h = np.log(s / t)
        moved = DENOISED + t / s * (X - UNCOND)
        if i > 0:
            r = np.log(sigmas[i - 1] / s) / h
            moved = moved - np.expm1(-h) / (2 * r) * (DENOISED - R1)
        yield row(s, moved, UNCOND)


def _dpmpp_2m_sde(sigmas: np.ndarray, sampling: ModelSampling, is_midpoint: bool) -> Iterator[Row]:
    """SDE-DPM-Solver++(2M), DPM-Solver++ appendix B, with eta 1. R1: the previous denoised."""
    for i, (s, t) in enumerate(pairwise(sigmas)):
        if t == 0:
            yield row(s, DENOISED)
            continue
        h = np.log(s / t)
        drift = -np.expm1(-2 * h)
        moved = t / s * np.exp(-h) * X + drift * DENOISED
        if i > 0:
            r = np.log(sigmas[i - 1] / s) / h
            weight = drift / 2 if is_midpoint else 1 - drift / (2 * h)
            moved = moved + weight / r * (DENOISED - R1)
        yield row(s, moved + t * np.sqrt(drift) * NOISE, DENOISED, noise=(s, t))


dpmpp_2m_sde = partial(_dpmpp_2m_sde, is_midpoint=True)
dpmpp_2m_sde_heun = partial(_dpmpp_2m_sde, is_midpoint=False)


def dpmpp_3m_sde(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """The third-order multistep form of `dpmpp_2m_sde`; k-diffusion's sample_dpmpp_3m_sde.

    R1, R2: the previous denoised and the one before.
    """
    for i, (s, t) in enumerate(pairwise(sigmas)):
        if t == 0:
            yield row(s, DENOISED)
            continue
        h = np.log(s / t)
        drift = -np.expm1(-2 * h)
        phi_2 = 1 - drift / (2 * h)
        moved = t / s * np.exp(-h) * X + drift * DENOISED
        if i > 0:
            r0 = np.log(sigmas[i - 1] / s) / h
            first = (DENOISED - R1) / r0
        if i == 1:
            moved = moved + phi_2 * first
        elif i > 1:
            r1 = np.log(sigmas[i - 2] / sigmas[i - 1]) / h
            second = (first - (R1 - R2) / r1) / (r0 + r1)
            phi_3 = phi_2 / (2 * h) - 0.5
            moved = moved + phi_2 * (first + r0 * second) - phi_3 * second
        yield row(s, moved + t * np.sqrt(drift) * NOISE, DENOISED, R1, noise=(s, t))
