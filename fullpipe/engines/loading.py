"""Which engine executes a pipeline's networks, at load; `fullpipe.engines.building` builds them.

The engines are imported when they are chosen, so that a server needs only what it uses.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from fullpipe.config import ENGINES, PRECISIONS, PipelineConfig
from fullpipe.engines import Engine
from fullpipe.engines.artifact import Artifact, Key
from fullpipe.engines.network import (
    Network,
    NetworkClip,
    NetworkUNet,
    NetworkVaeDecoder,
    NetworkVaeEncoder,
)
from fullpipe.engines.shallow import SHALLOW_LAYERS
from fullpipe.errors import SetupError
from fullpipe.stages import VaeDecoder
from fullpipe.text.clip import ClipTextModel

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_unet(folder: Path, config: PipelineConfig, device: str) -> Engine:
    """The UNet of a pipeline, executed by `config.loop.engine`.

    Args:
        folder: a diffusers `unet` folder: weights and, unless the engine is torch, what
            `build_engine` left there.
        config: of the pipeline that the UNet belongs to.
        device: one of `config.loop.devices`.
    Raises:
        SetupError: the folder or the engine is broken, was built for something else, or does not
            fit into memory; the message names the remedy.
    """
    settings = dataclasses.replace(config.loop, device=device)
    dtype = torch_dtype(settings.precision)
    with naming_memory(folder, settings.device):
        if settings.engine == "torch":
            from fullpipe.engines.torch_engine import TorchUNet

            return TorchUNet(
                folder, device=settings.device, dtype=dtype, step_cache=settings.step_cache
            )
        _check(folder, config)
        if settings.engine == "compiled":
            from fullpipe.engines.compiled_engine import CompiledUNet

            return CompiledUNet.load(folder, settings)
        network = _network(folder, "unet", config, device)
        if settings.engine == "onnx":
            return NetworkUNet(network)
        from fullpipe.engines.tensorrt_engine import TensorRtNetwork, TensorRtUNet

        assert isinstance(network, TensorRtNetwork)
        return TensorRtUNet(network, config)


def load_vae_decoder(
    folder: Path, config: PipelineConfig, device: str
) -> NetworkVaeDecoder | VaeDecoder:
    """The VAE decoder of a diffusers `vae` folder and what `build_engine` left there.

    Raises as `load_unet` does.
    """
    with naming_memory(folder, device):
        if config.loop.engine == "torch":
            return VaeDecoder(folder, device=device, dtype=torch_dtype(config.loop.precision))
        _check(folder, config)
        if config.loop.engine == "compiled":
            from fullpipe.engines.compiled_vae import CompiledVaeDecoder

            return CompiledVaeDecoder(folder, config, device, torch_dtype(config.loop.precision))
        network = _network(folder, "vae_decoder", config, device)
        return NetworkVaeDecoder(network, device, config.checkpoint.vae_scale_factor)


def load_vae_encoder(folder: Path, config: PipelineConfig, device: str) -> NetworkVaeEncoder:
    """The VAE encoder that `build_engine` left in `folder`; raises as `load_unet` does."""
    facts = config.checkpoint
    with naming_memory(folder, device):
        _check(folder, config)
        network = _network(folder, "vae_encoder", config, device)
        return NetworkVaeEncoder(network, device, facts.vae_scale_factor, facts.latent_channels)


def load_clip(
    folder: Path, model: ClipTextModel, config: PipelineConfig, device: str
) -> NetworkClip:
    """What `build_engine` left in `folder`, in the place of `model`; raises as `load_unet` does."""
    with naming_memory(folder, device):
        _check(folder, config)
        return NetworkClip(model, _network(folder, "clip", config, device))


def _check(folder: Path, config: PipelineConfig) -> None:
    if config.loop.engine not in ENGINES:
        known = ", ".join(ENGINES)
        raise SetupError(f"engine={config.loop.engine!r} is unknown, allowed: {known}")
    Artifact.load(folder).check(folder, engine_key(config))


def _network(folder: Path, name: str, config: PipelineConfig, device: str) -> Network:
    if config.loop.engine == "onnx":
        from fullpipe.engines.onnx_engine import OnnxNetwork

        return OnnxNetwork(folder / f"{name}.onnx", device)
    from fullpipe.engines.tensorrt_engine import TensorRtNetwork

    return TensorRtNetwork(folder / f"{name}.plan", device)


def engine_key(config: PipelineConfig) -> Key:
    """What a built engine of this pipeline must have been built for, on this machine."""
    settings = config.loop
    gpu, libraries = "any", {}  # an ONNX file runs wherever ONNX Runtime does
    if settings.engine == "compiled":
        gpu = gpu_architecture(settings.devices[0])
        libraries = {name: metadata.version(name) for name in ("torch", "diffusers")}
    elif settings.engine == "tensorrt":
        from fullpipe.engines.tensorrt_library import library

        gpu = "any" if library().is_rtx else gpu_architecture(settings.devices[0])
        libraries = library().versions
    return Key(
        engine=settings.engine,
        checkpoint=config.checkpoint.digest,
        precision=settings.precision,
        sizes=settings.sizes,
        buckets=settings.buckets,
        gpu=gpu,
        libraries=libraries,
        shallow_layers=SHALLOW_LAYERS if settings.step_cache else 0,
    )


def gpu_architecture(device: str) -> str:
    """Compute capability of a torch device: "sm_90", or "cpu AVX512".

    Raises:
        SetupError: the device does not exist here.
    """
    if torch.device(device).type != "cuda":
        return f"{torch.device(device).type} {torch.backends.cpu.get_cpu_capability()}"
    try:
        major, minor = torch.cuda.get_device_capability(device)
    except (RuntimeError, AssertionError) as error:
        raise SetupError(f"device={device} is not usable here: {first_line(error)}") from error
    return f"sm_{major}{minor}"


def torch_dtype(precision: str) -> torch.dtype:
    """fp32, fp16 or bf16 as a torch dtype; raises SetupError for anything else."""
    if precision not in _DTYPES:
        raise SetupError(f"precision={precision!r} is unknown, allowed: {', '.join(PRECISIONS)}")
    return _DTYPES[precision]


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def naming_memory(folder: Path, device: str) -> Iterator[None]:
    """Turn what is raised when memory runs out into a line that says so.

    diffusers takes it for a broken file and raises that, with the cause behind it.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_memory(error):
            raise
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        raise SetupError(
            f"{folder} does not fit into the memory of {device}: its weights alone are"
            f" {weights / 2**30:.1f} GiB; free memory, or assemble with --precision fp16"
        ) from error


def _is_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
