"""Every sampler by its ComfyUI name, in ComfyUI's order."""

from __future__ import annotations

import numpy as np
import torch

from fullpipe.errors import InvalidRequest
from fullpipe.samplers import dpm_solver, runge_kutta
from fullpipe.samplers.table import Sampler, Table, tabulate
from fullpipe.schedulers import ModelSampling

_ALL = (
    Sampler("euler", runge_kutta.euler),
    Sampler("euler_cfg_pp", runge_kutta.euler_cfg_pp, needs_uncond=True),
    Sampler("euler_ancestral", runge_kutta.euler_ancestral, "normal"),
    Sampler(
        "euler_ancestral_cfg_pp", runge_kutta.euler_ancestral_cfg_pp, "normal", needs_uncond=True
    ),
    Sampler("heun", runge_kutta.heun),
    Sampler("heunpp2", runge_kutta.heunpp2),
    Sampler("dpm_2", runge_kutta.dpm_2),
    Sampler("dpm_2_ancestral", runge_kutta.dpm_2_ancestral, "normal"),
    Sampler("dpmpp_2m", dpm_solver.dpmpp_2m),
    Sampler("ddpm", runge_kutta.ddpm, "normal"),
    Sampler("lcm", runge_kutta.lcm, "normal"),
    Sampler("ddim", runge_kutta.euler, inpaint_seed_offset=1),
)

SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in _ALL}

UNSUPPORTED: dict[str, str] = {
    "dpm_adaptive": "it chooses its steps from the sample's values, so it has no table"
}


def get_sampler(name: str) -> Sampler:
    """Look a sampler up by its ComfyUI name.

    Raises:
        InvalidRequest: there is none; the message says why or lists those there are.
    """
    if name in UNSUPPORTED:
        raise InvalidRequest(f"sampler_name={name!r} is not served: {UNSUPPORTED[name]}")
    if name not in SAMPLERS:
        raise InvalidRequest(f"sampler_name={name!r} must be one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def build_table(
    sampler_name: str, sigmas: np.ndarray | torch.Tensor, sampling: ModelSampling
) -> Table:
    """The table of one request: `get_sampler`, then `tabulate`."""
    return tabulate(get_sampler(sampler_name), sigmas, sampling)
