"""Against diffusers' own StableDiffusionPipeline: same weights, noise and sigmas, same latents."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)

from fullpipe.noise import start_noise

RED = "a red circle on a white background"
STEPS = 10  # divides 1000, so that `simple` visits the timesteps of diffusers' "trailing"
SCHEDULERS = {
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "ddim": DDIMScheduler,
}


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("sampler_name", SCHEDULERS)
def test_latents_equal_those_of_diffusers(checkpoint, config, open_pipeline, sampler_name, cfg):
    theirs = StableDiffusionPipeline.from_pretrained(
        checkpoint, dtype=torch.float32, local_files_only=True
    )
    theirs.set_progress_bar_config(disable=True)
    changes = {"clip_sample": False} if sampler_name == "ddim" else {}
    theirs.scheduler = SCHEDULERS[sampler_name].from_config(
        theirs.scheduler.config, timestep_spacing="trailing", **changes
    )
    theirs.scheduler.set_timesteps(STEPS)
    latents = start_noise(7, 1, 32, 32)
    if sampler_name == "euler":
        # diffusers starts this spacing at noise times sigma; ComfyUI adds the latents' variance.
        sigma = theirs.scheduler.sigmas[0]
        latents = latents * (sigma**2 + 1).sqrt() / sigma
    wanted = theirs(
        RED,
        num_inference_steps=STEPS,
        guidance_scale=cfg,
        latents=latents,
        output_type="latent",
    ).images

    made = open_pipeline().generate(
        prompt=RED,
        seed=7,
        steps=STEPS,
        cfg=cfg,
        sampler_name=sampler_name,
        scheduler="simple",
        output="latents",
    )
    difference = made.latents * config.checkpoint.scaling_factor - wanted
    assert difference.abs().max() < 1e-4
