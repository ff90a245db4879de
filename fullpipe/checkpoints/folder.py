"""A checkpoint folder in diffusers' layout: which of its files count, and what they say."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fullpipe.checkpoints.weights import read_weights
from fullpipe.config import Checkpoint, Defaults
from fullpipe.errors import SetupError
from fullpipe.stages import VaeEncoder

LAYOUT = "needed is a folder in diffusers' layout or a single .safetensors file"
_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


def read_checkpoint(folder: Path, read: Callable[[int, int], None]) -> Checkpoint:
    """Everything the loop must know of a diffusers folder, from its own files.

    Args:
        folder: in diffusers' layout.
        read: is told bytes read and bytes in all while the digest is made.
    Raises:
        SetupError: it is no diffusers folder, or a part is missing, damaged or not served.
    """
    index = read_json(folder / "model_index.json")
    unet = read_json(folder / "unet" / "config.json")
    vae = read_json(folder / "vae" / "config.json")
    is_sdxl = "XL" in index.get("_class_name", "") or unet.get("addition_embed_type") == "text_time"
    parts = [name for name in _STEMS if name != "text_encoder_2" or is_sdxl]
    files = [file for part in parts for file, _ in weight_files(folder / part)]
    for file in files:
        if file.suffix == ".safetensors":
            read_weights(file)  # a truncated file fails here, in one line
    try:
        channels = int(vae["latent_channels"])
        if int(unet["in_channels"]) != channels:
            raise SetupError(
                f"{folder / 'unet' / 'config.json'}: in_channels={unet['in_channels']}, allowed"
                f" {channels}; inpainting and edit checkpoints are not served"
            )
        pooled_dim = 0
        if is_sdxl:  # the rest of the UNet's added conditions are six embedded sizes
            added = int(unet["projection_class_embeddings_input_dim"])
            pooled_dim = added - 6 * int(unet["addition_time_embed_dim"])
        scaling_factor = float(vae["scaling_factor"])
        return Checkpoint(
            digest=_digest(sorted(files), read),
            scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
            latent_channels=channels,
            vae_scale_factor=_vae_scale(vae),
            scaling_factor=scaling_factor,
            latent_rgb=fit_latent_rgb(folder / "vae", scaling_factor),
            embed_dim=int(unet["cross_attention_dim"]),
            pooled_dim=pooled_dim,
            is_sdxl=is_sdxl,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SetupError(
            f"{folder} has a config.json without what Stable Diffusion needs ({error!r})"
        ) from error


def read_defaults(folder: Path) -> Defaults:
    """What a request gets that does not say otherwise, as far as a checkpoint says it.

    The size is the native one. A checkpoint whose scheduler is LCM's was distilled to few steps
    without guidance; other few-step children cannot be told from their parents.
    """
    unet = read_json(folder / "unet" / "config.json")
    vae = read_json(folder / "vae" / "config.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    try:
        native = int(unet["sample_size"]) * _vae_scale(vae)
    except (KeyError, TypeError, ValueError) as error:
        raise SetupError(
            f"{folder / 'unet' / 'config.json'} has no sample_size ({error!r})"
        ) from None
    if scheduler.get("_class_name") == "LCMScheduler":
        return Defaults(native, native, 4, 1.0, "lcm", "sgm_uniform")
    return Defaults(native, native)


def weight_files(part: Path) -> list[tuple[Path, str]]:
    """The weights of one part and the names that they are loaded by.

    A folder may hold the same weights in several precisions and formats; the plain safetensors
    count, then a variant such as fp16. Both may be in shards with an index.

    Raises:
        SetupError: there are none.
    """
    stem = _STEMS[part.name]
    plain = part / f"{stem}.safetensors"
    if plain.is_file():
        return [(plain, plain.name)]
    for index in sorted(part.glob(f"{stem}.safetensors.index*.json")):
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (part / shard).is_file()]
        if missing:
            raise SetupError(f"{part / missing[0]} is missing; {index.name} beside it names it")
        listed = [(part / shard, shard) for shard in shards]
        return [*listed, (index, f"{stem}.safetensors.index.json")]
    for variant in sorted(part.glob(f"{stem}.*.safetensors")):
        return [(variant, plain.name)]
    others = [path.name for path in part.glob("*") if path.suffix in (".bin", ".ckpt", ".pt")]
    has = f" (it has {others[0]}, which can run code when it is read)" if others else ""
    raise SetupError(f"{part} holds no {stem}.safetensors{has}; {LAYOUT}")


def link_part(checkpoint: Path, name: str, target: Path) -> None:
    """Put one part of a checkpoint into a model's folder, weights by hard links where possible."""
    source = checkpoint / name
    if name not in _STEMS:
        shutil.copytree(source, target, copy_function=_link)
        return
    target.mkdir()
    shutil.copyfile(source / "config.json", target / "config.json")
    for file, called in weight_files(source):
        _link(file, target / called)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(Path(source).resolve(), target)  # download caches hold links to blobs
    except OSError:
        shutil.copy2(source, target)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint; raises SetupError naming the file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(f"{path} cannot be read ({error}); {LAYOUT}") from None
    if not isinstance(document, dict):
        raise SetupError(f"{path} holds no JSON object; {LAYOUT}")
    return document


def _vae_scale(vae: dict[str, Any]) -> int:
    return 2 ** (len(vae["block_out_channels"]) - 1)


def fit_latent_rgb(vae: Path, scaling_factor: float) -> list[list[float]]:
    """Fit the map from latents to colour by which previews are drawn.

    Random pictures, smooth and of flat patches, are encoded, and colour is fitted to the latents by
    least squares.

    Returns:
        [latent channels + 1][3], the last row is the offset; colours in -1 … 1.
    """
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.rand(8, 3, 8, 8, generator=generator), size=(128, 128), mode="bilinear"
    )
    patches = torch.rand(24, 3, 2, 2, generator=generator) * 1.6 - 0.3
    flat = torch.nn.functional.interpolate(patches.clamp(0, 1), size=(128, 128))
    pictures = torch.cat([smooth, flat])
    pixels = (pictures * 255).to(torch.uint8).permute(0, 2, 3, 1)
    latents = VaeEncoder(vae).encode(pixels) * scaling_factor
    colours = torch.nn.functional.interpolate(pictures, size=latents.shape[2:], mode="area") * 2 - 1
    known = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).double().numpy()
    wanted = colours.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
    known = np.concatenate([known, np.ones((len(known), 1))], axis=1)
    solution, *_ = np.linalg.lstsq(known, wanted, rcond=None)
    return [[round(float(value), 6) for value in row] for row in solution]


def _digest(weights: Sequence[Path], read: Callable[[int, int], None]) -> str:
    total = sum(path.stat().st_size for path in weights)
    done = 0
    digest = hashlib.sha256()
    for path in weights:
        digest.update(f"{path.parent.name}/{path.name}".encode())
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 22), b""):
                digest.update(block)
                done += len(block)
                read(done, total)
    return digest.hexdigest()[:16]
