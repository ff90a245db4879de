"""The same cases through fullpipe's tables, and the difference to ComfyUI's results."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from comfyui import ComfyUI
from network import TinyNetwork, contexts, start_latent

from fullpipe.noise import SamplerNoise, start_noise
from fullpipe.samplers import REGISTERS, advance, build_table, get_sampler
from fullpipe.schedulers import ModelSampling, calculate_sigmas


@dataclass(frozen=True)
class Case:
    """One request to compare; `precision` says through which door of ComfyUI it goes."""

    sampler_name: str
    scheduler: str
    precision: str
    steps: int = 8
    denoise: float = 1.0
    batch: int = 1
    prediction_type: str = "epsilon"
    zero_snr: bool = False
    cfg: float = 4.0
    seed: int = 42
    size: int = 8
    is_masked: bool = False


@dataclass(frozen=True)
class Difference:
    """How far apart the two results are.

    Attributes:
        case: what was sampled.
        sigmas_equal: whether the schedules are bit for bit the same.
        relative: max abs difference over the largest absolute value; NaN if either is not finite.
        ours, theirs: [B, 4, h, w], the results.
    """

    case: Case
    sigmas_equal: bool
    relative: float
    ours: np.ndarray = field(repr=False)
    theirs: np.ndarray = field(repr=False)


Samples = tuple[np.ndarray, np.ndarray]  # the sigmas [n + 1] and the samples [B, 4, h, w]


def sample_each(cases: list[Case]) -> list[Samples]:
    """Every case by itself."""
    return [sample(case) for case in cases]


def compare(
    comfyui: ComfyUI,
    cases: list[Case],
    sample_all: Callable[[list[Case]], list[Samples]] = sample_each,
) -> list[Difference]:
    """Sample every case with ComfyUI, in its own process, and with fullpipe, at the same time."""
    theirs, ours = _ask(comfyui, cases, sample_all)
    return [
        _difference(case, *ours[i], theirs[f"sigmas{i}"], theirs[f"samples{i}"])
        for i, case in enumerate(cases)
    ]


def catalogue(comfyui: ComfyUI) -> tuple[list[str], list[str]]:
    """The names of ComfyUI's samplers and schedulers."""
    theirs, _ = _ask(comfyui, [], sample_each)
    return theirs["sampler_names"].tolist(), theirs["scheduler_names"].tolist()


def _ask(
    comfyui: ComfyUI, cases: list[Case], sample_all: Callable[[list[Case]], list[Samples]]
) -> tuple[dict[str, np.ndarray], list[Samples]]:
    with tempfile.TemporaryDirectory() as folder:
        questions, answers = Path(folder) / "cases.json", Path(folder) / "answers.npz"
        questions.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
        reference = Path(__file__).with_name("reference.py")
        process = comfyui.start(reference, str(questions), str(answers))
        with torch.no_grad():
            ours = sample_all(cases)
        log, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"ComfyUI's process ended with {process.returncode}:\n{log[-3000:]}")
        return dict(np.load(answers)), ours


def _difference(
    case: Case, sigmas: np.ndarray, ours: np.ndarray, their_sigmas: np.ndarray, theirs: np.ndarray
) -> Difference:
    are_equal = np.array_equal(sigmas, their_sigmas)
    return Difference(case, are_equal, relative_difference(ours, theirs), ours, theirs)


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Max abs difference over the largest absolute value of the second."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def sample(case: Case, is_exact: bool = False) -> Samples:
    """Walk the case's table as the loop does.

    Args:
        case: what to sample.
        is_exact: do an fp32 case, with its start, noise and timesteps, in float64.
    """
    sampling = ModelSampling.from_scheduler_config(
        {"prediction_type": case.prediction_type, "rescale_betas_zero_snr": case.zero_snr}
    )
    sigmas = calculate_sigmas(sampling, case.scheduler, case.steps, case.denoise, case.sampler_name)
    table = build_table(case.sampler_name, sigmas, sampling)
    is_direct = case.precision == "float64"
    dtype = torch.float64 if is_direct or is_exact else torch.float32
    network = TinyNetwork(case.prediction_type == "v_prediction", dtype)
    shape = (case.batch, 4, case.size, case.size)
    generator = torch.Generator().manual_seed(case.seed)
    if is_direct:
        x = torch.randn(shape, generator=generator, dtype=dtype) * float(sigmas[0])
    else:
        latent = start_latent(case.batch, case.size) if case.denoise < 1 else torch.zeros(shape)
        x = sampling.start(start_noise(case.seed, case.batch, *shape[2:]), latent, sigmas[0])
    noise = SamplerNoise(
        get_sampler(case.sampler_name).noise_kind,
        case.seed,
        shape,
        float(sigmas[sigmas > 0].min()),
        float(sigmas.max()),
    )
    registers = torch.zeros(case.batch, REGISTERS, *shape[1:], dtype=dtype)
    registers[:, 0] = x
    for i, row in enumerate(torch.from_numpy(table.matrices).to(dtype)):
        x, sigma = registers[:, 0], torch.tensor(table.sigmas[i], dtype=dtype)
        scaled = x * sampling.input_scale(sigma)
        seen = sigma if is_direct else sampling.sigmas[sampling.timestep(sigma.float())]
        denoised, unconditional = (
            sampling.denoised(
                x, sigma, network(scaled, seen.expand(len(x)), context.expand(len(x), -1))
            )
            for context in contexts()
        )
        denoised = unconditional + (denoised - unconditional) * case.cfg
        interval = table.noise[i]
        if interval is None:
            drawn = torch.zeros_like(x)
        elif is_direct:
            drawn = torch.randn(shape, generator=generator, dtype=dtype)
        else:
            drawn = noise.draw(interval).to(dtype)
        rows = row.expand(len(x), -1, -1)
        registers = advance(registers, denoised, unconditional, drawn, rows)
    return sigmas.numpy(), registers[:, 0].numpy()
