"""Every sampler by its ComfyUI name, in ComfyUI's order."""

from __future__ import annotations

import numpy as np
import torch

from fullpipe.errors import InvalidRequest
from fullpipe.samplers import dpm_solver, multistep, predictor_corrector, runge_kutta, stochastic
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
    Sampler("lms", multistep.lms),
    Sampler("dpm_fast", dpm_solver.dpm_fast),
    Sampler("dpmpp_2s_ancestral", dpm_solver.dpmpp_2s_ancestral, "normal"),
    Sampler(
        "dpmpp_2s_ancestral_cfg_pp",
        dpm_solver.dpmpp_2s_ancestral_cfg_pp,
        "normal",
        needs_uncond=True,
    ),
    Sampler("dpmpp_sde", dpm_solver.dpmpp_sde, "brownian"),
    Sampler("dpmpp_sde_gpu", dpm_solver.dpmpp_sde, "brownian_gpu"),
    Sampler("dpmpp_2m", dpm_solver.dpmpp_2m),
    Sampler("dpmpp_2m_cfg_pp", dpm_solver.dpmpp_2m_cfg_pp, needs_uncond=True),
    Sampler("dpmpp_2m_sde", dpm_solver.dpmpp_2m_sde, "brownian"),
    Sampler("dpmpp_2m_sde_gpu", dpm_solver.dpmpp_2m_sde, "brownian_gpu"),
    Sampler("dpmpp_2m_sde_heun", dpm_solver.dpmpp_2m_sde_heun, "brownian"),
    Sampler("dpmpp_2m_sde_heun_gpu", dpm_solver.dpmpp_2m_sde_heun, "brownian_gpu"),
    Sampler("dpmpp_3m_sde", dpm_solver.dpmpp_3m_sde, "brownian"),
    Sampler("dpmpp_3m_sde_gpu", dpm_solver.dpmpp_3m_sde, "brownian_gpu"),
    Sampler("ddpm", runge_kutta.ddpm, "normal"),
    Sampler("lcm", runge_kutta.lcm, "normal"),
    Sampler("ipndm", multistep.ipndm),
    Sampler("ipndm_v", multistep.ipndm_v),
    Sampler("deis", multistep.deis),
    Sampler("res_multistep", multistep.res_multistep),
    Sampler("res_multistep_cfg_pp", multistep.res_multistep_cfg_pp, needs_uncond=True),
    Sampler("res_multistep_ancestral", multistep.res_multistep_ancestral, "normal"),
    Sampler(
        "res_multistep_ancestral_cfg_pp",
        multistep.res_multistep_ancestral_cfg_pp,
        "normal",
        needs_uncond=True,
    ),
    Sampler("gradient_estimation", multistep.gradient_estimation),
    Sampler("gradient_estimation_cfg_pp", multistep.gradient_estimation_cfg_pp, needs_uncond=True),
    Sampler("er_sde", stochastic.er_sde, "normal"),
    Sampler("seeds_2", stochastic.seeds_2, "normal"),
    Sampler("seeds_3", stochastic.seeds_3, "normal"),
    Sampler("sa_solver", predictor_corrector.sa_solver, "normal"),
    Sampler("sa_solver_pece", predictor_corrector.sa_solver_pece, "normal"),
    Sampler("ddim", runge_kutta.euler, inpaint_seed_offset=1),
    Sampler("uni_pc", predictor_corrector.uni_pc),
    Sampler("uni_pc_bh2", predictor_corrector.uni_pc_bh2),
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
