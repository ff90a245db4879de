"""Random-weight checkpoints of the SD1.5 and SDXL architectures, in two layouts with equal numbers.

`write_checkpoint` writes a diffusers folder and the single file that ComfyUI's
CheckpointLoaderSimple reads. ComfyUI knows an architecture by its key names and a few shapes, so
these stay true: text encoders (CLIP-L; for SDXL also CLIP-G with its 32 layers) and VAE are of full
size, and the UNet has every block, head and transformer layer of the original, with 320 base
channels, SD1.5's context of 768, SDXL's context of 2048 and 2816 numbers of pooled text and size.
Only its deeper levels are narrower, which ComfyUI reads off the weights; `is_full_size` keeps them.

Random weights alone would give latents of any size and flat or saturated pictures. So three output
layers are fitted: the UNet's predicts the noise as well as one layer can, which makes sampling
converge, and the VAE's give latents of unit scale and pictures of medium contrast.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file

from fullpipe.text.clip import ClipConfig, ClipTextModel

TOKENIZER = Path(__file__).parents[2] / "demo" / "checkpoint" / "tokenizer"
SIZE_PX = 64
CONTRAST = 0.4  # standard deviation of decoded pictures, which lie in -1 … 1

SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
SD15_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
NARROW = {
    "sd15": {"block_out_channels": (320, 320, 320, 320)},
    "sdxl": {"block_out_channels": (320, 320, 320), "attention_head_dim": (5, 5, 5)},
}
SCALING_FACTOR = {"sd15": 0.18215, "sdxl": 0.13025}


@torch.no_grad()
def write_checkpoint(
    kind: str, folder: Path, single_file: Path, *, is_full_size: bool = False, seed: int = 0
) -> None:
    """Write one checkpoint twice, in fp16.

    Args:
        kind: sd15 or sdxl.
        folder: where the diffusers folder goes; it and its parents are made.
        single_file: a *.safetensors path in an existing folder.
        is_full_size: keep the UNet's true widths: 860 M parameters for SD1.5, 2.6 G for SDXL.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    index = {"_class_name": f"StableDiffusion{'XL' if kind == 'sdxl' else ''}Pipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))

    unet = _unet(kind, is_full_size).half()
    unet.save_pretrained(folder / "unet")
    vae = _vae(SCALING_FACTOR[kind]).half()
    vae.save_pretrained(folder / "vae")
    keys = {f"model.diffusion_model.{k}": v for k, v in unet_keys(unet.state_dict()).items()}
    keys |= {f"first_stage_model.{k}": v for k, v in vae_keys(vae.state_dict()).items()}

    clip_l = _save_clip(folder / "text_encoder", CLIP_L, has_projection=False)
    if kind == "sd15":
        keys |= {f"cond_stage_model.transformer.{k}": v for k, v in clip_l.items()}
    else:
        clip_g = _save_clip(folder / "text_encoder_2", CLIP_G, has_projection=True)
        keys |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in clip_l.items()}
        keys |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(clip_g).items()}
    save_file({key: value.contiguous() for key, value in keys.items()}, single_file)


def _unet(kind: str, is_full_size: bool) -> UNet2DConditionModel:
    config = {**{"sd15": SD15_UNET, "sdxl": SDXL_UNET}[kind], "sample_size": SIZE_PX // 8}
    unet = UNet2DConditionModel(**config | ({} if is_full_size else NARROW[kind])).eval()
    _perturb_norms(unet)
    # The first layer's own output reaches the last block, where the fit finds the sample in it.
    unet.conv_in.weight.mul_(4.0)
    for name, parameter in unet.named_parameters():
        if name.endswith("attn2.to_out.0.weight"):
            parameter.mul_(8.0)  # the prompt's say

    rows, side = 16, SIZE_PX // 8
    timesteps = torch.linspace(0, 999, rows).long()
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)[timesteps]
    alphas = alphas.view(-1, 1, 1, 1)
    noise = torch.randn(rows, 4, side, side)
    sample = alphas.sqrt() * torch.randn(rows, 4, side, side) + (1 - alphas).sqrt() * noise
    added = None
    if kind == "sdxl":
        sizes = torch.tensor([SIZE_PX, SIZE_PX, 0, 0, SIZE_PX, SIZE_PX]).float()
        added = {"text_embeds": torch.randn(rows, 1280), "time_ids": sizes.expand(rows, 6)}
    context = torch.randn(rows, 77, config["cross_attention_dim"])
    seen: list[torch.Tensor] = []
    hook = unet.conv_out.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for part in range(0, rows, 8):
        few = slice(part, part + 8)
        some = added and {name: value[few] for name, value in added.items()}
        unet(sample[few], timesteps[few], context[few], added_cond_kwargs=some)
    hook.remove()
    features = torch.cat(seen).permute(0, 2, 3, 1).flatten(0, 2).double()
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    wanted = noise.permute(0, 2, 3, 1).flatten(0, 2).double()
    gram = features.T @ features
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    fitted = torch.linalg.solve(gram, features.T @ wanted).float()
    unet.conv_out.weight.zero_()
    unet.conv_out.weight[:, :, 1, 1] = fitted[:-1].T
    unet.conv_out.bias.copy_(fitted[-1])
    return unet


def _vae(scaling_factor: float) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=SIZE_PX,
        scaling_factor=scaling_factor,
    ).eval()
    _perturb_norms(vae)
    coarse = torch.rand(2, 3, 8, 8)
    pictures = torch.nn.functional.interpolate(coarse, (SIZE_PX, SIZE_PX), mode="bilinear") * 2 - 1
    latents = vae.encode(pictures).latent_dist.mode()
    _standardise(vae.quant_conv, latents, 1.0 / scaling_factor)
    latents = torch.randn(2, 4, SIZE_PX // 8, SIZE_PX // 8) / scaling_factor
    _standardise(vae.decoder.conv_out, vae.decode(latents).sample, CONTRAST)
    return vae


def _perturb_norms(model: torch.nn.Module) -> None:
    """Norms start as the identity, which would hide that two of them were swapped."""
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            module.weight.add_(0.1 * torch.randn_like(module.weight))
            module.bias.add_(0.1 * torch.randn_like(module.bias))


def _standardise(layer: torch.nn.Conv2d, output: torch.Tensor, deviation: float) -> None:
    """Give the first channels of a layer, whose `output` is known, mean 0 and this deviation."""
    count = output.shape[1]
    mean, std = output.mean((0, 2, 3)), output.std((0, 2, 3))
    layer.weight[:count] *= (deviation / std).view(-1, 1, 1, 1)
    layer.bias[:count] = (layer.bias[:count] - mean) * deviation / std


def _save_clip(folder: Path, config: dict, *, has_projection: bool) -> dict[str, torch.Tensor]:
    """Random weights as a transformers folder; returned under transformers' names."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shape = ClipConfig.from_file(folder / "config.json", has_projection=has_projection)
        model = ClipTextModel(shape)
    weights = {}
    for name, parameter in model.state_dict().items():
        values = torch.randn(parameter.shape)
        if "norm" in name:
            values = 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
        elif "embedding" in name or parameter.ndim == 1:
            values *= 0.1
        else:
            values *= 1 / math.sqrt(parameter.shape[1])
        if name.endswith(("out_proj.weight", "fc2.weight")):
            values *= 0.3  # what each layer adds to the residual stream
        prefix = "" if name.startswith("text_projection") else "text_model."
        weights[prefix + name] = values.half()
    save_file(weights, folder / "model.safetensors")
    return weights


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_keys(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A diffusers UNet's weights in the single file's names; each level has two resnets."""
    levels_with_attention = {
        key.split(".attentions.")[0] for key in weights if ".attentions." in key
    }
    return {_unet_key(key, levels_with_attention): value for key, value in weights.items()}


def _unet_key(key: str, levels_with_attention: set[str]) -> str:
    path, _, leaf = key.rpartition(".")
    if path in UNET_ENDS:
        return f"{UNET_ENDS[path]}.{leaf}"
    level, part, name = re.fullmatch(r"(\w+(?:\.\d)?)\.(\w+\.\d+)\.(.*)", key).groups()
    part, _, index = part.partition(".")
    if part == "resnets":
        first, _, rest = name.partition(".")
        name = f"{RESNET[first]}.{rest}"
    side, _, number = level.partition(".")
    if side == "mid_block":
        return f"middle_block.{1 if part == 'attentions' else 2 * int(index)}.{name}"
    first_block = 3 * int(number) + (2 if part == "upsamplers" else int(index))
    if side == "up_blocks":
        upsampler = 2 if level in levels_with_attention else 1
        place = {"resnets": 0, "attentions": 1, "upsamplers": upsampler}[part]
        return f"output_blocks.{first_block}.{place}.{name}"
    if part == "downsamplers":
        return f"input_blocks.{first_block + 3}.0.op.{leaf}"
    return f"input_blocks.{first_block + 1}.{1 if part == 'attentions' else 0}.{name}"


VAE_NAMES = [
    (r"^(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
    (r"^encoder\.down_blocks\.(\d)\.resnets\.(\d)\.", r"encoder.down.\1.block.\2."),
    (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"^decoder\.up_blocks\.0\.", "decoder.up.<3>."),
    (r"^decoder\.up_blocks\.1\.", "decoder.up.<2>."),
    (r"^decoder\.up_blocks\.2\.", "decoder.up.<1>."),
    (r"^decoder\.up_blocks\.3\.", "decoder.up.<0>."),
    (r"<(\d)>\.resnets\.(\d)\.", r"\1.block.\2."),
    (r"<(\d)>\.upsamplers\.0\.", r"\1.upsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
]


def vae_keys(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A diffusers AutoencoderKL's weights in the single file's names; attention as 1×1 convs."""
    renamed = {}
    for key, value in weights.items():
        for pattern, replacement in VAE_NAMES:
            key = re.sub(pattern, replacement, key)
        is_matrix = ".attn_1." in key and value.ndim == 2
        renamed[key] = value[:, :, None, None] if is_matrix else value
    return renamed


OPEN_CLIP_NAMES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' CLIP weights as OpenCLIP names and packs them, for SDXL's second encoder."""
    packed = {
        "token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": weights["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": weights["text_model.final_layer_norm.weight"],
        "ln_final.bias": weights["text_model.final_layer_norm.bias"],
        "text_projection": weights["text_projection.weight"].T,
    }
    for key, value in weights.items():
        match = re.match(r"text_model\.encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", key)
        if match is None:
            continue
        layer, name, leaf = match.groups()
        block = f"transformer.resblocks.{layer}"
        if name in OPEN_CLIP_NAMES:
            packed[f"{block}.{OPEN_CLIP_NAMES[name]}.{leaf}"] = value
        elif name == "self_attn.q_proj":
            three = [weights[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            packed[f"{block}.attn.in_proj_{leaf}"] = torch.cat(three)
    return packed
