"""The loop's own ticks, with many requests in one batch, against ComfyUI's KSampler one by one."""

from types import SimpleNamespace

import pytest
import torch
from comparison import Case, Samples, compare
from network import TinyNetwork, contexts, noise_mask, start_latent

from fullpipe.engines import Engine
from fullpipe.job import Work
from fullpipe.noise import SamplerNoise, start_noise
from fullpipe.samplers import build_table, get_sampler
from fullpipe.schedulers import ModelSampling, calculate_sigmas
from fullpipe.slots import Group, Shape

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),  # torchsde's own rounding
]

SAMPLING = ModelSampling.from_scheduler_config({})

MIXED = [
    Case("euler", "normal", "float32", steps=12, seed=1),
    Case("dpmpp_2m", "karras", "float32", steps=7, seed=2, cfg=7.0, batch=2),
    Case("dpmpp_sde", "karras", "float32", steps=5, seed=3),
    Case("euler_ancestral_cfg_pp", "simple", "float32", seed=4, cfg=1.0),
    Case("heun", "beta", "float32", seed=5, denoise=0.6, batch=2),
    Case("uni_pc", "sgm_uniform", "float32", seed=6, cfg=1.0),
    Case("lcm", "sgm_uniform", "float32", steps=4, seed=7, cfg=1.0),
    Case("sa_solver_pece", "exponential", "float32", seed=8),
]


class Network(Engine):
    """The tiny network behind the loop's protocol."""

    def __init__(self):
        self.network = TinyNetwork(False, torch.float32)

    def run(self, tensors):
        sigmas = SAMPLING.sigmas[tensors["timestep"]]
        context = tensors["encoder_hidden_states"][:, 0]
        return {"noise_pred": self.network(tensors["sample"], sigmas, context)}


def work_of(case: Case) -> tuple[torch.Tensor, Work]:
    """What the pipeline hands to the loop for this case, and its sigmas."""
    sampler, size = get_sampler(case.sampler_name), case.size
    sigmas = calculate_sigmas(SAMPLING, case.scheduler, case.steps, case.denoise, sampler.name)
    table = build_table(sampler.name, sigmas, SAMPLING)
    latent_image = start_latent(case.batch, size)
    if case.denoise == 1 and not case.is_masked:
        latent_image = torch.zeros_like(latent_image)
    noise = start_noise(case.seed, case.batch, size, size)
    drawn = None
    if sampler.noise_kind != "none":
        span = float(sigmas[sigmas > 0].min()), float(sigmas.max())
        drawn = SamplerNoise(sampler.noise_kind, case.seed, tuple(noise.shape), *span)
    return sigmas, Work(
        embeds=torch.stack(contexts()),
        pooled=None,
        time_ids=None,
        table=table,
        start=SAMPLING.start(noise, latent_image, sigmas[0]),
        latent_image=latent_image,
        mask_noise=start_noise(
            case.seed + (sampler.inpaint_seed_offset or 0), case.batch, size, size
        ),
        mask=noise_mask(size).expand(case.batch, 1, size, size) if case.is_masked else None,
        noise=drawn,
        cfg=case.cfg,
        is_guided=case.cfg != 1.0 or sampler.needs_uncond,
    )


def sample_together(cases: list[Case]) -> list[Samples]:
    """All cases in one group: every tick advances whoever is not done."""
    size = cases[0].size
    prepared = [work_of(case) for case in cases]
    group = Group(Shape(size, size, 1), sum(c.batch for c in cases), torch.device("cpu"), SAMPLING)
    for _, work in prepared:
        for image in range(len(work.start)):
            group.put(SimpleNamespace(work=work), image)
    engine = Network()
    while busy := [
        slot
        for slot in group.taken
        if group.occupant(slot).position < len(group.occupant(slot).job.work.table.sigmas)
    ]:
        group.tick(busy, engine)
    latents = iter([group.latents(slot) for slot in group.taken])
    return [
        (sigmas.numpy(), torch.stack([next(latents) for _ in work.start]).numpy())
        for sigmas, work in prepared
    ]


def test_eight_different_requests_in_one_batch_each_get_comfyuis_latents(comfyui):
    for difference in compare(comfyui, MIXED, sample_together):
        assert difference.sigmas_equal
        assert difference.relative < 1e-4, difference


@pytest.mark.parametrize("denoise", [1.0, 0.6])
def test_inpainting_keeps_and_repaints_what_comfyui_does(comfyui, denoise):
    cases = [
        Case(name, "normal", "float32", denoise=denoise, batch=2, is_masked=True)
        for name in ("euler", "ddim", "dpmpp_2m_sde", "dpm_2", "euler_cfg_pp", "lcm")
    ]
    for difference in compare(comfyui, cases, sample_together):
        assert difference.relative < 1e-4, difference
