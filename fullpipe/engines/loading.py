"""Which engine executes a pipeline's networks: one place that builds and one that loads.

The engines are imported when they are chosen, so that a server needs only what it uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from fullpipe.config import ENGINES, PRECISIONS, PipelineConfig
from fullpipe.engines import Engine
from fullpipe.engines.artifact import Artifact, Key
from fullpipe.errors import PipelineError, SetupError

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_unet(folder: Path, config: PipelineConfig, device: str) -> Engine:
    """The UNet of a pipeline, executed by `config.loop.engine`.

    Args:
        folder: a diffusers `unet` folder: weights and, unless the engine is torch, what
            `build_unet` left there.
        config: of the pipeline that the UNet belongs to.
        device: one of `config.loop.devices`.
    Raises:
        SetupError: the folder or the engine is broken, was built for something else, or does not
            fit into memory; the message names the remedy.
    """
    settings = dataclasses.replace(config.loop, device=device)
    if settings.engine not in ENGINES:
        raise SetupError(f"engine={settings.engine!r} is unknown, allowed: {', '.join(ENGINES)}")
    dtype = torch_dtype(settings.precision)
    if settings.engine != "torch":
        Artifact.load(folder).check(folder, engine_key(config))
    try:
        if settings.engine == "compiled":
            from fullpipe.engines.compiled_engine import CompiledUNet

            return CompiledUNet.load(folder, settings)
        from fullpipe.engines.torch_engine import TorchUNet

        return TorchUNet(folder, device=settings.device, dtype=dtype)
    except (RuntimeError, MemoryError) as error:
        raise _out_of_memory(folder, settings.device, error) from error


def build_unet(
    folder: Path, config: PipelineConfig, rebuild: str, report: Callable[[str], None]
) -> None:
    """Build what `load_unet` will load, and leave `engine.json` beside it; torch needs nothing.

    Args:
        folder: a diffusers `unet` folder, writable; its weights stay as they are.
        config: of the pipeline; `loop` says engine, precision, sizes, buckets and device.
        rebuild: the command that does this again, for messages.
        report: gets a line per step.
    Raises:
        SetupError: the engine's libraries are missing, or the build failed.
    """
    settings = config.loop
    if settings.engine == "torch":
        return
    before = set(folder.rglob("*"))
    try:
        if settings.engine == "compiled":
            from fullpipe.engines import compiled_engine

            compiled_engine.build(folder, settings, report)
    except (RuntimeError, MemoryError) as error:
        raise _out_of_memory(folder, settings.device, error) from error
    files = [path for path in folder.rglob("*") if path.is_file() and path not in before]
    Artifact.of(engine_key(config), folder, files, rebuild).save(folder)


def engine_key(config: PipelineConfig) -> Key:
    """What a built engine of this pipeline must have been built for, on this machine."""
    settings = config.loop
    return Key(
        engine=settings.engine,
        checkpoint=config.checkpoint.digest,
        precision=settings.precision,
        sizes=settings.sizes,
        buckets=settings.buckets,
        gpu=gpu_architecture(settings.devices[0]),
        libraries={name: metadata.version(name) for name in ("torch", "diffusers")},
    )


def gpu_architecture(device: str) -> str:
    """Compute capability of a torch device: "sm_90", or "cpu".

    Raises:
        SetupError: the device does not exist here.
    """
    if torch.device(device).type != "cuda":
        return torch.device(device).type
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


def _out_of_memory(folder: Path, device: str, error: Exception) -> Exception:
    """A line about memory where that is what ran out; any other error as it is."""
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if isinstance(error, PipelineError) or not (is_memory or "can't allocate memory" in str(error)):
        return error
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return SetupError(
        f"{folder} does not fit into the memory of {device}: its weights alone are"
        f" {weights / 2**30:.1f} GiB; free memory, or assemble with --precision fp16"
    )
