"""The folders and configurations of one pipeline in a Triton model repository.

The templates in `scheduler_model/`, `ensemble/` and `model_repository/` carry Triton's facts; the
contract supplies inputs and outputs. Configurations go through Triton's own protobuf schema, so a
typing error fails here and not at load.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from fullpipe import __version__, contract
from fullpipe.checkpoints.folder import link_part
from fullpipe.config import PipelineConfig, StageConfig
from fullpipe.errors import SetupError
from fullpipe.samplers import SAMPLERS
from fullpipe.schedulers import SCHEDULERS
from fullpipe.source_files import source_root

PLAIN_NAME = "full_pipeline"
PARAMETER = "fullpipe_pipeline"
_STAGE_FOLDERS = {
    "text_encoder": ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "embeddings"),
    "unet": ("unet",),
    "vae_decoder": ("vae",),
    "vae_encoder": ("vae",),
    "image_encoder": (),
}
# Which stages an engine runs; the others, and all of them for `torch`, are eager.
_STAGES_OF_ENGINES = {
    "onnx": tuple(_STAGE_FOLDERS),
    "tensorrt": tuple(_STAGE_FOLDERS),
    "compiled": ("unet", "vae_decoder"),
}


def write_models(folder: Path, checkpoint: Path, config: PipelineConfig, threads: int) -> None:
    """Write every model of a pipeline, but for what engines build.

    Args:
        folder: empty; gets one folder per model.
        checkpoint: in diffusers' layout.
        config: of the pipeline.
        threads: of torch in each stage, 0 = torch's own choice.
    """
    names = model_names(config.name)
    _write_loop(folder, checkpoint, config, names)
    _write_stages(folder, checkpoint, config, names, threads)
    _write_ensemble(folder, config, names)
    _write_stream(folder, names)


def use_native_plans(models: Path, config: PipelineConfig) -> None:
    """Turn the UNet and the VAE into models of Triton's own TensorRT backend.

    Args:
        models: the pipeline's models, their plans built.
        config: of the pipeline.
    """
    names = config.models
    for model, folder, plan, profiles in (
        (names.unet, "unet", "unet", len(config.loop.buckets)),
        (names.vae_decoder, "vae", "vae_decoder", 1),
        (names.vae_encoder, "vae", "vae_encoder", 1),
    ):
        version = models / model / "1"
        built = version / folder
        template = source_root() / "model_repository" / "plan" / "config.pbtxt"
        settings = _template_config(template, model)
        for kind, field in (("inputs", settings.input), ("outputs", settings.output)):
            for tensor in json.loads((built / f"{plan}.json").read_text(encoding="utf-8"))[kind]:
                entry = field.add()
                entry.name = tensor["name"]
                entry.data_type = model_config_pb2.DataType.Value(tensor["data_type"])
                entry.dims.extend(tensor["dims"])
        settings.instance_group[0].profile.extend(str(index) for index in range(profiles))
        (built / f"{plan}.plan").rename(version / "model.plan")
        shutil.rmtree(built)
        for name in ("stage.json", "pipeline.json"):
            (version / name).unlink()
        (models / model / "config.pbtxt").write_text(text_format.MessageToString(settings))


def model_names(name: str) -> dict[str, str]:
    """Served name of every part; the plain pipeline's parts have plain names."""
    prefix = "" if name == PLAIN_NAME else f"{name}_"
    parts = {part: f"{prefix}{part}" for part in ("scheduler_model", *_STAGE_FOLDERS)}
    return {**parts, "full_pipeline": name, "full_pipeline_stream": f"{name}_stream"}


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
        link_part(checkpoint, "unet", version / "unet")


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
        engine = config.loop.engine
        if stage not in _STAGES_OF_ENGINES.get(engine, ()):
            engine = "torch"
        settings = StageConfig(stage, config.loop.devices[0], precision, engine, threads)
        settings.save(version / "stage.json")
        for part in parts:
            if (checkpoint / part).is_dir():
                link_part(checkpoint, part, version / part)
        if stage in ("unet", "vae_decoder") or engine != "torch":
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
        "step_cache": config.loop.step_cache,
        "stream": names["full_pipeline_stream"],
        "scheduler_model": names["scheduler_model"],
        "models": {
            part: names[part]
            for part in _STAGE_FOLDERS
            if part != "unet" or config.loop.unet != "loop"
        },
        # What a client needs to know of the networks to run its own loop over them.
        "network": {
            key: value
            for key, value in dataclasses.asdict(config.checkpoint).items()
            if key not in ("digest", "latent_rgb")
        },
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
