"""Sample the demo checkpoint with diffusers' schedulers: many captions in one batch."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer


def load(checkpoint, device="cpu"):
    """Load a checkpoint's networks in fp32.

    Returns:
        dict with tokenizer, text_encoder, unet and vae, ready for `sample`.
    """
    folder = Path(checkpoint)
    full = {"torch_dtype": torch.float32}
    return {
        "folder": folder,
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": CLIPTextModel.from_pretrained(
            folder / "text_encoder", dtype=torch.float32
        ).to(device),
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet", **full).to(device),
        "vae": AutoencoderKL.from_pretrained(folder / "vae", **full).to(device),
    }


@torch.inference_mode()
def sample(parts, captions, seeds, size=(256, 256), steps=20, cfg=8.0, sampler="euler"):
    """Draw one picture for each caption, with the empty prompt as the negative.

    Args:
        parts: from `load`.
        captions, seeds: equally many strings and integers; a picture depends on its own pair only.
        size: height and width in pixels.
        steps, cfg: as everywhere.
        sampler: `euler` with the `normal` schedule, or `dpmpp_2m` with the `karras` schedule.
    Returns:
        [N, height, width, 3] uint8 array.
    """
    unet, vae = parts["unet"], parts["vae"]
    device, (height, width) = unet.device, size
    if sampler == "euler":
        scheduler = EulerDiscreteScheduler.from_pretrained(parts["folder"] / "scheduler")
    else:
        scheduler = DPMSolverMultistepScheduler.from_pretrained(
            parts["folder"] / "scheduler", use_karras_sigmas=True
        )
    scheduler.set_timesteps(steps, device=device)
    texts = [*captions, *[""] * len(captions)]
    ids = parts["tokenizer"](
        texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    prompt_embeds = parts["text_encoder"](ids.to(device)).last_hidden_state
    noise = [
        torch.randn(1, 4, height // 8, width // 8, generator=torch.manual_seed(seed))
        for seed in seeds
    ]
    latents = torch.cat(noise).to(device) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        rows = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        noise_pred = unet(rows, timestep, prompt_embeds).sample
        conditional, unconditional = noise_pred.chunk(2)
        guided = unconditional + cfg * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    latents = latents / vae.config.scaling_factor
    images = torch.cat([vae.decode(one[None]).sample for one in latents])
    images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return (images * 255).round().byte().cpu().numpy()
