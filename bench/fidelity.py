"""How far an engine's networks are from the same weights in fp32, as ‖out − ref‖ / ‖ref‖.

Inputs are random and fresh, and memory is filled with NaN before each call, so that an output that
nothing wrote shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from fullpipe.config import PipelineConfig, StageConfig
from fullpipe.engines import TOKENS, UNET_INPUTS, Engine
from fullpipe.engines.loading import load_vae_decoder, torch_dtype
from fullpipe.engines.torch_engine import TorchUNet
from fullpipe.stages import VaeDecoder
from fullpipe.text import PromptEncoder

PROMPTS = ("a red circle on a white background", "")


def relative_errors(repository: Path, unet: Engine, config: PipelineConfig) -> dict[str, float]:
    """UNet (per number of rows), VAE decoder and text encoders of an assembled repository.

    Args:
        repository: with `config.loop.unet` "loop".
        unet: its engine, loaded.
        config: of the pipeline.
    """
    device = config.loop.devices[0]
    models = config.models
    height, width = _latent_size(config)
    with _exact():
        errors = {}
        reference = TorchUNet(repository / models.scheduler_model / "1" / "unet", device=device)
        for rows in unet.row_counts(height, width, TOKENS) or (2,):
            inputs = unet_inputs(config, rows, device)
            wanted = torch.cat([reference.run(pair)["noise_pred"] for pair in _pairs(inputs)])
            _poison(device)
            errors[f"unet, {rows} rows"] = _error(unet.run(inputs)["noise_pred"], wanted)
        del reference

        folder = repository / models.vae_decoder / "1" / "vae"
        latents = torch.randn(1, config.checkpoint.latent_channels, height, width)
        exact = VaeDecoder(folder, device=device, dtype=torch.float32)
        decoder = load_vae_decoder(folder, config, device)
        wanted = exact.decode(latents)
        _poison(device)
        errors["vae_decoder, in 8 bits"] = _error(decoder.decode(latents), wanted)
        del exact, decoder

        folder = repository / models.text_encoder / "1"
        served = torch_dtype(StageConfig.load(folder / "stage.json").precision)
        coders = [
            PromptEncoder.from_folder(folder, device=device, dtype=served),
            PromptEncoder.from_folder(folder, device="cpu", dtype=torch.float32),
        ]
        got, wanted = (coder.encode(*PROMPTS, None) for coder in coders)
        for name in got:
            if wanted[name].numel():
                errors[name] = _error(got[name], wanted[name])
    return errors


def unet_inputs(config: PipelineConfig, rows: int, device: str) -> dict[str, torch.Tensor]:
    """Random inputs of the bindings of `Engine` at the native size, fp32, on `device`."""
    facts = config.checkpoint
    size = _latent_size(config)
    tensors = {
        "sample": torch.randn(rows, facts.latent_channels, *size),
        "timestep": torch.randint(0, 1000, (rows,)),
        "encoder_hidden_states": torch.randn(rows, TOKENS, facts.embed_dim),
    }
    if facts.is_sdxl:
        tensors["text_embeds"] = torch.randn(rows, facts.pooled_dim)
        tensors["time_ids"] = torch.full((rows, 6), float(config.defaults.width))
    return {name: tensors[name].to(device) for name in UNET_INPUTS if name in tensors}


def _pairs(inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """A call's rows two at a time: of 8 of SDXL's, cuDNN 9.19 gets a convolution wrong in fp32."""
    for pair in zip(*(tensor.split(2) for tensor in inputs.values()), strict=True):
        yield dict(zip(inputs, pair, strict=True))


def _latent_size(config: PipelineConfig) -> tuple[int, int]:
    scale = config.checkpoint.vae_scale_factor
    return config.defaults.height // scale, config.defaults.width // scale


def _error(out: torch.Tensor, reference: torch.Tensor) -> float:
    out, reference = out.double().cpu(), reference.double().cpu()
    return float(f"{((out - reference).norm() / reference.norm()).item():.3g}")


def _poison(device: str) -> None:
    """Leave NaN in the memory that the next call will be given."""
    if torch.device(device).type == "cuda":
        torch.full((2**28,), torch.nan, device=device)


class _exact:
    """fp32 without TF32, which a GPU may otherwise take."""

    def __enter__(self) -> None:
        self._before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = self._before
