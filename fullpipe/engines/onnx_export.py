"""Networks as ONNX files: for ONNX Runtime, and as what TensorRT is built from.

Every file has the tensors of the Triton model that it can stand in for (fp32, int64 or uint8 at the
door, whatever the arithmetic inside), with rows, height, width and tokens left open.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from fullpipe.engines import TOKENS
from fullpipe.errors import SetupError
from fullpipe.stages import PixelDecoder
from fullpipe.text.clip import ClipTextModel, load_clip

OPSET = 18

# Sides of the example latent. They are odd so that the UNet is traced in the form that scales up
# to the size of its skip connections; multiples of its stride would be traced as times two, which
# is wrong for every other size.
_LATENT_SIDES = (25, 19)


class _UNet(torch.nn.Module):
    """A diffusers UNet with the bindings of `fullpipe.engines.Engine`."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(
        self, sample, timestep, encoder_hidden_states, text_embeds=None, time_ids=None
    ) -> torch.Tensor:
        dtype = self.unet.dtype
        added = None
        if text_embeds is not None:
            added = {"text_embeds": text_embeds.to(dtype), "time_ids": time_ids.to(dtype)}
        (noise_pred,) = self.unet(
            sample.to(dtype),
            timestep,
            encoder_hidden_states=encoder_hidden_states.to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )
        return noise_pred.float()


class _VaeEncoder(torch.nn.Module):
    """images [N, H, W, 3] uint8 → latents [N, 4, h, w] fp32, as `fullpipe.stages.VaeEncoder`."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.encoder, self.quant_conv, self.dtype = vae.encoder, vae.quant_conv, vae.dtype
        self.channels = vae.config["latent_channels"]

    def forward(self, images) -> torch.Tensor:
        # TensorRT takes uint8 at the door and converts it, and does nothing else with it.
        pixels = images.float().permute(0, 3, 1, 2) / 255.0 * 2.0 - 1.0
        moments = self.encoder(pixels.to(self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return moments[:, : self.channels].float()


class _Clip(torch.nn.Module):
    """inputs_embeds [B, 77, C] → last_hidden_state [B, 77, C] after the final norm, and
    hidden_states [L, B, 77, C], every layer's output before it."""

    def __init__(self, model: ClipTextModel):
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds) -> tuple[torch.Tensor, torch.Tensor]:
        x = inputs_embeds + self.model.embeddings.position_embedding.weight
        hidden_states = []
        for layer in self.model.encoder.layers:
            x = layer(x)
            hidden_states.append(x)
        return self.model.final_layer_norm(x), torch.stack(hidden_states)


def export_unet(folder: Path, path: Path, dtype: torch.dtype) -> None:
    """Write a diffusers `unet` folder as ONNX: bindings of `fullpipe.engines.Engine`.

    Args:
        folder: config.json and weights.
        path: of the new file; weights go beside it, under its name and `.data`.
        dtype: of weights and arithmetic.
    Raises:
        SetupError: the folder is broken, or the packages of the extra `onnx` are missing.
    """
    unet = _load(UNet2DConditionModel, folder, dtype)
    config = unet.config
    inputs = {
        "sample": torch.randn(2, config["in_channels"], *_LATENT_SIDES),
        "timestep": torch.tensor([10, 500]),
        "encoder_hidden_states": torch.randn(2, TOKENS, config["cross_attention_dim"]),
    }
    open_dims = {
        "sample": {0: "rows", 2: "height", 3: "width"},
        "timestep": {0: "rows"},
        "encoder_hidden_states": {0: "rows", 1: "tokens"},
    }
    if config.get("addition_embed_type") == "text_time":
        added = config["projection_class_embeddings_input_dim"]
        pooled = added - 6 * config["addition_time_embed_dim"]
        inputs |= {"text_embeds": torch.randn(2, pooled), "time_ids": torch.full((2, 6), 64.0)}
        open_dims |= {"text_embeds": {0: "rows"}, "time_ids": {0: "rows"}}
    outputs = {"noise_pred": open_dims["sample"]}
    _export(_UNet(unet), inputs, open_dims, outputs, path)


def export_vae_decoder(folder: Path, path: Path, dtype: torch.dtype) -> None:
    """Write the decoder of a diffusers `vae` folder as ONNX: latents → images."""
    vae = _load(AutoencoderKL, folder, dtype)
    inputs = {"latents": torch.randn(2, vae.config["latent_channels"], 9, 7)}
    open_dims = {"latents": {0: "rows", 2: "height", 3: "width"}}
    outputs = {"images": {0: "rows", 1: "image_height", 2: "image_width"}}
    _export(PixelDecoder(vae), inputs, open_dims, outputs, path)


def export_vae_encoder(folder: Path, path: Path, dtype: torch.dtype) -> None:
    """Write the encoder of a diffusers `vae` folder as ONNX: images → latents."""
    vae = _load(AutoencoderKL, folder, dtype)
    scale = 2 ** (len(vae.config["block_out_channels"]) - 1)
    inputs = {"images": torch.randint(0, 256, (2, 9 * scale, 7 * scale, 3), dtype=torch.uint8)}
    open_dims = {"images": {0: "rows", 1: "image_height", 2: "image_width"}}
    outputs = {"latents": {0: "rows", 2: "height", 3: "width"}}
    _export(_VaeEncoder(vae), inputs, open_dims, outputs, path)


def export_clip(folder: Path, path: Path) -> None:
    """Write a `text_encoder` folder as ONNX: inputs_embeds → last_hidden_state, hidden_states.

    In fp32 and loaded on the CPU: on a GPU such layers are split into halves, in memory that a
    trace loses.

    Raises:
        SetupError: a file is missing or broken.
    """
    model = load_clip(
        folder,
        has_projection=False,
        device="cpu",
        dtype=torch.float32,
        weights_dtype=torch.float16,  # as `PromptEncoder` does, and ComfyUI
    )
    config = model.config
    shape = (2, config.max_position_embeddings, config.hidden_size)
    outputs = {"last_hidden_state": {0: "rows"}, "hidden_states": {1: "rows"}}
    inputs = {"inputs_embeds": torch.randn(shape)}
    _export(_Clip(model), inputs, {"inputs_embeds": {0: "rows"}}, outputs, path)


def _load(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    try:
        return kind.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        ).eval()
    except (OSError, ValueError, KeyError) as error:
        raise SetupError(f"{folder} holds no readable {kind.__name__} ({error})") from error


def _export(
    network: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    open_dims: Mapping[str, Mapping[int, str]],
    outputs: Mapping[str, Mapping[int, str]],
    path: Path,
) -> None:
    """Trace and write; weights go into one file beside, whatever their size.

    By tracing (`dynamo=False`), which takes seconds: torch's newer exporter reasons about every
    size with symbols and takes minutes for a UNet whose four sizes are open.
    """
    try:
        import onnx
    except ImportError as error:
        raise SetupError("an ONNX export needs onnx: pip install 'fullpipe[onnx]'") from error
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as work:
        traced = Path(work) / path.name
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # every branch on a size, all of them meant
            torch.onnx.export(
                network.eval(),
                tuple(inputs.values()),
                str(traced),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes={n: dict(dims) for n, dims in {**open_dims, **outputs}.items()},
                opset_version=OPSET,
                dynamo=False,
            )
        model = onnx.load(traced)
        onnx.save_model(
            model,
            path,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=f"{path.name}.data",
        )
