"""Samplers that extrapolate from the slopes of earlier steps: linear multistep methods.

In the formulas s is the step's sigma, t the next one, and the slope is dx/dσ = (x - denoised)/σ.
Where several earlier slopes are kept, R1 is the newest. All of them begin with fewer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from fullpipe.samplers.runge_kutta import ancestral_step
from fullpipe.samplers.table import DENOISED, NOISE, R1, R2, R3, UNCOND, Row, X, row
from fullpipe.schedulers import ModelSampling


def _combine(coefficients: Sequence[float], vectors: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of coefficient · vector over as many as there are coefficients, newest first."""
    return sum((c * v for c, v in zip(coefficients, vectors, strict=False)), np.zeros_like(X))


def lms(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """Adams-Bashforth of order 4 on uneven steps; k-diffusion's sample_lms, K. Crowson (2022)."""
    for i, (s, t) in enumerate(pairwise(sigmas)):
        slope = (X - DENOISED) / s
        if t == 0:
            yield row(s, DENOISED)
        else:
            known = sigmas[max(i - 3, 0) : i + 1][::-1]
            slopes = (slope, R1, R2, R3)
            yield row(s, X + _combine(_lagrange_integrals(known, s, t), slopes), slope, R1, R2)


def _lagrange_integrals(nodes: np.ndarray, start: float, end: float) -> list[float]:
    """The integral from start to end of each Lagrange polynomial of at most four nodes."""
    points, weights = np.polynomial.legendre.leggauss(3)
    tau = start + (end - start) * (points + 1) / 2
    return [
        (end - start) / 2 * float(weights @ _lagrange(nodes, j, tau)) for j in range(len(nodes))
    ]


def _lagrange(nodes: np.ndarray, j: int, tau: np.ndarray) -> np.ndarray:
    """The polynomial that is 1 at nodes[j] and 0 at the others."""
    others = np.delete(nodes, j)
    return np.prod((tau[:, None] - others) / (nodes[j] - others), axis=1)


def ipndm(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """Improved PNDM, Zhang and Chen (2022), arXiv:2204.13902: Adams-Bashforth of even steps."""
    adams_bashforth = (
        [1.0],
        [3 / 2, -1 / 2],
        [23 / 12, -16 / 12, 5 / 12],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    )
    for i, (s, t) in enumerate(pairwise(sigmas)):
        slope = (X - DENOISED) / s
        if t == 0:
            yield row(s, DENOISED)
        else:
            mean_slope = _combine(adams_bashforth[min(i, 3)], (slope, R1, R2, R3))
            yield row(s, X + (t - s) * mean_slope, slope, R1, R2)


def ipndm_v(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """iPNDM for uneven steps, as in the diff-sampler toolbox, whose coefficients it follows."""
    for i, (s, t) in enumerate(pairwise(sigmas)):
        slope = (X - DENOISED) / s
        if t == 0:
            yield row(s, DENOISED)
        else:
            steps = np.diff(sigmas[max(i - 3, 0) : i + 2])[::-1]
            mean_slope = _combine(_ipndm_v_coefficients(*steps), (slope, R1, R2, R3))
            yield row(s, X + (t - s) * mean_slope, slope, R1, R2)


def _ipndm_v_coefficients(h: float, *earlier: float) -> list[float]:
    """The weights of the slopes for the step h after up to three earlier steps, newest first.

    From the third order on they differ from those of Adams and Bashforth on uneven steps; they are
    kept as they are published in the toolbox, because that is what ComfyUI samples with.
    """
    if not earlier:
        return [1.0]
    h1 = earlier[0]
    first, second = 1 + h / h1 / 2, -h / h1 / 2
    if len(earlier) == 1:
        return [first, second]
    h2 = earlier[1]
    cubic = (1 - h**2 / (3 * h1 * (h1 + h2))) / 2
    first, second, third = first + cubic, second - (1 + h1 / h2) * cubic, h1 / h2 * cubic
    if len(earlier) == 2:
        return [first, second, third]
    h3 = earlier[2]
    span = h + h1 + h2
    quartic = (1 - h / (3 * (h + h1))) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * span)
    quartic *= h * (h + h1) * span / (h1 * (h1 + h2) * (h1 + h2 + h3))
    q = h1 * (h1 + h2) / (h2 * (h2 + h3))
    return [
        first + quartic,
        second - (1 + h1 / h2 + q) * quartic,
        third + (h1 / h2 + q * (1 + h2 / h3)) * quartic,
        -quartic * q * h1 / h2,
    ]


def deis(sigmas: np.ndarray, sampling: ModelSampling) -> Iterator[Row]:
    """tAB-DEIS of order 3, Zhang and Chen (2022), arXiv:2204.13902."""
    times, beta_0, beta_1 = _sigmas_to_vp_time(torch.from_numpy(sigmas))
    for i, (s, t) in enumerate(pairwise(sigmas)):
        slope = (X - DENOISED) / s
        if i == 0 or t == 0:
            yield row(s, X + slope * (t - s), slope)
        else:
            known = times[max(i - 2, 0) : i + 1].flip(0)
            weights = _deis_integrals(known, times[i], times[i + 1], beta_0, beta_1)
            yield row(s, X + _combine(weights, (slope, R1, R2)), slope, R1)


def _sigmas_to_vp_time(sigmas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Time of the variance-preserving process at each sigma, and the ends of its linear beta.

    The process of Karras et al. (2022), table 1, for σ from 0.002 at 0.001 to 80 at 1. The lower
    end is rounded to fp32 on the way as in ComfyUI, where log(1 + 0.002²) is 1.3 % off.
    """
    low = torch.tensor(np.log((torch.tensor(0.002) ** 2 + 1).numpy()))
    high = torch.tensor(np.log(80.0**2 + 1))
    slope = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    beta_0 = high - 0.5 * slope
    times = ((beta_0**2 + 2 * slope * (sigmas**2 + 1).log()).sqrt() - beta_0) / slope
    return times, beta_0, slope + beta_0


def _deis_integrals(
    known: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    beta_0: torch.Tensor,
    beta_1: torch.Tensor,
    points: int = 10_000,
) -> list[float]:
    """Equation 15 of DEIS, summed in fp32 over as many points as ComfyUI takes.

    d log(alpha)/dτ is rounded as automatic differentiation rounds it, because near τ = 0 the
    integrand is sensitive to that.
    """
    tau = torch.linspace(float(start), float(end), points)
    alpha = torch.exp(-0.5 * tau**2 * (beta_1 - beta_0) - tau * beta_0)
    one = 1 / alpha * alpha
    derivative = one * (beta_1 - beta_0) * -0.5 * (2 * tau) - one * beta_0
    integrand = -0.5 * derivative / torch.sqrt(alpha * (1 - alpha))
    width = (end - start) / points
    sums = []
    for j, node in enumerate(known):
        polynomial = torch.ones_like(tau)
        for k, other in enumerate(known):
            if k != j:
                polynomial = polynomial * ((tau - other) / (node - other))
        sums.append(float(torch.sum(integrand * polynomial) * width))
    return sums


def gradient_estimation(
    sigmas: np.ndarray, sampling: ModelSampling, gamma: float = 2.0
) -> Iterator[Row]:
    """Permenter and Yuan (2024), arXiv:2306.04848, algorithm 3. R1: the previous slope."""
    for i, (s, t) in enumerate(pairwise(sigmas)):
        slope = (X - DENOISED) / s
        change = (gamma - 1) * (slope - R1) * (t - s) if i > 0 else 0 * X
        yield row(s, DENOISED if t == 0 else X + slope * (t - s) + change, slope)


def gradient_estimation_cfg_pp(
    sigmas: np.ndarray, sampling: ModelSampling, gamma: float = 2.0
) -> Iterator[Row]:
    """`gradient_estimation` along the unconditional slope of CFG++ (arXiv:2406.08070)."""
    for i, (s, t) in enumerate(pairwise(sigmas)):
        slope = (X - UNCOND) / s
        change = (gamma - 1) * (slope - R1) * (t - s) if i > 0 else 0 * X
        yield row(s, DENOISED if t == 0 else DENOISED + slope * t + change, slope)


def _res_multistep(
    sigmas: np.ndarray, sampling: ModelSampling, eta: float, is_cfg_pp: bool
) -> Iterator[Row]:
    """Refined exponential solver, Zhang et al. (2023), arXiv:2308.02157, second-order multistep.

    R1: the previous denoised (the unconditional one with CFG++).
    """
    target = UNCOND if is_cfg_pp else DENOISED
    down_before = 0.0
    for i, (s, t) in enumerate(pairwise(sigmas)):
        if t == 0:
            yield row(s, DENOISED)
            continue
        down, up = ancestral_step(s, t, eta)
        if i == 0:
            moved = DENOISED + (X - target) / s * down
        else:
            x = X + DENOISED - UNCOND if is_cfg_pp else X
            h = np.log(s / down)
            c2 = np.log(down_before / sigmas[i - 1]) / h
            phi_1 = np.expm1(-h) / -h
            phi_2 = (phi_1 - 1) / -h
            b1, b2 = np.nan_to_num(phi_1 - phi_2 / c2), np.nan_to_num(phi_2 / c2)
            moved = down / s * x + h * (b1 * target + b2 * R1)
        yield row(s, moved + up * NOISE, target, noise=(s, t) if eta else None)
        down_before = down


res_multistep = partial(_res_multistep, eta=0.0, is_cfg_pp=False)
res_multistep_cfg_pp = partial(_res_multistep, eta=0.0, is_cfg_pp=True)
res_multistep_ancestral = partial(_res_multistep, eta=1.0, is_cfg_pp=False)
res_multistep_ancestral_cfg_pp = partial(_res_multistep, eta=1.0, is_cfg_pp=True)
