"""What a sampler is here: a table of small matrices, one row per evaluation of the UNet.

Between two evaluations every sampler of the k-diffusion family is a linear map of a few tensors:
the sample, what it remembers, the newest prediction, and fresh noise. Those tensors are the K
registers of a slot and three more, and a row holds the K x (K + 3) matrix of the map:

    registers' = matrix · [registers; denoised; uncond_denoised; noise]

Register 0 is the tensor that the UNet sees next, at the next row's sigma; after the last row it is
the result. A sampler is written with X, R1, R2, R3, DENOISED, UNCOND and NOISE below, which are
ordinary vectors of coefficients, so that it reads like the paper it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fullpipe.errors import InvalidRequest
from fullpipe.schedulers import DISCARDS_PENULTIMATE_SIGMA, ModelSampling

REGISTERS = 4

X, R1, R2, R3, DENOISED, UNCOND, NOISE = np.eye(REGISTERS + 3)
_NOTHING = np.zeros(REGISTERS + 3)


@dataclass(frozen=True)
class Row:
    """One evaluation of the UNet and the move after it.

    Attributes:
        sigma: the noise level that register 0 is at when the UNet sees it.
        matrix: [K, K + 3] float64; columns are the K registers, denoised, uncond_denoised, noise.
        noise: the sigmas between which this row draws its noise; None if it draws none.
        is_step_end: whether the move ends one of the user's steps.
    """

    sigma: float
    matrix: np.ndarray
    noise: tuple[float, float] | None
    is_step_end: bool


Rows = Callable[[np.ndarray, ModelSampling], Iterator[Row]]


def row(
    sigma: float,
    x: np.ndarray,
    *memory: np.ndarray,
    noise: tuple[float, float] | None = None,
    is_step_end: bool = True,
) -> Row:
    """Write a row: the new register 0, then the new registers 1, 2, ...; the others become 0."""
    padding = [_NOTHING] * (REGISTERS - 1 - len(memory))
    return Row(float(sigma), np.stack([x, *memory, *padding]), noise, is_step_end)


@dataclass(frozen=True)
class Sampler:
    """A sampler by ComfyUI's name.

    Attributes:
        name: as in ComfyUI's `sampler_name`.
        rows: makes the table from float64 sigmas [n + 1], the last of them 0.
        noise_kind: "none", "normal", "brownian" or "brownian_gpu"; see `SamplerNoise`.
        needs_uncond: uses the unconditional prediction by itself (CFG++), at cfg 1 too.
        inpaint_seed_offset: None, or what to add to the seed for noise of its own under a mask.
    """

    name: str
    rows: Rows
    noise_kind: str = "none"
    needs_uncond: bool = False
    inpaint_seed_offset: int | None = None

    @property
    def discards_penultimate_sigma(self) -> bool:
        """Whether it visits the schedule without the last sigma before 0."""
        return self.name in DISCARDS_PENULTIMATE_SIGMA


@dataclass(frozen=True)
class Table:
    """A request's way through its samples, R rows long.

    Attributes:
        sigmas: [R] float64, where the UNet is evaluated.
        matrices: [R, K, K + 3] float64.
        noise: R intervals of sigma; None where the row draws nothing.
        step_of_row: [R] int64, how many of the user's steps are finished after each row.
        steps: how many steps the user sees.
    """

    sigmas: np.ndarray
    matrices: np.ndarray
    noise: list[tuple[float, float] | None]
    step_of_row: np.ndarray
    steps: int


def tabulate(sampler: Sampler, sigmas: np.ndarray | torch.Tensor, sampling: ModelSampling) -> Table:
    """Make the table of one request.

    Args:
        sampler: from `get_sampler`.
        sigmas: [n + 1], descending to 0, from `calculate_sigmas`.
        sampling: the checkpoint's noise schedule.
    Raises:
        InvalidRequest: the sampler has no finite step between two of these sigmas.
    """
    levels = np.asarray(sigmas, dtype=np.float64)
    repeated = InvalidRequest(
        f"sampler_name={sampler.name!r} needs sigmas that differ, got {len(levels) - 1} steps with "
        f"{len(levels) - len(np.unique(levels))} repeated; take fewer steps, more denoise or "
        "another scheduler"
    )
    try:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            rows = list(sampler.rows(levels, sampling))
    except np.linalg.LinAlgError:
        raise repeated from None
    matrices = np.stack([r.matrix for r in rows])
    matrices[0, :, 1:REGISTERS] = 0  # a request remembers nothing yet, whoever had its slot before
    visited = np.array([r.sigma for r in rows])
    noise = [r.noise for r in rows]
    is_still = sampler.noise_kind.startswith("brownian") and any(n and n[0] == n[1] for n in noise)
    is_finite = np.isfinite(visited).all() and (np.abs(matrices) < np.finfo(np.float32).max).all()
    if is_still or not is_finite:
        raise repeated
    finished = np.cumsum([r.is_step_end for r in rows])
    return Table(visited, matrices, noise, finished, int(finished[-1]))


def advance(
    registers: torch.Tensor,
    denoised: torch.Tensor,
    uncond_denoised: torch.Tensor | None,
    noise: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Move every slot of a tick to its next sigma, whatever its sampler.

    Every slot's result is the same in any company. The tensors of a slot must be finite even where
    its row ignores them (0 times infinity is not 0): a row without noise takes zeros.

    Args:
        registers: [B, K, 4, h, w] fp32, on the loop's device; register 0 is the sample.
        denoised: [B, 4, h, w] fp32, the guided prediction of x at sigma 0.
        uncond_denoised: [B, 4, h, w] fp32, the unguided one, or None where no row uses it.
        noise: [B, 4, h, w] fp32, unit normal.
        rows: [B, K, K + 3] fp32, each slot's row of its table.
    Returns:
        [B, K, 4, h, w], dtype of registers, new storage.
    """
    coefficients = rows.to(registers.dtype)[..., None, None, None]
    columns = [*registers.unbind(1), denoised, uncond_denoised, noise]
    # Not a matrix product: a GPU may round the factors of one to TF32.
    moved = torch.zeros_like(registers)
    for j, column in enumerate(columns):
        if column is not None:
            moved.addcmul_(coefficients[:, :, j], column[:, None])
    return moved
