"""A single-file checkpoint becomes a folder in diffusers' layout, without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fullpipe.checkpoints import architecture
from fullpipe.checkpoints.architecture import Architecture
from fullpipe.checkpoints.weights import read_weights, write_weights
from fullpipe.errors import SetupError
from fullpipe.source_files import source_root

Weights = dict[str, torch.Tensor]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def convert_single_file(path: Path, folder: Path, wrote: Callable[[int, int], None]) -> str:
    """Write everything of a single file that a pipeline needs as a diffusers folder.

    Weights keep their precision. The vocabulary is CLIP's own, which every checkpoint shares.

    Args:
        path: a *.safetensors file of SD1.x, SD2.x or SDXL.
        folder: to be made.
        wrote: is told bytes written and bytes in all, as they grow.
    Returns:
        what the file was recognised as, for a line to the user.
    Raises:
        SetupError: the file is broken or nothing that can be served; the message names it.
    """
    weights, metadata = read_weights(path)
    try:
        found = architecture.detect(weights, metadata)
        parts = convert(found, weights)
    except SetupError as error:
        raise SetupError(f"{path} cannot be served: {error}") from None
    total = sum(t.numel() * t.element_size() for part in parts.values() for t in part.values())
    free = shutil.disk_usage(folder.parent).free
    if free < total:
        raise SetupError(
            f"{folder.parent} has {free / 2**30:.1f} GiB free, {path.name} needs"
            f" {total / 2**30:.1f} GiB"
        )
    done = 0

    def advanced(count: int) -> None:
        nonlocal done
        done += count
        wrote(done, total)

    for name, part in parts.items():
        (folder / name).mkdir(parents=True)
        is_clip = name.startswith("text_encoder")
        _write_json(folder / name / "config.json", getattr(found, name))
        file = "model" if is_clip else "diffusion_pytorch_model"
        write_weights(folder / name / f"{file}.safetensors", part, advanced)
    tokenizer = source_root() / "demo" / "checkpoint" / "tokenizer"
    shutil.copytree(tokenizer, folder / "tokenizer")
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", found.scheduler)
    is_sdxl = found.family == "sdxl"
    _write_json(
        folder / "model_index.json",
        {"_class_name": f"StableDiffusion{'XL' if is_sdxl else ''}Pipeline"},
    )
    kind = {"sd1": "SD1.x", "sd2": "SD2.x", "sdxl": "SDXL"}[found.family]
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in parts["unet"].values()})
    return f"{kind}, {found.scheduler['prediction_type']}, {' and '.join(dtypes)}"


def convert(found: Architecture, weights: Mapping[str, torch.Tensor]) -> dict[str, Weights]:
    """Rename a single file's weights as diffusers and transformers name them.

    Args:
        found: what `detect` made of the weights.
        weights: of the single file, on any device.
    Returns:
        name of the folder to weights: unet, vae, text_encoder and, for SDXL, text_encoder_2.
    Raises:
        SetupError: weights are missing or have another shape than the architecture.
    """
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
    )
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    def only(prefix: str) -> Weights:
        return {key: weights[key] for key in weights if key.startswith(prefix)}

    for key, tensor in weights.items():
        if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
            name = str(tensor.dtype).removeprefix("torch.")
            raise SetupError(f"its {key} is {name}, allowed are fp32, fp16 and bf16")
    with _naming_what_is_missing():
        parts = {
            "unet": convert_ldm_unet_checkpoint(only(architecture.UNET), found.unet),
            "vae": convert_ldm_vae_checkpoint(only(architecture.VAE), found.vae),
        }
        _check(parts["unet"], UNet2DConditionModel, found.unet, "UNet")
        _check(parts["vae"], AutoencoderKL, found.vae, "VAE")
        configs = (found.text_encoder, found.text_encoder_2)
        names = ("text_encoder", "text_encoder_2")
        for name, config, prefix in zip(names, configs, found.text_prefixes, strict=False):
            assert config is not None
            is_open = config["hidden_act"] == "gelu"
            encoder = only(prefix)
            parts[name] = _open_clip(encoder, prefix, config) if is_open else _clip(encoder, prefix)
    return parts


class _naming_what_is_missing:
    """diffusers' conversion looks weights up by name and raises KeyError for a missing one."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyError):
            raise SetupError(f"it lacks the weight {error.args[0]}") from None


def _check(part: Weights, network: Any, config: dict[str, Any], what: str) -> None:
    """Compare names and shapes with the network that the config describes."""
    with torch.device("meta"):
        wanted = network.from_config(config).state_dict()
    for key in [key for key in part if key not in wanted]:
        part.pop(key)  # such as the guidance embedding of some LCMs, which ComfyUI ignores too
    missing = sorted(wanted.keys() - part.keys())
    if missing:
        raise SetupError(f"its {what} lacks {len(missing)} weights, first {missing[0]}")
    for key, tensor in part.items():
        if tensor.shape != wanted[key].shape:
            raise SetupError(
                f"its {what} has {key} of shape {list(tensor.shape)}, needed"
                f" {list(wanted[key].shape)}"
            )


def _clip(weights: Weights, prefix: str) -> Weights:
    """CLIP-L, already under transformers' names but for the prefix (older files lack a part)."""
    renamed = {}
    for key, value in weights.items():
        name = key.removeprefix(prefix)
        name = (
            name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
        )
        if not name.endswith(("position_ids", "logit_scale")):
            renamed[name] = value
    return renamed


def _open_clip(weights: Weights, prefix: str, config: dict[str, Any]) -> Weights:
    """OpenCLIP's packed names taken apart.

    diffusers drops SD2's last layer by its full name; ComfyUI can use it (clip skip -1), so it
    must not have that name.
    """
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    own = {f"open_clip.{key.removeprefix(prefix)}": value for key, value in weights.items()}
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    return convert_open_clip_checkpoint(model, own, prefix="open_clip.")


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
