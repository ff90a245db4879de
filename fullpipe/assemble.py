"""`fullpipe assemble`: a checkpoint becomes a complete Triton model repository, or nothing does.

Everything is built in a folder beside the repository and moved in at the end, so that neither a
damaged checkpoint, a full disk nor Ctrl-C leaves a half of a pipeline behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fullpipe.checkpoints.folder import LAYOUT, read_checkpoint, read_defaults
from fullpipe.checkpoints.single_file import convert_single_file
from fullpipe.config import Defaults, Limits, LoopSettings, ModelNames, PipelineConfig
from fullpipe.engines import onnx_engine, tensorrt_build
from fullpipe.engines.building import build_engine
from fullpipe.engines.tensorrt_library import library
from fullpipe.errors import SetupError
from fullpipe.repository import PARAMETER, PLAIN_NAME, model_names, use_native_plans, write_models
from fullpipe.samplers import SAMPLERS
from fullpipe.schedulers import SCHEDULERS

__all__ = ["PARAMETER", "PLAIN_NAME", "Choices", "assemble", "model_names"]

_FIXED_SHAPES = ("compiled", "tensorrt")
_SPLIT_ENGINES = ("torch", "compiled")  # which can run a UNet's outermost layers alone

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the operator decides; everything else is read from the checkpoint.

    Attributes:
        limits: `max_size_px` 0 stands for half as much again as the native size.
        defaults: of requests, by the names of `Defaults`, where the checkpoint's are not wanted.
        stage_threads: of torch in each stage, 0 = torch's own choice.
    """

    name: str = PLAIN_NAME
    limits: Limits = dataclasses.field(default_factory=Limits)
    loop: LoopSettings = dataclasses.field(default_factory=LoopSettings)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stage_threads: int = 0


def assemble(
    checkpoint: Path,
    out: Path,
    choices: Choices | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> PipelineConfig:
    """Write pipeline `choices.name` into the repository `out`, beside pipelines already there.

    Args:
        checkpoint: a diffusers folder, or a single .safetensors file of SD1.x, SD2.x or SDXL.
        out: the repository; made if missing. Models of the same name are replaced.
        report: gets a line per step and per model.
        progress: gets a step's name, bytes done and bytes in all.
    Raises:
        SetupError: the checkpoint is incomplete, the engine cannot be built or `out` cannot be
            written; `out` is unchanged.
    """
    choices = choices or Choices()
    if not checkpoint.exists():
        raise SetupError(f"{checkpoint} is missing; {LAYOUT}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".assemble-") as work:
            folder = checkpoint
            if checkpoint.is_file():
                folder = Path(work) / "checkpoint"
                kind = convert_single_file(
                    checkpoint, folder, lambda *bytes_: progress("converting", *bytes_)
                )
                report(f"{checkpoint.name}: {kind}")
            config = _config(folder, choices, progress)
            models = Path(work) / "models"
            models.mkdir()
            write_models(models, folder, config, choices.stage_threads)
            names = model_names(config.name)
            rebuild = command_line(checkpoint, out, config, choices.defaults)
            build_engine(models, config, rebuild, report)
            if config.loop.unet == "plan":
                use_native_plans(models, config)
            written = sorted(model.name for model in models.iterdir())
            _install(models, out, Path(work) / "replaced", list(names.values()))
            for name in written:
                report(name)
    except OSError as error:
        raise SetupError(f"{out} cannot be written: {error}") from error
    return config


def command_line(
    checkpoint: Path, out: Path, config: PipelineConfig, defaults: Mapping[str, Any]
) -> str:
    """The command that assembles this pipeline again, for messages about its engine."""
    loop, limits = config.loop, config.limits
    options = {
        "name": config.name,
        "out": str(out),
        "device": loop.device,
        "engine": loop.engine,
        "precision": loop.precision,
        "sizes": ",".join(f"{width}x{height}" for width, height in loop.sizes),
        "unet": loop.unet,
        "vae": loop.vae,
        "defaults": ",".join(f"{name}={value}" for name, value in defaults.items()),
        "max-size": str(limits.max_size_px),
        "max-batch": str(limits.max_batch_size),
        "max-rows": str(loop.max_rows),
    }
    words = ["fullpipe", "assemble", str(checkpoint)]
    words += [word for name, value in options.items() if value for word in (f"--{name}", value)]
    words += ["--step-cache"] if loop.step_cache else []
    return shlex.join(words)


def _config(folder: Path, choices: Choices, progress: Progress) -> PipelineConfig:
    defaults = _with_choices(read_defaults(folder), choices.defaults)
    native_px = max(defaults.width, defaults.height)
    loop, limits = choices.loop, choices.limits
    if loop.engine in _FIXED_SHAPES:
        loop = dataclasses.replace(
            loop,
            sizes=loop.sizes or [[defaults.width, defaults.height]],
            buckets=loop.buckets or _buckets(loop.max_rows),
        )
    _check_engine(loop)
    sides = [native_px, *(side for size in loop.sizes for side in size)]
    largest = limits.max_size_px or max(Limits().max_size_px, native_px * 3 // 2)
    limits = dataclasses.replace(limits, max_size_px=max(largest, *sides))
    if loop.engine == "tensorrt":
        spans = [(min(sides), max(sides)) for sides in zip(*loop.sizes, strict=True)]
        asked = (defaults.width, defaults.height)
        if not all(low <= side <= high for side, (low, high) in zip(asked, spans, strict=True)):
            width, height = loop.sizes[0]
            defaults = dataclasses.replace(defaults, width=width, height=height)
        sides = [side for size in loop.sizes for side in size]
        limits = dataclasses.replace(
            limits,
            min_size_px=min(sides),
            max_size_px=max(sides),
            max_prompt_tokens=min(limits.max_prompt_tokens, tensorrt_build.MAX_TOKENS),
        )
    names = model_names(choices.name)
    parts = {field.name: names[field.name] for field in dataclasses.fields(ModelNames)}
    return PipelineConfig(
        name=choices.name,
        checkpoint=read_checkpoint(folder, lambda *bytes_: progress("reading", *bytes_)),
        defaults=defaults,
        limits=limits,
        loop=loop,
        models=ModelNames(**parts),
    )


def _check_engine(loop: LoopSettings) -> None:
    """Refuse choices that cannot go together, before anything is built."""
    if loop.step_cache and (loop.engine not in _SPLIT_ENGINES or loop.unet != "loop"):
        raise SetupError(
            f"step-cache with engine={loop.engine} and unet={loop.unet}, allowed:"
            f" engine={' or '.join(_SPLIT_ENGINES)} with unet=loop"
        )
    if loop.engine == "onnx" and loop.precision not in onnx_engine.PRECISIONS:
        allowed = ", ".join(onnx_engine.PRECISIONS)
        raise SetupError(f"precision={loop.precision} with engine=onnx, allowed: {allowed}")
    if loop.engine == "tensorrt":
        found = library()
        if loop.unet == "plan" and found.is_rtx:
            raise SetupError(
                "unet=plan needs the full TensorRT of NVIDIA's container, where Triton reads its"
                f" plans; found {found.name} {found.module.__version__}"
            )
        if loop.unet == "plan" and loop.vae == "loop":
            raise SetupError(
                "vae=loop with unet=plan, which makes the VAE a plan too; allowed: bls"
            )
    elif loop.unet == "plan":
        raise SetupError(f"unet=plan needs engine=tensorrt, got engine={loop.engine}")


def _with_choices(defaults: Defaults, chosen: Mapping[str, Any]) -> Defaults:
    """The operator's defaults over the checkpoint's; each is checked as a request's would be."""
    allowed = {field.name: field for field in dataclasses.fields(Defaults)}
    values: dict[str, Any] = {}
    for name, text in chosen.items():
        if name not in allowed:
            raise SetupError(f"default {name!r} is unknown, allowed: {', '.join(allowed)}")
        kind = type(getattr(defaults, name))
        try:
            values[name] = kind(text)
        except ValueError:
            raise SetupError(f"default {name}={text} needs {kind.__name__}") from None
    result = dataclasses.replace(defaults, **values)
    for name, names in (("sampler_name", tuple(SAMPLERS)), ("scheduler", SCHEDULERS)):
        if getattr(result, name) not in names:
            raise SetupError(
                f"default {name}={getattr(result, name)} is unknown, allowed: {', '.join(names)}"
            )
    return result


def _buckets(max_rows: int) -> list[int]:
    """Powers of two up to `max_rows`, and that itself."""
    powers = [1 << power for power in range(max_rows.bit_length()) if 1 << power < max_rows]
    return [*powers, max_rows]


def _install(models: Path, out: Path, replaced: Path, names: list[str]) -> None:
    """Move finished models into the repository, and back again if that is interrupted.

    What a name stood for before goes to `replaced`, models of an earlier choice included.
    """
    replaced.mkdir()
    new = {model.name for model in models.iterdir()}
    try:
        for name in names:
            if (out / name).exists():
                (out / name).rename(replaced / name)
            if name in new:
                (models / name).rename(out / name)
    except BaseException:
        for name in names:
            if name in new and not (models / name).exists():
                shutil.rmtree(out / name, ignore_errors=True)
            if (replaced / name).exists():
                with contextlib.suppress(OSError):
                    (replaced / name).rename(out / name)
        raise
