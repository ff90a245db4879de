"""What `fullpipe assemble` builds for an engine, into the folders of the models that load it."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from fullpipe.config import PipelineConfig
from fullpipe.engines.artifact import Artifact
from fullpipe.engines.loading import engine_key, naming_memory, torch_dtype
from fullpipe.errors import SetupError
from fullpipe.stages import needs_range

Report = Callable[[str], None]


def build_unet(folder: Path, config: PipelineConfig, rebuild: str, report: Report) -> None:
    """Build what `load_unet` will load, and leave `engine.json` beside it; torch needs nothing.

    Args:
        folder: a diffusers `unet` folder, writable; its weights stay as they are.
        config: of the pipeline; `loop` says engine, precision, sizes, buckets and device.
        rebuild: the command that does this again, for messages.
        report: gets a line per step.
    Raises:
        SetupError: the engine's libraries are missing, or the build failed.
    """
    if config.loop.engine == "torch":
        return
    before = set(folder.rglob("*"))
    with naming_memory(folder, config.loop.device):
        if config.loop.engine == "compiled":
            from fullpipe.engines import compiled_engine

            compiled_engine.build(folder, config.loop, report)
        else:
            from fullpipe.engines.onnx_export import export_unet

            dtype = torch_dtype(config.loop.precision)
            _build(folder, "unet", config, report, lambda path: export_unet(folder, path, dtype))
    _record(folder, before, config, rebuild)


def build_stages(models: Path, config: PipelineConfig, rebuild: str, report: Report) -> None:
    """Build the VAE and the text encoders for engines that run them; arguments as `build_unet`.

    Args:
        models: the folder of the pipeline's models.
    """
    if config.loop.engine == "compiled":
        from fullpipe.engines.compiled_vae import build_decoder

        folder = models / config.models.vae_decoder / "1" / "vae"
        before = set(folder.rglob("*"))
        with naming_memory(folder, config.loop.device):
            build_decoder(folder, config, torch_dtype(config.loop.precision), report)
        _record(folder, before, config, rebuild)
    if config.loop.engine not in ("onnx", "tensorrt"):
        return
    from fullpipe.engines import onnx_export
    from fullpipe.text.clip import load_clip

    names = config.models
    vae = models / names.vae_decoder / "1" / "vae"
    dtype = vae_dtype(vae, config)
    before = set(vae.rglob("*"))
    _build(
        vae, "vae_decoder", config, report, lambda p: onnx_export.export_vae_decoder(vae, p, dtype)
    )
    _record(vae, before, config, rebuild)
    other = models / names.vae_encoder / "1" / "vae"
    before = set(other.rglob("*"))
    _build(
        other,
        "vae_encoder",
        config,
        report,
        lambda p: onnx_export.export_vae_encoder(vae, p, dtype),
    )
    _record(other, before, config, rebuild)
    for name in ("text_encoder", "text_encoder_2"):
        folder = models / names.text_encoder / "1" / name
        if not folder.is_dir():
            continue
        model = load_clip(
            folder,
            has_projection=False,
            device="cpu",
            dtype=torch.float32,
            weights_dtype=torch.float16,  # as `PromptEncoder` does, and ComfyUI
        )
        before = set(folder.rglob("*"))
        _build(folder, "clip", config, report, functools.partial(onnx_export.export_clip, model))
        _record(folder, before, config, rebuild)


def vae_dtype(folder: Path, config: PipelineConfig) -> torch.dtype:
    """The arithmetic of the VAE: SDXL's overflows in fp16."""
    dtype = torch_dtype(config.loop.precision)
    if dtype != torch.float16 or not needs_range(folder):
        return dtype
    return torch.float32 if config.loop.engine == "onnx" else torch.bfloat16


def _build(
    folder: Path,
    name: str,
    config: PipelineConfig,
    report: Report,
    export: Callable[[Path], None],
) -> None:
    """Export, and for TensorRT build a plan of that; leaves `name`.onnx or `name`.plan."""
    report(f"exporting {name} to ONNX")
    if config.loop.engine == "onnx":
        export(folder / f"{name}.onnx")
        return
    from fullpipe.engines.tensorrt_build import build_plan

    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx-") as work:
        path = Path(work) / f"{name}.onnx"
        export(path)
        report(f"building {name} with TensorRT")
        build_plan(path, folder / f"{name}.plan", name, config)


def _record(folder: Path, before: set[Path], config: PipelineConfig, rebuild: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and path not in before]
    if not files:
        raise SetupError(f"the {config.loop.engine} engine left nothing in {folder}")
    Artifact.of(engine_key(config), folder, files, rebuild).save(folder)
