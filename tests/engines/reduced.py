"""Random checkpoints of the SD1, SD2 and SDXL layouts, small enough to build in a second.

`build` makes a diffusers folder; `single_file` gives the same weights under the names of a single
file, by the renaming that is known to load in ComfyUI (tests/parity/checkpoints.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file

from fullpipe.text.clip import ClipConfig, ClipTextModel
from tests.parity.checkpoints import (
    CLIP_G,
    CLIP_L,
    SCHEDULER,
    SD15_UNET,
    SDXL_UNET,
    TOKENIZER,
    open_clip,
    unet_keys,
    vae_keys,
)

TRUE_CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 1024,
}
TRUE_SD2_UNET = {
    **SD15_UNET,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}
TRUE = {
    "sd1": (SD15_UNET, (128, 256, 512, 512), [CLIP_L]),
    "sd2": (TRUE_SD2_UNET, (128, 256, 512, 512), [TRUE_CLIP_H]),
    "sdxl": (SDXL_UNET, (128, 256, 512, 512), [CLIP_L, CLIP_G]),
}

L = CLIP_L | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "projection_dim": 64,
}
G = L | {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "hidden_act": "gelu",
    "projection_dim": 128,
}
SMALL = {
    "sd1": (
        SD15_UNET | {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64},
        (32, 32, 32, 32),
        [L],
    ),
    "sd2": (
        TRUE_SD2_UNET
        | {
            "block_out_channels": (64, 64, 128, 128),
            "attention_head_dim": (1, 1, 2, 2),
            "cross_attention_dim": 128,
        },
        (32, 32, 32, 32),
        [G | {"num_hidden_layers": 24}],
    ),
    "sdxl": (
        SDXL_UNET
        | {
            "block_out_channels": (64, 64, 128),
            "attention_head_dim": (1, 1, 2),
            "transformer_layers_per_block": (1, 2, 3),
            "cross_attention_dim": 192,
            "projection_class_embeddings_input_dim": 6 * 256 + 128,
        },
        (32, 32, 32, 32),
        [L, G],
    ),
}
# What takes long to compile is the number of layers, not their width: a kind of each, and no more.
LEAN = {
    "sd1": (
        SD15_UNET
        | {
            "block_out_channels": (64, 128),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 64,
        },
        (32, 32, 32, 32),
        [L],
    ),
    "sdxl": (
        SMALL["sdxl"][0]
        | {
            "block_out_channels": (64, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (1, 2),
            "layers_per_block": 1,
            "transformer_layers_per_block": (1, 2),
        },
        (32, 32, 32, 32),
        [L, G],
    ),
}
SCALING = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
TEXT_FOLDERS = ("text_encoder", "text_encoder_2")


def networks(
    family: str, sizes: dict = SMALL, sample_size: int = 8
) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """A family's UNet and VAE with torch's random weights, on the default device."""
    unet, channels, _ = sizes[family]
    levels = len(channels)
    return (
        UNet2DConditionModel(**unet, sample_size=sample_size).eval(),
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=channels,
            layers_per_block=unet.get("layers_per_block", 2),
            sample_size=8 * sample_size,
            scaling_factor=SCALING[family],
        ).eval(),
    )


def text_weights(config: dict, *, has_projection: bool) -> dict[str, torch.Tensor]:
    """Random CLIP weights under transformers' names, on the default device."""
    shape = ClipConfig(
        **{"vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5, **config}
        | {"projection_dim": config["projection_dim"] if has_projection else None}
    )
    with torch.device("meta"):
        wanted = ClipTextModel(shape).state_dict()
    return {
        name if name.startswith("text_projection") else f"text_model.{name}": 0.1
        * torch.randn(tensor.shape)
        + ("norm" in name and name.endswith("weight"))
        for name, tensor in wanted.items()
    }


@torch.no_grad()
def build(
    family: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sizes: dict = SMALL,
    sample_size: int = 8,
) -> Path:
    """Write a diffusers folder with random weights, of a small network unless `sizes` is TRUE.

    Args:
        sample_size: latent side of the native size.
    """
    torch.manual_seed(seed)
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    name = f"StableDiffusion{'XL' if family == 'sdxl' else ''}Pipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    unet, vae = networks(family, sizes, sample_size)
    for module in (*unet.modules(), *vae.modules()):
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            module.weight.add_(0.05 * torch.randn_like(module.weight))
            module.bias.add_(0.05 * torch.randn_like(module.bias))
    unet.to(dtype).save_pretrained(folder / "unet")
    vae.to(dtype).save_pretrained(folder / "vae")
    for part, config in zip(TEXT_FOLDERS, sizes[family][2], strict=False):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
        has_projection = config["hidden_act"] == "gelu"
        weights = text_weights(config, has_projection=has_projection)
        save_file({k: v.to(dtype) for k, v in weights.items()}, folder / part / "model.safetensors")
    return folder


def single_file_keys(
    family: str,
    unet: dict[str, torch.Tensor],
    vae: dict[str, torch.Tensor],
    text: list[dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Weights under diffusers' and transformers' names as a single file names them."""
    keys = {f"model.diffusion_model.{k}": v for k, v in unet_keys(unet).items()}
    keys |= {f"first_stage_model.{k}": v for k, v in vae_keys(vae).items()}
    if family == "sd1":
        keys |= {f"cond_stage_model.transformer.{k}": v for k, v in text[0].items()}
    elif family == "sd2":
        keys |= {f"cond_stage_model.model.{k}": v for k, v in open_clip(text[0]).items()}
    else:
        keys |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in text[0].items()}
        keys |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(text[1]).items()}
    return keys
