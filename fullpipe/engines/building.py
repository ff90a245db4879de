"""What `fullpipe assemble` builds for an engine, into the folders of the models that load it."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fullpipe.config import PipelineConfig
from fullpipe.engines.artifact import Artifact
from fullpipe.engines.loading import engine_key, naming_memory, torch_dtype
from fullpipe.errors import SetupError
from fullpipe.stages import needs_range

Report = Callable[[str], None]


def build_engine(models: Path, config: PipelineConfig, rebuild: str, report: Report) -> None:
    """Build what a pipeline's models will load, and leave `engine.json` beside each network.

    `torch` needs nothing.

    Args:
        models: the folder of the pipeline's models, which have their weights; these stay as they
            are.
        config: of the pipeline; `loop` says engine, precision, sizes, buckets and device.
        rebuild: the command that does this again, for messages.
        report: gets a line per step.
    Raises:
        SetupError: the engine's libraries are missing, or the build failed.
    """
    if config.loop.engine == "torch":
        return
    names = config.models
    unet_model = names.scheduler_model if config.loop.unet == "loop" else names.unet
    unet = models / unet_model / "1" / "unet"
    decoder = models / names.vae_decoder / "1" / "vae"
    if config.loop.engine == "compiled":
        with _recorded(unet, config, rebuild), _recorded(decoder, config, rebuild):
            _compile(unet, decoder, config, report)
        return
    from fullpipe.engines import onnx_export

    dtype = torch_dtype(config.loop.precision)
    exports = [(unet, "unet", lambda path: onnx_export.export_unet(unet, path, dtype))]
    encoder, of_vae = models / names.vae_encoder / "1" / "vae", vae_dtype(decoder, config)
    exports += [
        (decoder, "vae_decoder", lambda p: onnx_export.export_vae_decoder(decoder, p, of_vae)),
        (encoder, "vae_encoder", lambda p: onnx_export.export_vae_encoder(encoder, p, of_vae)),
    ]
    for name in ("text_encoder", "text_encoder_2"):
        folder = models / names.text_encoder / "1" / name
        if folder.is_dir():
            exports.append((folder, "clip", functools.partial(onnx_export.export_clip, folder)))
    for folder, name, export in exports:
        with _recorded(folder, config, rebuild), naming_memory(folder, config.loop.device):
            _build(folder, name, config, report, export)


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


def _compile(unet: Path, decoder: Path, config: PipelineConfig, report: Report) -> None:
    from fullpipe.engines.compiled_engine import unet_packages
    from fullpipe.engines.compiled_vae import decoder_packages
    from fullpipe.engines.packages import make_packages

    with naming_memory(unet, "cpu"):
        wanted = unet_packages(unet, config.loop)
    wanted += decoder_packages(decoder, config, torch_dtype(config.loop.precision))
    make_packages(wanted, report)


@contextlib.contextmanager
def _recorded(folder: Path, config: PipelineConfig, rebuild: str) -> Iterator[None]:
    """Leave a record of what was built into a folder meanwhile."""
    before = set(folder.rglob("*"))
    yield
    files = [path for path in folder.rglob("*") if path.is_file() and path not in before]
    if not files:
        raise SetupError(f"the {config.loop.engine} engine left nothing in {folder}")
    Artifact.of(engine_key(config), folder, files, rebuild).save(folder)
