"""The DPM-Solver family: exponential integrators in half the log signal-to-noise ratio, -log σ.

"DPM-Solver" is Lu et al. (2022), arXiv:2206.00927; "DPM-Solver++" is Lu et al. (2022),
arXiv:2211.01095. In the formulas s is the step's sigma, t the next one, and h = log(s/t).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from fullpipe.samplers.table import DENOISED, R1, Row, X, row
from fullpipe.schedulers import ModelSampling


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
