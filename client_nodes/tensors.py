"""ComfyUI's IMAGE, MASK, LATENT and CONDITIONING to the server's tensors and back."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch

from .errors import Refused, TritonError

# What a conditioning may say besides its embeddings without changing the picture.
_HARMLESS = {"pooled_output", "start_percent", "end_percent"}
_SIZES = ("width", "target_width", "height", "target_height", "crop_w", "crop_h")


def to_pixels(image: torch.Tensor) -> np.ndarray:
    """IMAGE, float [N, H, W, C] in 0 … 1, to [N, H, W, 3] uint8, to the nearest level."""
    return _to_levels(image[..., :3])


def to_mask(mask: torch.Tensor) -> np.ndarray:
    """MASK, float [H, W] or [N, H, W], 1 = repaint, to [N, H, W] uint8."""
    return _to_levels(mask if mask.ndim == 3 else mask[None])


def _to_levels(values: torch.Tensor) -> np.ndarray:
    return (values.float() * 255.0).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def to_image(pixels: np.ndarray, what: str) -> torch.Tensor:
    """[N, H, W, 3] uint8 to IMAGE; SaveImage writes the same levels again.

    Raises:
        TritonError: it holds no picture.
    """
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.size == 0 or pixels.dtype != np.uint8:
        raise TritonError(
            f"{what} answered pixels of shape {list(pixels.shape)}, which is no picture"
        )
    return torch.from_numpy(np.array(pixels)).to(torch.float32).div_(255.0)


def from_files(texts: Any, what: str) -> np.ndarray:
    """Base64 picture files, one text or a list of them, to [N, H, W, 3] uint8."""
    from PIL import Image

    pictures = []
    for text in [texts] if isinstance(texts, str) else texts or []:
        with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    if not pictures:
        raise TritonError(f"{what} answered without a picture")
    return np.stack(pictures)


def to_file(pixels: np.ndarray) -> str:
    """[H, W] or [H, W, 3] uint8 to a base64 PNG, for streams, which carry text only."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def crop_to_multiple(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """Centre crop of [N, H, W, C] to multiples of so many pixels, as ComfyUI's VAE Encode does."""
    height, width = (side // multiple * multiple for side in image.shape[1:3])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


def from_latent(latent: dict[str, Any]) -> dict[str, np.ndarray]:
    """LATENT to the inputs `latents` [N, 4, h, w] and, with a mask, `noise_mask` [N, h, w], fp32.

    Raises:
        Refused: it asks for what the server has no way to do.
    """
    samples = latent["samples"]
    if samples.ndim != 4:
        raise Refused(f"the latent has shape {list(samples.shape)}; the server takes [N, 4, h, w]")
    indices = latent.get("batch_index")
    if indices is not None and list(indices) != list(range(len(samples))):
        raise Refused(
            "the latent is part of a batch, whose noise depends on its place there, and the server"
            " starts at the first place: sample the whole batch, or use Triton Remote UNet"
        )
    inputs = {"latents": samples.float().cpu().numpy()}
    if latent.get("noise_mask") is not None:
        mask = latent["noise_mask"].float()
        mask = mask.reshape(-1, 1, *mask.shape[-2:])
        mask = torch.nn.functional.interpolate(mask, samples.shape[2:], mode="bilinear")
        inputs["noise_mask"] = mask[:, 0].cpu().numpy()
    return inputs


def from_conditioning(
    conditioning: list, name: str, height_px: int, width_px: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """CONDITIONING to embeddings [1, 77n, C] and the pooled ones [1, P], fp32.

    Args:
        name: of the input, for messages.
        height_px, width_px: of the picture; a conditioning may say the same size, no other one.
    Raises:
        Refused: it asks for what the server has no way to do, such as areas or ControlNets.
    """
    otherwise = "use Triton Remote UNet with ComfyUI's own KSampler for that"
    if len(conditioning) != 1:
        raise Refused(
            f"{name} combines {len(conditioning)} conditionings, the server takes one; {otherwise}"
        )
    embeds, extras = conditioning[0]
    said = {key: value for key, value in extras.items() if value is not None}
    sizes = dict.fromkeys(_SIZES[:2], width_px) | dict.fromkeys(_SIZES[2:4], height_px)
    sizes |= dict.fromkeys(_SIZES[4:], 0)
    for key, value in said.items():
        if key in sizes and value != sizes[key]:
            raise Refused(
                f"{name} says {key}={value}, the server conditions on {sizes[key]}; {otherwise}"
            )
        is_whole = {"start_percent": 0.0, "end_percent": 1.0}.get(key, value) == value
        if (key not in _HARMLESS and key not in sizes) or (key != "pooled_output" and not is_whole):
            raise Refused(f"{name} carries {key!r}, which the server does not know; {otherwise}")
    pooled = said.get("pooled_output")
    return _rows(embeds), None if pooled is None else _rows(pooled)


def _rows(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def to_latent(latents: np.ndarray) -> dict[str, torch.Tensor]:
    """[N, 4, h, w] fp32 to LATENT."""
    return {"samples": torch.from_numpy(np.array(latents, dtype=np.float32))}


def to_rows(array: np.ndarray) -> torch.Tensor:
    """Embeddings to a tensor of their own."""
    return torch.from_numpy(np.array(array, dtype=np.float32))
