"""What a served pipeline is: one frozen dataclass, read from one `pipeline.json`.

`fullpipe assemble` writes the file beside the loop's `model.py`; operators edit `limits` and
`loop` there. Unknown or ill-typed keys abort loading with the file's name.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from fullpipe.errors import SetupError

ENGINES = ("torch", "compiled", "tensorrt", "onnx")
PRECISIONS = ("fp32", "fp16", "bf16")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how much work may wait. Sizes are in pixels."""

    max_steps: int = 150
    max_batch_size: int = 8
    min_size_px: int = 64
    max_size_px: int = 512
    max_prompt_chars: int = 8_000
    max_prompt_tokens: int = 16 * 77
    max_image_bytes: int = 16 * 1024 * 1024
    max_open_jobs: int = 128
    deadline_s: float = 300.0


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say otherwise."""

    width: int
    height: int
    steps: int = 20
    cfg: float = 8.0
    sampler_name: str = "euler"
    scheduler: str = "normal"


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How the denoising loop runs.

    Attributes:
        device: torch device of the slots and of an in-process UNet; several, separated by commas,
            each get a loop and a UNet of their own, and share one queue.
        precision: fp32, fp16 or bf16, of the networks' weights and arithmetic.
        engine: torch, compiled, tensorrt or onnx: what executes the networks.
        sizes: [width, height] pairs in pixels that the engine is built for, the native one first;
            empty for engines that take any size.
        buckets: UNet batch rows that the engine is built for, ascending; empty for any number.
        unet: "loop" keeps the UNet in the loop's process, "bls" calls the Triton model `unet`,
            "plan" does so with UNet and VAE as models of Triton's own TensorRT backend.
        vae: where latents become pixels: "bls" calls the Triton model `vae_decoder`, "loop" does it
            in the loop's process, on a thread and a CUDA stream beside the loop's.
        max_rows: UNet batch rows of one tick at the native size; larger sizes get fewer.
        slots: images in flight; more of them share the rows of a tick in turn.
        torch_threads: intra-op threads of the loop's process, 0 = torch's own choice.
        step_cache: whether requests may ask for shallow passes of the UNet between whole ones.
    """

    device: str = "cpu"
    precision: str = "fp32"
    engine: str = "torch"
    sizes: list[list[int]] = dataclasses.field(default_factory=list)
    buckets: list[int] = dataclasses.field(default_factory=list)
    unet: str = "loop"
    vae: str = "bls"
    max_rows: int = 16
    slots: int = 32
    torch_threads: int = 0
    step_cache: bool = False

    @property
    def devices(self) -> list[str]:
        """Every torch device that a loop runs on; the stages are on the first."""
        return [name.strip() for name in self.device.split(",")]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Facts read from the checkpoint's own configuration files.

    Attributes:
        digest: sha256 over the weights, hexadecimal, 16 characters.
        scheduler: the diffusers scheduler_config.json, for betas and prediction type.
        latent_channels: channels of a latent.
        vae_scale_factor: pixels per latent pixel along one axis.
        scaling_factor: latents of the loop = scaling_factor × latents of the VAE.
        latent_rgb: [latent_channels + 1][3], affine map of loop latents to colour in -1 … 1,
            fitted on the VAE when the repository was assembled; for previews.
        embed_dim: width C of prompt_embeds.
        pooled_dim: width P of pooled_prompt_embeds, 0 where the UNet takes none.
        is_sdxl: the UNet takes text_embeds and time_ids.
    """

    digest: str
    scheduler: dict[str, Any]
    latent_channels: int
    vae_scale_factor: int
    scaling_factor: float
    latent_rgb: list[list[float]]
    embed_dim: int
    pooled_dim: int
    is_sdxl: bool


@dataclasses.dataclass(frozen=True)
class ModelNames:
    """Names under which this pipeline's stages are served."""

    scheduler_model: str = "scheduler_model"
    text_encoder: str = "text_encoder"
    unet: str = "unet"
    vae_decoder: str = "vae_decoder"
    vae_encoder: str = "vae_encoder"


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Everything the loop needs to know about its pipeline."""

    name: str
    checkpoint: Checkpoint
    defaults: Defaults
    limits: Limits = dataclasses.field(default_factory=Limits)
    loop: LoopSettings = dataclasses.field(default_factory=LoopSettings)
    models: ModelNames = dataclasses.field(default_factory=ModelNames)

    @classmethod
    def load(cls, path: Path) -> PipelineConfig:
        """Read and check `pipeline.json`.

        Raises:
            SetupError: the file is missing, is not JSON, or has an unknown or ill-typed key.
        """
        return load_dataclass(cls, path)

    def save(self, path: Path) -> None:
        """Write the file that `load` reads."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """`stage.json` of a one-shot stage: which stage, where it runs and in which precision."""

    stage: str
    device: str = "cpu"
    precision: str = "fp32"
    engine: str = "torch"
    torch_threads: int = 0

    @classmethod
    def load(cls, path: Path) -> StageConfig:
        """Read and check `stage.json`; raises SetupError as `PipelineConfig.load` does."""
        return load_dataclass(cls, path)

    def save(self, path: Path) -> None:
        """Write the file that `load` reads."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


T = typing.TypeVar("T")


def load_dataclass(cls: type[T], path: Path) -> T:
    """Read a JSON object into a (nested) dataclass, refusing unknown and ill-typed keys."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SetupError(f"{path} is missing; `fullpipe assemble` writes it") from None
    except ValueError as error:
        raise SetupError(f"{path} is not JSON: {error}") from None
    return _parse(cls, document, str(path))


def _parse(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise SetupError(f"{where} is {value!r}, needs an object")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise SetupError(f"{where} has unknown keys {unknown}, allowed: {sorted(hints)}")
        try:
            return kind(**{k: _parse(hints[k], v, f"{where}: {k}") for k, v in value.items()})  # type: ignore[operator]
        except TypeError as error:
            raise SetupError(f"{where}: {error}") from None
    if isinstance(kind, types.GenericAlias) and kind.__origin__ is list:
        if not isinstance(value, list):
            raise SetupError(f"{where} is {value!r}, needs a list")
        return [_parse(kind.__args__[0], item, where) for item in value]
    plain = kind.__origin__ if isinstance(kind, types.GenericAlias) else kind
    if plain is float and type(value) is int:
        value = float(value)
    if type(value) is not plain:
        raise SetupError(f"{where} is {value!r}, needs {plain.__name__}")
    return value
