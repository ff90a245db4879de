"""`fullpipe assemble`: a checkpoint becomes a complete Triton model repository, or nothing does.

The templates in `scheduler_model/`, `ensemble/` and `model_repository/` carry Triton's facts; the
contract supplies inputs and outputs; the checkpoint supplies everything else. Configurations go
through Triton's own protobuf schema, so a typing error fails here and not at load.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from fullpipe import __version__, contract
from fullpipe.config import (
    Checkpoint,
    Defaults,
    Limits,
    LoopSettings,
    ModelNames,
    PipelineConfig,
    StageConfig,
)
from fullpipe.engines.loading import build_unet
from fullpipe.errors import SetupError
from fullpipe.samplers import SAMPLERS
from fullpipe.schedulers import SCHEDULERS
from fullpipe.source_files import source_root
from fullpipe.stages import VaeEncoder

PLAIN_NAME = "full_pipeline"
PARAMETER = "fullpipe_pipeline"
_STAGE_FOLDERS = {
    "text_encoder": ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "embeddings"),
    "unet": ("unet",),
    "vae_decoder": ("vae",),
    "vae_encoder": ("vae",),
    "image_encoder": (),
}


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the operator decides; everything else is read from the checkpoint."""

    name: str = PLAIN_NAME
    limits: Limits = dataclasses.field(default_factory=Limits)
    loop: LoopSettings = dataclasses.field(default_factory=LoopSettings)
    stage_threads: int = 0


def assemble(
    checkpoint: Path,
    out: Path,
    choices: Choices | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> PipelineConfig:
    """Write pipeline `choices.name` into the repository `out`, beside pipelines already there.

    Args:
        checkpoint: a diffusers folder.
        out: the repository; made if missing. Models of the same name are replaced.
        report: gets a line per model, for progress.
    Raises:
        SetupError: the checkpoint is incomplete or `out` cannot be written; `out` is unchanged.
    """
    choices = choices or Choices()
    names = model_names(choices.name)
    defaults = _defaults(checkpoint)
    loop = choices.loop
    if loop.engine in ("compiled", "tensorrt"):
        loop = dataclasses.replace(
            loop,
            sizes=loop.sizes or [[defaults.width, defaults.height]],
            buckets=loop.buckets or _buckets(loop.max_rows),
        )
    limits = choices.limits
    if loop.engine == "compiled":
        limits = dataclasses.replace(limits, sizes=loop.sizes)
    if loop.sizes:
        largest = max(limits.max_size_px, *(side for size in loop.sizes for side in size))
        limits = dataclasses.replace(limits, max_size_px=largest)
    config = PipelineConfig(
        name=choices.name,
        checkpoint=read_checkpoint(checkpoint),
        defaults=defaults,
        limits=limits,
        loop=loop,
        models=ModelNames(
            **{field.name: names[field.name] for field in dataclasses.fields(ModelNames)}
        ),
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".assemble-") as building:
            folder = Path(building)
            _write_loop(folder, checkpoint, config, names)
            _write_stages(folder, checkpoint, config, names, choices.stage_threads)
            _write_ensemble(folder, config, names)
            _write_stream(folder, names)
            part = names["scheduler_model" if loop.unet == "loop" else "unet"]
            rebuild = _command(checkpoint, out, config)
            build_unet(folder / part / "1" / "unet", config, rebuild, report)
            written = {model.name for model in folder.iterdir()}
            for model in sorted(folder.iterdir()):
                report(model.name)
                shutil.rmtree(out / model.name, ignore_errors=True)
                model.rename(out / model.name)
            for part in names.values():  # what another choice had left there before
                if part not in written:
                    shutil.rmtree(out / part, ignore_errors=True)
    except OSError as error:
        raise SetupError(f"{out} cannot be written: {error}") from error
    return config


def model_names(name: str) -> dict[str, str]:
    """Served name of every part; the plain pipeline's parts have plain names."""
    prefix = "" if name == PLAIN_NAME else f"{name}_"
    parts = {part: f"{prefix}{part}" for part in ("scheduler_model", *_STAGE_FOLDERS)}
    return {**parts, "full_pipeline": name, "full_pipeline_stream": f"{name}_stream"}


def read_checkpoint(folder: Path) -> Checkpoint:
    """Everything the loop must know of a diffusers folder, from its own files.

    Raises:
        SetupError: it is no diffusers folder, or a part is missing.
    """
    if folder.is_file():
        raise SetupError(f"{folder} is a single file; needed is a folder in diffusers' layout")
    index = read_json(folder / "model_index.json")
    unet = read_json(folder / "unet" / "config.json")
    vae = read_json(folder / "vae" / "config.json")
    weights = sorted(folder.glob("*/*.safetensors"))
    if not weights:
        raise SetupError(f"{folder} holds no *.safetensors weights")
    is_sdxl = "XL" in index["_class_name"] or unet.get("addition_embed_type") == "text_time"
    pooled_dim = 0
    if is_sdxl:  # the rest of the UNet's added conditions are six embedded sizes
        added = int(unet["projection_class_embeddings_input_dim"])
        pooled_dim = added - 6 * int(unet["addition_time_embed_dim"])
    return Checkpoint(
        digest=_digest(weights),
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        latent_channels=int(vae["latent_channels"]),
        vae_scale_factor=2 ** (len(vae["block_out_channels"]) - 1),
        scaling_factor=float(vae["scaling_factor"]),
        latent_rgb=fit_latent_rgb(folder / "vae", float(vae["scaling_factor"])),
        embed_dim=int(unet["cross_attention_dim"]),
        pooled_dim=pooled_dim,
        is_sdxl=is_sdxl,
    )


def read_json(path: Path) -> dict:
    """A JSON file of a checkpoint; raises SetupError naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(
            f"{path} cannot be read ({error}); needed is a folder in diffusers' layout"
        ) from None


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


def _digest(weights: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in weights:
        digest.update(f"{path.parent.name}/{path.name}".encode())
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 22), b""):
                digest.update(block)
    return digest.hexdigest()[:16]


def _buckets(max_rows: int) -> list[int]:
    """Powers of two up to `max_rows`, and that itself."""
    powers = [1 << power for power in range(max_rows.bit_length()) if 1 << power < max_rows]
    return [*powers, max_rows]


def _command(checkpoint: Path, out: Path, config: PipelineConfig) -> str:
    """The command line that assembles this pipeline, for messages about its engine."""
    loop, limits = config.loop, config.limits
    options = {
        "name": config.name,
        "out": str(out),
        "device": loop.device,
        "engine": loop.engine,
        "precision": loop.precision,
        "sizes": ",".join(f"{width}x{height}" for width, height in loop.sizes),
        "unet": loop.unet,
        "max-size": str(limits.max_size_px),
        "max-batch": str(limits.max_batch_size),
        "max-rows": str(loop.max_rows),
    }
    words = ["fullpipe", "assemble", str(checkpoint)]
    words += [word for name, value in options.items() if value for word in (f"--{name}", value)]
    return shlex.join(words)


def _defaults(checkpoint: Path) -> Defaults:
    unet = read_json(checkpoint / "unet" / "config.json")
    vae = read_json(checkpoint / "vae" / "config.json")
    native = int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    return Defaults(width=native, height=native)


def _write_loop(
    folder: Path, checkpoint: Path, config: PipelineConfig, names: dict[str, str]
) -> None:
    template = source_root() / "scheduler_model"
    model = _template_config(template / "config.pbtxt", names["scheduler_model"])
    _declare(model.input, contract.LOOP_INPUTS)
    _declare(model.output, contract.LOOP_OUTPUTS)
    version = _write_model(folder, model)
    shutil.copy(template / "1" / "model.py", version)
    config.save(version / "pipeline.json")
    if config.loop.unet == "loop":
        _link_folder(checkpoint / "unet", version / "unet")


def _write_stages(
    folder: Path,
    checkpoint: Path,
    config: PipelineConfig,
    names: dict[str, str],
    threads: int,
) -> None:
    for stage, parts in _STAGE_FOLDERS.items():
        if stage == "unet" and config.loop.unet == "loop":
            continue
        template = source_root() / "model_repository" / stage / "config.pbtxt"
        version = _write_model(folder, _template_config(template, names[stage]))
        # ComfyUI computes embeddings in fp32 on every device, and they cost next to nothing.
        precision = "fp32" if stage == "text_encoder" else config.loop.precision
        settings = StageConfig(stage, config.loop.devices[0], precision, torch_threads=threads)
        settings.save(version / "stage.json")
        for part in parts:
            if (checkpoint / part).is_dir():
                _link_folder(checkpoint / part, version / part)
        if stage == "unet":
            config.save(version / "pipeline.json")


def _write_ensemble(folder: Path, config: PipelineConfig, names: dict[str, str]) -> None:
    template = source_root() / "ensemble" / "full_pipeline" / "config.pbtxt"
    model = _template_config(template, names["full_pipeline"])
    _declare(model.input, contract.PICTURE_INPUTS)
    _declare(model.output, contract.PICTURE_OUTPUTS)
    loop = model.ensemble_scheduling.step.add()
    loop.model_name, loop.model_version = names["scheduler_model"], -1
    for tensor in contract.PICTURE_INPUTS:
        loop.input_map[tensor.name] = tensor.name
    loop.output_map["images"] = "pixels"
    loop.output_map["info"] = "info"
    encoder = model.ensemble_scheduling.step.add()
    encoder.model_name, encoder.model_version = names["image_encoder"], -1
    encoder.input_map["images"] = "pixels"
    encoder.input_map["output_format"] = "output_format"
    encoder.output_map["image"] = "image"
    encoder.output_map["images"] = "images"
    facts = {
        "samplers": list(SAMPLERS),
        "schedulers": list(SCHEDULERS),
        "defaults": dataclasses.asdict(config.defaults),
        "limits": dataclasses.asdict(config.limits),
        "checkpoint": config.checkpoint.digest,
        "version": __version__,
        "stream": names["full_pipeline_stream"],
        "scheduler_model": names["scheduler_model"],
    }
    model.parameters[PARAMETER].string_value = json.dumps(facts)
    _write_model(folder, model)


def _write_stream(folder: Path, names: dict[str, str]) -> None:
    template = source_root() / "ensemble" / "full_pipeline_stream"
    model = _template_config(template / "config.pbtxt", names["full_pipeline_stream"])
    _declare(model.input, contract.STREAM_INPUTS)
    _declare(model.output, contract.STREAM_OUTPUTS)
    model.parameters["pipeline"].string_value = names["full_pipeline"]
    model.parameters["scheduler_model"].string_value = names["scheduler_model"]
    version = _write_model(folder, model)
    shutil.copy(template / "1" / "model.py", version)


def _template_config(path: Path, name: str) -> model_config_pb2.ModelConfig:
    try:
        model = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except (OSError, text_format.ParseError) as error:
        raise SetupError(f"{path} is no Triton model configuration: {error}") from None
    model.name = name
    return model


def _declare(field, tensors: Iterable[contract.Tensor]) -> None:
    for tensor in tensors:
        entry = field.add()
        entry.name = tensor.name
        entry.data_type = model_config_pb2.DataType.Value(f"TYPE_{tensor.dtype}")
        entry.dims.extend(tensor.dims)
        if isinstance(entry, model_config_pb2.ModelInput):
            entry.optional = True


def _write_model(folder: Path, model: model_config_pb2.ModelConfig) -> Path:
    version = folder / model.name / "1"
    version.mkdir(parents=True)
    (folder / model.name / "config.pbtxt").write_text(text_format.MessageToString(model))
    return version


def _link_folder(source: Path, target: Path) -> None:
    """Copy a folder of weights, by hard links where the file system can."""

    def link(source_file: str, target_file: str) -> None:
        try:
            os.link(source_file, target_file)
        except OSError:
            shutil.copy2(source_file, target_file)

    shutil.copytree(source, target, copy_function=link)
