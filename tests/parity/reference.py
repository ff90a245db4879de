"""Runs in ComfyUI's process: `reference.py CASES.json OUT.npz` samples every case with ComfyUI.

A case in float64 calls the sampler function of comfy.k_diffusion.sampling directly; one in float32
goes through comfy.sample.sample, as the KSampler node does.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

CASES, OUT = sys.argv[1:]
sys.argv[1:] = ["--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402
from network import TinyNetwork, contexts, noise_mask, start_latent  # noqa: E402

SCALE = 0.18215


class DiffusionModel(torch.nn.Module):
    """The tiny network with the signature that ComfyUI calls."""

    dtype = torch.float32

    def __init__(self, network, sigmas):
        super().__init__()
        self.network, self.sigmas = network, sigmas

    def forward(self, x, timesteps, context, **kwargs):
        return self.network(x, self.sigmas[timesteps.long()], context[:, 0])


def make_model(case):
    """A ComfyUI model patcher around the tiny network."""
    config = comfy.supported_models.SD15({"disable_unet_model_creation": True})
    config.sampling_settings = {"zsnr": case["zero_snr"]}
    is_velocity = case["prediction_type"] == "v_prediction"
    kind = comfy.model_base.ModelType.V_PREDICTION if is_velocity else None
    model = comfy.model_base.BaseModel(config, kind or comfy.model_base.ModelType.EPS)
    network = TinyNetwork(is_velocity, torch.float32)
    model.diffusion_model = DiffusionModel(network, model.model_sampling.sigmas)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def sample_float32(case, model):
    latent = torch.zeros(case["batch"], 4, case["size"], case["size"])
    if case["denoise"] < 1 or case["is_masked"]:
        latent = start_latent(case["batch"], case["size"]) / SCALE
    positive, negative = ([[c[:, None], {}]] for c in contexts())
    noise = comfy.sample.prepare_noise(latent, case["seed"])
    samples = comfy.sample.sample(
        model,
        noise,
        case["steps"],
        case["cfg"],
        case["sampler_name"],
        case["scheduler"],
        positive,
        negative,
        latent,
        denoise=case["denoise"],
        noise_mask=noise_mask(case["size"]) if case["is_masked"] else None,
        disable_pbar=True,
        seed=case["seed"],
    )
    return samples * SCALE


def sample_float64(case, model, sigmas):
    """Call the sampler function itself; where it draws noise, both sides draw the same."""
    sigmas = sigmas.double()
    network = TinyNetwork(case["prediction_type"] == "v_prediction", torch.float64)
    sampling = model.get_model_object("model_sampling")
    positive, negative = (c.double() for c in contexts())

    def denoise(x, sigma, model_options=None, **kwargs):
        scaled = sampling.calculate_input(sigma, x)
        conditional, unconditional = (
            sampling.calculate_denoised(sigma, network(scaled, sigma, c.expand(len(x), -1)), x)
            for c in (positive, negative)
        )
        denoised = unconditional + (conditional - unconditional) * case["cfg"]
        for hook in (model_options or {}).get("sampler_post_cfg_function", []):
            denoised = hook({"denoised": denoised, "uncond_denoised": unconditional})
        return denoised

    denoise.inner_model = SimpleNamespace(
        inner_model=SimpleNamespace(model_sampling=sampling), model_patcher=model
    )
    generator = torch.Generator().manual_seed(case["seed"])

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = (case["batch"], 4, case["size"], case["size"])
    x = draw(*shape) * float(sigmas[0])
    function = comfy.samplers.sampler_object(case["sampler_name"]).sampler_function
    options = {}
    if "noise_sampler" in inspect.signature(function).parameters:
        options["noise_sampler"] = lambda sigma, sigma_next: draw(*shape)
    # These two make tensors of the default precision inside.
    in_double = case["sampler_name"] == "dpm_fast" or case["sampler_name"].startswith("uni_pc")
    torch.set_default_dtype(torch.float64 if in_double else torch.float32)
    try:
        return function(
            denoise, x, sigmas.clone(), extra_args={}, callback=None, disable=True, **options
        )
    finally:
        torch.set_default_dtype(torch.float32)


def main():
    torch.set_num_threads(1)
    cases = json.loads(Path(CASES).read_text())
    results, models = {}, {}
    results["sampler_names"] = np.array(comfy.samplers.SAMPLER_NAMES)
    results["scheduler_names"] = np.array(comfy.samplers.SCHEDULER_NAMES)
    with torch.no_grad():
        for i, case in enumerate(cases):
            key = (case["prediction_type"], case["zero_snr"])
            if key not in models:
                models[key] = make_model(case)
            sigmas = comfy.samplers.KSampler(
                models[key],
                case["steps"],
                torch.device("cpu"),
                case["sampler_name"],
                case["scheduler"],
                case["denoise"],
            ).sigmas
            results[f"sigmas{i}"] = sigmas.numpy()
            if case["precision"] == "float64":
                result = sample_float64(case, models[key], sigmas)
            else:
                result = sample_float32(case, models[key])
            results[f"samples{i}"] = result.numpy()
    np.savez(OUT, **results)


main()
