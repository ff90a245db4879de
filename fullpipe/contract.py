"""The contract: what a request may say, what it gets, and how it is checked.

The tables here are the single source for Triton's configs, the loop, the command line and the
client. Names and spelling follow ComfyUI where it has them.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from fullpipe.config import Defaults, Limits
from fullpipe.errors import InvalidRequest

OUTPUT_FORMATS = ("png", "webp", "jpeg", "raw")
PREVIEWS = ("none", "latent")
OUTPUTS = ("images", "latents")
SIZE_MULTIPLE_PX = 8
CLIP_SKIP_RANGE = (-24, -1)
STEP_CACHE_RANGE = (1, 10)
JOB_ID_MAX_CHARS = 128


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One named tensor of the contract.

    Attributes:
        name: as clients write it.
        dtype: Triton's name of the type, without the TYPE_ prefix.
        dims: shape, -1 for any.
        meaning: one line for help texts and the reference.
    """

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    meaning: str = ""


PICTURE_INPUTS = (
    # Optional for Triton, whose own words for a missing input of an ensemble help nobody.
    Tensor("prompt", "STRING", meaning="what to draw, in ComfyUI's prompt syntax; required"),
    Tensor("negative_prompt", "STRING", meaning="what to keep out"),
    Tensor("seed", "UINT64", meaning="same seed, same picture; random and reported if left out"),
    Tensor("steps", "INT32", meaning="sampler steps"),
    Tensor("cfg", "FP32", meaning="guidance; 1.0 skips the negative half"),
    Tensor("sampler_name", "STRING", meaning="ComfyUI's name of the sampler"),
    Tensor("scheduler", "STRING", meaning="ComfyUI's name of the sigma schedule"),
    Tensor("denoise", "FP32", meaning="how much of the start image is repainted, 0 … 1"),
    Tensor("width", "INT32", meaning="pixels, a multiple of 8"),
    Tensor("height", "INT32", meaning="pixels, a multiple of 8"),
    Tensor("batch_size", "INT32", meaning="pictures of this request"),
    Tensor("init_image", "UINT8", (-1, -1, -1, 3), "NHWC start picture, for img2img"),
    Tensor("mask", "UINT8", (-1, -1, -1), "NHW, 255 = repaint"),
    Tensor("init_image_b64", "STRING", meaning="start picture as base64 PNG, JPEG or WebP"),
    Tensor("mask_b64", "STRING", meaning="mask as base64 PNG, JPEG or WebP, white = repaint"),
    Tensor("clip_skip", "INT32", meaning="ComfyUI's stop_at_clip_layer, -1 … -24"),
    Tensor("step_cache", "INT32", meaning="whole UNet every so many steps; 1, always, is exact"),
    Tensor("output_format", "STRING", meaning="png, webp, jpeg or raw"),
    Tensor(
        "job_id", "STRING", meaning="names the job for progress and cancel; make it unguessable"
    ),
)
STREAM_INPUTS = (*PICTURE_INPUTS, Tensor("preview", "STRING", meaning="none or latent"))
PICTURE_OUTPUTS = (
    Tensor("image", "STRING", (-1,), "one base64 string per picture; empty for raw"),
    Tensor("images", "UINT8", (-1, -1, -1, 3), "NHWC pixels for raw, otherwise no picture"),
    Tensor("info", "STRING", (1,), "JSON: seed, size, sampler, job_id, milliseconds per stage"),
)
STREAM_OUTPUTS = (*PICTURE_OUTPUTS, Tensor("event", "STRING", (1,), "JSON: step, steps, preview"))

EMBEDS = (
    Tensor("prompt_embeds", "FP32", (-1, -1, -1), "[1, 77n, C] instead of prompt"),
    Tensor("negative_prompt_embeds", "FP32", (-1, -1, -1), "[1, 77n, C]"),
    Tensor("pooled_prompt_embeds", "FP32", (-1, -1), "[1, P]"),
    Tensor("negative_pooled_prompt_embeds", "FP32", (-1, -1), "[1, P]"),
)
LATENTS = Tensor("latents", "FP32", (-1, -1, -1, -1), "[N, 4, h, w], ComfyUI's LATENT samples")
LOOP_INPUTS = (
    *PICTURE_INPUTS,
    *EMBEDS,
    LATENTS,
    Tensor("noise_mask", "FP32", (-1, -1, -1), "[N, h, w] in 0 … 1, 1 = repaint"),
    Tensor("output", "STRING", meaning="images, or latents to stop before the VAE"),
    Tensor("op", "STRING", meaning="generate, progress or cancel"),
    Tensor("since", "INT32", meaning="progress: answer once more steps than this are done"),
    Tensor("wait_ms", "INT32", meaning="progress: answer after so long in any case"),
    Tensor("preview", "STRING", meaning="progress: none or latent"),
)
LOOP_OUTPUTS = (
    Tensor("images", "UINT8", (-1, -1, -1, 3), "NHWC pixels"),
    LATENTS,
    Tensor("info", "STRING", (1,), "JSON about the job"),
    Tensor("event", "STRING", (1,), "JSON answer to op=progress and op=cancel"),
)


@dataclasses.dataclass(frozen=True)
class Request:
    """One checked request. Pictures and embeddings are arrays as they came in, not yet decoded.

    Attributes:
        width, height: pixels; None where the start image or the latents decide.
        step_cache: the UNet runs as a whole every so many table rows, else its outermost layers.
        arrays: the array inputs that were given, by contract name.
    """

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float
    width: int | None
    height: int | None
    batch_size: int
    clip_skip: int | None
    step_cache: int
    output_format: str
    output: str
    job_id: str
    init_image_b64: str | None
    mask_b64: str | None
    arrays: Mapping[str, np.ndarray]

    @property
    def has_start(self) -> bool:
        """Whether the request starts from a picture or from latents."""
        return bool(self.init_image_b64) or "init_image" in self.arrays or "latents" in self.arrays


@dataclasses.dataclass(frozen=True)
class ProgressQuery:
    """`op=progress`: answer once more than `since` steps are done, or after `wait_ms`."""

    job_id: str
    since: int
    wait_ms: int
    has_preview: bool


@dataclasses.dataclass(frozen=True)
class CancelOrder:
    """`op=cancel`."""

    job_id: str


def parse(
    inputs: Mapping[str, np.ndarray],
    defaults: Defaults,
    limits: Limits,
    samplers: tuple[str, ...],
    schedulers: tuple[str, ...],
    refused: Mapping[str, str],
) -> Request | ProgressQuery | CancelOrder:
    """Check the named tensors of one call of the loop model.

    Args:
        inputs: contract name to numpy array as Triton delivers it: strings as object arrays of
            bytes, scalars with dims [1].
        samplers, schedulers: the names that this server offers.
        refused: sampler names that it refuses, each with the reason.
    Raises:
        InvalidRequest: one line with what, got and allowed.
    """
    fields = _Fields(inputs)
    op = fields.choice("op", "generate", ("generate", "progress", "cancel"))
    if op == "cancel":
        return CancelOrder(fields.job_id(required=True))
    if op == "progress":
        return ProgressQuery(
            job_id=fields.job_id(required=True),
            since=fields.integer("since", -1, -1, 2**31 - 1),
            wait_ms=fields.integer("wait_ms", 1000, 0, 10_000),
            has_preview=fields.choice("preview", "none", PREVIEWS) == "latent",
        )
    sampler_name = fields.text("sampler_name", "", 256)
    if sampler_name in refused:
        raise InvalidRequest(f"sampler_name={sampler_name!r} is refused: {refused[sampler_name]}")
    return _parse_picture(fields, defaults, limits, samplers, schedulers)


def _parse_picture(
    fields: _Fields,
    defaults: Defaults,
    limits: Limits,
    samplers: tuple[str, ...],
    schedulers: tuple[str, ...],
) -> Request:
    arrays = fields.arrays(
        "init_image", "mask", "latents", "noise_mask", *(tensor.name for tensor in EMBEDS)
    )
    if "prompt" not in fields.given and "prompt_embeds" not in arrays:
        raise InvalidRequest("prompt is missing; it is the one input that is required")
    request = Request(
        prompt=fields.text("prompt", "", limits.max_prompt_chars),
        negative_prompt=fields.text("negative_prompt", "", limits.max_prompt_chars),
        seed=fields.integer("seed", None, 0, 2**64 - 1) if "seed" in fields.given else _new_seed(),
        steps=fields.integer("steps", defaults.steps, 1, limits.max_steps),
        cfg=fields.number("cfg", defaults.cfg, 0.0, 100.0),
        sampler_name=fields.choice("sampler_name", defaults.sampler_name, samplers),
        scheduler=fields.choice("scheduler", defaults.scheduler, schedulers),
        denoise=fields.number("denoise", 1.0, 0.0, 1.0),
        width=fields.size("width", limits),
        height=fields.size("height", limits),
        batch_size=fields.integer("batch_size", 1, 1, limits.max_batch_size),
        clip_skip=(
            fields.integer("clip_skip", None, *CLIP_SKIP_RANGE)
            if "clip_skip" in fields.given
            else None
        ),
        step_cache=fields.integer("step_cache", 1, *STEP_CACHE_RANGE),
        output_format=fields.choice("output_format", "png", OUTPUT_FORMATS),
        output=fields.choice("output", "images", OUTPUTS),
        job_id=fields.job_id(required=False) or secrets.token_urlsafe(16),
        init_image_b64=fields.base64("init_image_b64", limits.max_image_bytes),
        mask_b64=fields.base64("mask_b64", limits.max_image_bytes),
        arrays=arrays,
    )
    _check_together(request)
    if not request.has_start:
        request = dataclasses.replace(
            request,
            width=request.width or defaults.width,
            height=request.height or defaults.height,
        )
    return request


def _check_together(request: Request) -> None:
    files = {"init_image_b64": request.init_image_b64, "mask_b64": request.mask_b64}
    given = {*request.arrays, *(name for name, text in files.items() if text)}
    starts = [name for name in ("init_image", "init_image_b64", "latents") if name in given]
    masks = [name for name in ("mask", "mask_b64", "noise_mask") if name in given]
    for kind, names in (("start", starts), ("mask", masks)):
        if len(names) > 1:
            raise InvalidRequest(f"{' and '.join(names)} are both given; allowed is one {kind}")
    if masks and not starts:
        raise InvalidRequest(f"{masks[0]} needs a start image: init_image or init_image_b64")
    if request.denoise < 1.0 and not starts:
        raise InvalidRequest(
            f"denoise={request.denoise:g} needs a start image: init_image or init_image_b64;"
            " without one only 1.0 is allowed"
        )
    has_negative = "negative_prompt_embeds" in request.arrays
    if "prompt_embeds" in request.arrays and request.cfg != 1.0 and not has_negative:
        raise InvalidRequest("prompt_embeds with cfg above 1 needs negative_prompt_embeds")


def _new_seed() -> int:
    return secrets.randbits(63)


def shorten(value: Any, limit: int = 60) -> str:
    """`repr` of a client's value, cut so that an error message stays one readable line."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


class _Fields:
    """Typed access to the raw tensors of a request; every complaint names the input."""

    def __init__(self, inputs: Mapping[str, np.ndarray]):
        self.given = {name: array for name, array in inputs.items() if array is not None}

    def _scalar(self, name: str) -> Any:
        array = self.given[name]
        if array.size != 1:
            raise InvalidRequest(f"{name} has shape {list(array.shape)}, needs [1]")
        return array.reshape(-1)[0]

    def text(self, name: str, default: str | None, max_chars: int) -> str:
        if name not in self.given:
            return default or ""
        value = self._scalar(name)
        if isinstance(value, bytes):
            if len(value) > 4 * max_chars:
                raise InvalidRequest(
                    f"{name} has {len(value)} bytes, allowed {max_chars} characters"
                )
            try:
                value = value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InvalidRequest(f"{name} is not UTF-8: {error.reason}") from None
        if len(value) > max_chars:
            raise InvalidRequest(f"{name} has {len(value)} characters, allowed {max_chars}")
        return str(value)

    def integer(self, name: str, default: int | None, low: int, high: int) -> int:
        if name not in self.given:
            assert default is not None
            return default
        value = int(self._scalar(name))
        if not low <= value <= high:
            raise InvalidRequest(f"{name}={value} is out of range, allowed {low} … {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        if name not in self.given:
            return default
        # The shortest decimal of an fp32 is what its sender wrote: 0.8, not 0.800000012, of which
        # int(steps / denoise) would make a step less than ComfyUI does.
        value = float(str(self._scalar(name)))
        if not (math.isfinite(value) and low <= value <= high):
            raise InvalidRequest(f"{name}={value:g} is out of range, allowed {low:g} … {high:g}")
        return value

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        if name not in self.given:
            return default
        value = self.text(name, default, 256)
        if value not in allowed:
            raise InvalidRequest(
                f"{name}={shorten(value)} is unknown, allowed: {', '.join(allowed)}"
            )
        return value

    def size(self, name: str, limits: Limits) -> int | None:
        if name not in self.given:
            return None
        value = int(self._scalar(name))
        check_size(name, value, limits)
        return value

    def base64(self, name: str, max_bytes: int) -> str | None:
        if name not in self.given:
            return None
        return self.text(name, None, max_bytes * 4 // 3 + 64) or None

    def job_id(self, *, required: bool) -> str:
        value = self.text("job_id", "", JOB_ID_MAX_CHARS)
        if required and not value:
            raise InvalidRequest("job_id is missing; op=progress and op=cancel need it")
        if any(not character.isprintable() for character in value):
            raise InvalidRequest(f"job_id={shorten(value)} holds unprintable characters")
        return value

    def arrays(self, *names: str) -> dict[str, np.ndarray]:
        found = {name: self.given[name] for name in names if name in self.given}
        for name, array in found.items():
            if array.size == 0:
                raise InvalidRequest(
                    f"{name} has shape {list(array.shape)}, needs at least one value"
                )
        return found


def check_size(name: str, value: int, limits: Limits) -> None:
    """Refuse a picture side that is out of range or no multiple of 8 pixels."""
    low, high = limits.min_size_px, limits.max_size_px
    if value % SIZE_MULTIPLE_PX or not low <= value <= high:
        raise InvalidRequest(
            f"{name}={value} must be a multiple of {SIZE_MULTIPLE_PX} in [{low}, {high}]"
        )
