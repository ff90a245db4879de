"""Multistep solvers that correct a step with the prediction made at its end.

The UNet sees the predicted sample; the next step starts from the corrected one. Both are linear in
what is known before the UNet runs, but for one term, so the registers are: X, the predicted sample;
R1, the corrected one less its newest term; R2 and R3, the previous two denoised.
In the formulas s is the step's sigma, t the next one, and h = log(s/t).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import numpy as np

from fullpipe.samplers.table import DENOISED, NOISE, R1, R2, R3, Row, X, row
from fullpipe.schedulers import ModelSampling


def _sa_solver(sigmas: np.ndarray, sampling: ModelSampling, is_pece: bool) -> Iterator[Row]:
    """SA-Solver, Xue et al. (2023), arXiv:2309.05019, algorithm 1: predictor 3, corrector 4.

    Stochastic (tau 1) between 20 % and 80 % of the denoising, an ODE solver outside. With PECE
    the corrected sample is evaluated once more.
    """
    noisiest, cleanest = sampling.percent_to_sigma(0.2), sampling.percent_to_sigma(0.8)
    steps = len(sigmas) - 1
    lambdas = -np.log(sigmas)
    newest = 0.0
    for i, (s, t) in enumerate(pairwise(sigmas)):
        x = X if i == 0 else R1 + newest * DENOISED
        if is_pece and i > 0:
            yield row(s, x, R1, R2, R3, is_step_end=False)
            x = X
        if t == 0:
            yield row(s, DENOISED)
            continue
        tau = 1.0 if noisiest >= t >= cleanest else 0.0
        h = lambdas[i + 1] - lambdas[i]
        up = t * np.sqrt(-np.expm1(-2 * tau**2 * h))
        base = t / s * np.exp(-(tau**2) * h) * x + up * NOISE

        order = min(3, i + 1, steps - 1 - i)
        weights = _adams_weights(lambdas[i - order + 1 : i + 1], lambdas[i], lambdas[i + 1], tau)
        predicted = base + weights @ np.stack([R3, R2, DENOISED])[-order:]
        order = min(4, i + 2, steps - 1 - i)
        weights = _adams_weights(lambdas[i - order + 2 : i + 2], lambdas[i], lambdas[i + 1], tau)
        corrected = base + weights[:-1] @ np.stack([R3, R2, DENOISED])[4 - order :]
        newest = weights[-1]
        yield row(s, predicted, corrected, DENOISED, R2, noise=(s, t) if tau else None)


sa_solver = partial(_sa_solver, is_pece=False)
sa_solver_pece = partial(_sa_solver, is_pece=True)


def _adams_weights(lambdas: np.ndarray, start: float, end: float, tau: float) -> np.ndarray:
    """The coefficients b of equations 14 and 17 of SA-Solver for denoised at these lambdas.

    Integrates each Lagrange polynomial times (1 + τ²)·exp((1 + τ²)(λ - end)), by way of the
    integrals of the powers of λ - end, which follow from one another by parts.
    """
    rate = 1 + tau**2
    moments: list[float] = []
    for p in range(len(lambdas)):
        power = 0.0**p - (start - end) ** p * np.exp(-rate * (end - start))
        moments.append(power - (p / rate * moments[-1] if p else 0.0))
    return np.linalg.solve(np.vander(lambdas - end, increasing=True).T, moments)


def _uni_pc(sigmas: np.ndarray, sampling: ModelSampling, is_bh1: bool) -> Iterator[Row]:
    """UniPC-3, Zhao et al. (2023), arXiv:2302.04867, multistep, with B1(h) = h or B2(h) = eʰ - 1.

    As in ComfyUI the last sigma is 0.001 instead of 0, and a schedule of one step only rescales.
    """
    sigmas = np.where(sigmas == 0, 0.001, sigmas)
    steps = len(sigmas) - 1
    order_max = min(3, steps - 1)
    if order_max == 0:
        yield row(sigmas[0], X * np.sqrt((1 + sigmas[1] ** 2) / (1 + sigmas[0] ** 2)))
        return
    newest = 0.0
    for i, (s, t) in enumerate(pairwise(sigmas)):
        x = X if i == 0 else R1 + newest * DENOISED
        order = i + 1 if i + 1 < order_max else min(order_max, steps - i)
        h = np.log(s / t)
        scale = h if is_bh1 else -np.expm1(-h)
        rk = [np.log(s / sigmas[i - k]) / h for k in range(1, order)]
        quotients = [(d - DENOISED) / r for d, r in zip((R2, R3), rk, strict=False)]
        powers, moments = np.vander([*rk, 1.0], increasing=True).T, _uni_pc_moments(h, order, scale)

        base = t / s * x - np.expm1(-h) * DENOISED
        rho = np.linalg.solve(powers[:-1, :-1], moments[:-1]) if order != 2 else [0.5]
        predicted = base + scale * sum(r * q for r, q in zip(rho, quotients, strict=True))
        if i == steps - 1:
            yield row(s, predicted)
            return
        rho = np.linalg.solve(powers, moments) if order > 1 else [0.5]
        corrected = base + scale * sum(r * q for r, q in zip(rho, quotients, strict=False))
        newest = scale * rho[-1]
        yield row(s, predicted, corrected - newest * DENOISED, DENOISED, R2)


uni_pc = partial(_uni_pc, is_bh1=True)
uni_pc_bh2 = partial(_uni_pc, is_bh1=False)


def _uni_pc_moments(h: float, order: int, scale: float) -> np.ndarray:
    """The right side of UniPC's linear system, n!·hφₙ₊₁(-h)/B(h) for n = 1 ... order."""
    phi, factorial = np.expm1(-h) / -h - 1, 1
    moments = []
    for n in range(1, order + 1):
        moments.append(phi * factorial / -scale)
        factorial *= n + 1
        phi = phi / -h - 1 / factorial
    return np.array(moments)
