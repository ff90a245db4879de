"""Which Stable Diffusion a single file holds, read off the names and shapes of its weights.

A single file has no configuration. Depths, widths and what a network is conditioned on follow from
the state dict; the rest (heads, activation, noise schedule) follows from the family, as in ComfyUI
0.3.75 (`comfy/model_detection.py`, `comfy/supported_models.py`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch

from fullpipe.errors import SetupError

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP_L = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.0.model.")
CLIP_G = "conditioner.embedders.1.model."

V_PREDICTION_STD = 0.09  # of a norm's bias in SD2: ComfyUI's way to tell 768-v from base
_METADATA_PREDICTION = ("modelspec.prediction_type", "modelspec.predict_key")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A single file in diffusers' terms.

    Attributes:
        family: sd1, sd2 or sdxl.
        unet, vae, scheduler: the configs of diffusers' classes.
        text_encoder: transformers' CLIP config of the only or the first encoder.
        text_encoder_2: of SDXL's second one, or None.
        text_prefixes: where the weights of each encoder begin.
    """

    family: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoder: dict[str, Any]
    text_encoder_2: dict[str, Any] | None
    text_prefixes: tuple[str, ...]


def detect(weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Architecture:
    """Recognise a state dict.

    Args:
        weights: of a single file; only shapes are read, and one small vector of SD2. Tensors
            without storage (on the meta device) do.
        metadata: of the safetensors file; may name the prediction type.
    Raises:
        SetupError: a part is missing, or it is a network that this project cannot serve.
    """
    _refuse_others(weights)
    unet = _unet(weights)
    context = unet["cross_attention_dim"]
    has_g = any(key.startswith(CLIP_G) for key in weights)
    if unet["addition_embed_type"] is not None:
        family = "sdxl"
    else:
        family = "sd2" if unet["use_linear_projection"] else "sd1"
    prefixes: tuple[str, ...]
    if family == "sdxl":
        prefixes = (_prefix(weights, CLIP_L[1:], "CLIP-L text encoder"), CLIP_G)
        if not has_g:
            raise SetupError(f"it has no CLIP-G text encoder (keys {CLIP_G}*)")
        text = [_clip(weights, prefixes[0]), _open_clip(weights, CLIP_G)]
    elif family == "sd2":
        prefixes = (_prefix(weights, OPEN_CLIP, "OpenCLIP text encoder"),)
        text = [_open_clip(weights, prefixes[0])]
    else:
        prefixes = (_prefix(weights, CLIP_L, "CLIP-L text encoder"),)
        text = [_clip(weights, prefixes[0])]
    width = sum(encoder["hidden_size"] for encoder in text)
    if width != context:
        raise SetupError(f"its text encoders are {width} wide, its UNet takes {context}")
    is_v, is_zero_snr = _prediction(weights, metadata, family)
    native_px = (
        _native_px(metadata) or {"sd1": 512, "sd2": 768 if is_v else 512, "sdxl": 1024}[family]
    )
    vae = _vae(weights, native_px, family)
    unet["sample_size"] = native_px // 2 ** (len(vae["block_out_channels"]) - 1)
    return Architecture(
        family=family,
        unet=unet,
        vae=vae,
        scheduler={
            "_class_name": "EulerDiscreteScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "prediction_type": "v_prediction" if is_v else "epsilon",
            "rescale_betas_zero_snr": is_zero_snr,
        },
        text_encoder=text[0],
        text_encoder_2=text[1] if len(text) == 2 else None,
        text_prefixes=prefixes,
    )


def _refuse_others(weights: Mapping[str, torch.Tensor]) -> None:
    if f"{UNET}input_blocks.0.0.weight" not in weights:
        what = "a LoRA" if any("lora" in key for key in weights) else "no Stable Diffusion UNet"
        first = next(iter(weights), "nothing")
        raise SetupError(
            f"it holds {what} (first key {first}); allowed are whole SD1.x, SD2.x and SDXL"
            f" checkpoints with keys {UNET}*, {VAE}* and a text encoder"
        )
    if "edm_mean" in weights or "edm_vpred.sigma_max" in weights:
        raise SetupError("it was trained with EDM noise levels (Playground, CosXL), not served")
    channels = weights[f"{UNET}input_blocks.0.0.weight"].shape[1]
    if channels != 4:
        kind = {9: "an inpainting", 8: "an instruct-pix2pix"}.get(channels, "another")
        raise SetupError(f"it is {kind} checkpoint: its UNet takes {channels} channels, allowed 4")


def _prefix(weights: Mapping[str, torch.Tensor], prefixes: tuple[str, ...], what: str) -> str:
    for prefix in prefixes:
        if any(key.startswith(prefix) for key in weights):
            return prefix
    raise SetupError(f"it has no {what} (keys {' or '.join(f'{p}*' for p in prefixes)})")


def _unet(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The config of diffusers' UNet2DConditionModel."""
    shapes = {key[len(UNET) :]: weights[key].shape for key in weights if key.startswith(UNET)}
    levels: list[list[tuple[int, int]]] = [[]]  # per level the (channels, transformers) of resnets
    for index in range(1, _count(shapes, "input_blocks.")):
        if f"input_blocks.{index}.0.op.weight" in shapes:
            levels.append([])
        else:
            out = shapes[f"input_blocks.{index}.0.out_layers.3.weight"][0]
            depth = _count(shapes, f"input_blocks.{index}.1.transformer_blocks.")
            levels[-1].append((out, depth))
    middle = _count(shapes, "middle_block.1.transformer_blocks.")
    last_depth = levels[-1][-1][1]
    is_uniform = all(len(set(level)) == 1 and len(level) == len(levels[0]) for level in levels)
    up = _count(shapes, "output_blocks.")
    if not is_uniform or up != len(levels) * (len(levels[0]) + 1) or last_depth not in (0, middle):
        raise SetupError(
            "its UNet has uneven blocks (a pruned model such as SSD-1B or Segmind Vega?); allowed"
            " are the block layouts of SD1.x, SD2.x and SDXL"
        )
    channels = [level[0][0] for level in levels]
    depths = [level[0][1] for level in levels]
    transformer = next(key for key in shapes if key.endswith(".attn2.to_k.weight"))
    is_linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    context = shapes[transformer][1]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4,
        "out_channels": shapes["out.2.weight"][0],
        "layers_per_block": len(levels[0]),
        "block_out_channels": channels,
        "down_block_types": [_block("Down", depth) for depth in depths],
        "up_block_types": [_block("Up", depth) for depth in reversed(depths)],
        "transformer_layers_per_block": [depth or 1 for depth in depths[:-1]] + [middle],
        "cross_attention_dim": context,
        "attention_head_dim": [width // 64 for width in channels] if is_linear else 8,
        "use_linear_projection": is_linear,
        "addition_embed_type": None,
    }
    if "label_emb.0.0.weight" in shapes:
        added = shapes["label_emb.0.0.weight"][1]
        if context == 1280:
            raise SetupError("it is the SDXL refiner, which is not served; use the base model")
        if context == 1024:
            raise SetupError("it is SD2.1 unCLIP, which takes pictures as prompts; not served")
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": added,
        }
    elif is_linear:
        config["upcast_attention"] = True  # SD2 overflows in fp16; ComfyUI does the same
    return config


def _block(side: str, depth: int) -> str:
    return f"{'CrossAttn' if depth else ''}{side}Block2D"


def _count(names: Mapping[str, Any], prefix: str) -> int:
    """Numbers that follow `prefix`, which run from 0."""
    found = {m.group(1) for name in names if (m := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    return len(found)


def _vae(weights: Mapping[str, torch.Tensor], native_px: int, family: str) -> dict[str, Any]:
    """The config of diffusers' AutoencoderKL."""
    shapes = {key[len(VAE) :]: weights[key].shape for key in weights if key.startswith(VAE)}
    if "decoder.conv_in.weight" not in shapes or "encoder.conv_in.weight" not in shapes:
        raise SetupError(f"it has no VAE (keys {VAE}*); use a checkpoint that has one")
    levels = _count(shapes, "encoder.down.")
    channels = [shapes[f"encoder.down.{n}.block.0.conv2.weight"][0] for n in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": channels,
        "layers_per_block": _count(shapes, "encoder.down.0.block."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": native_px,
        "scaling_factor": 0.13025 if family == "sdxl" else 0.18215,
        "force_upcast": family == "sdxl",
    }


def _clip(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, Any]:
    """transformers' config of a CLIP text model under transformers' names."""
    inner = prefix + ("text_model." if f"{prefix}text_model.{_TOKENS}" in weights else "")
    return _clip_config(
        weights[_present(weights, f"{inner}{_TOKENS}")].shape,
        weights[_present(weights, f"{inner}embeddings.position_embedding.weight")].shape[0],
        _count(weights, f"{inner}encoder.layers."),
        weights[_present(weights, f"{inner}encoder.layers.0.mlp.fc1.weight")].shape[0],
        "quick_gelu",
        None,
    )


def _open_clip(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, Any]:
    """transformers' config of a CLIP text model under OpenCLIP's names."""
    projection = weights.get(f"{prefix}text_projection")
    return _clip_config(
        weights[_present(weights, f"{prefix}token_embedding.weight")].shape,
        weights[_present(weights, f"{prefix}positional_embedding")].shape[0],
        _count(weights, f"{prefix}transformer.resblocks."),
        weights[_present(weights, f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")].shape[0],
        "gelu",
        None if projection is None else projection.shape[1],
    )


_TOKENS = "embeddings.token_embedding.weight"


def _present(weights: Mapping[str, torch.Tensor], key: str) -> str:
    if key not in weights:
        raise SetupError(f"its text encoder lacks {key}")
    return key


def _clip_config(
    tokens: torch.Size,
    positions: int,
    layers: int,
    intermediate: int,
    activation: str,
    projection: int | None,
) -> dict[str, Any]:
    vocabulary, width = tokens
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": positions,
        "hidden_act": activation,
        "projection_dim": projection or width,
    }


def _prediction(
    weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str], family: str
) -> tuple[bool, bool]:
    """Whether the network predicts v, and whether its noise schedule ends in pure noise."""
    is_zero_snr = "ztsnr" in weights
    if "v_pred" in weights:
        return True, is_zero_snr
    for key in _METADATA_PREDICTION:
        if key in metadata:
            return metadata[key].lower().startswith("v"), is_zero_snr
    if family == "sd2":
        bias = weights.get(f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias")
        if bias is not None and not bias.is_meta:
            return float(bias.float().std(unbiased=False)) > V_PREDICTION_STD, is_zero_snr
    return False, is_zero_snr


def _native_px(metadata: Mapping[str, str]) -> int | None:
    """The training size that a file's metadata names, such as 1024x1024."""
    sides = re.findall(r"\d+", metadata.get("modelspec.resolution", ""))
    if not sides or int(sides[0]) % 64 or not 256 <= int(sides[0]) <= 2048:
        return None
    return int(sides[0])
