"""A request's way through the stages, independent of Triton: prepare, loop, finish.

    submit → [prepare: start picture, text, table, noise] → [loop] → [finish: VAE] → reply

Preparing and finishing run on threads beside the loop, so no step waits for a text encoder or a
decoder. The stages behind `Stages` are Triton models on a server and plain objects elsewhere.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from fullpipe import __version__, contract
from fullpipe.config import PipelineConfig
from fullpipe.contract import CancelOrder, ProgressQuery, Request
from fullpipe.engines import Engine
from fullpipe.errors import Cancelled, InvalidRequest, PipelineError, Unavailable
from fullpipe.image import decode_image, decode_mask, jpeg_preview
from fullpipe.job import Job, Result, Work
from fullpipe.loop import DEVICE_LOST, Loop, Observer
from fullpipe.noise import SamplerNoise, start_noise
from fullpipe.progress import ProgressBoard
from fullpipe.samplers import REGISTERS, SAMPLERS, UNSUPPORTED, Table, build_table
from fullpipe.schedulers import SCHEDULERS, ModelSampling, calculate_sigmas
from fullpipe.text import repeat_to_same_length
from fullpipe.waiting_line import WaitingLine

log = logging.getLogger(__name__)

PREPARING_THREADS = 4
FINISHING_THREADS = 4
REMEMBERED_JOBS = 4096

NO_STEPS = Table(
    sigmas=np.zeros(0),
    matrices=np.zeros((0, REGISTERS, REGISTERS + 3)),
    noise=[],
    step_of_row=np.zeros(0, int),
    steps=0,
)

Reply = Callable[[Result | dict | PipelineError], None]


class Stages(Protocol):
    """The one-shot stages that the loop calls; each may block, none is called by the loop."""

    def encode_text(
        self, prompt: str, negative_prompt: str, clip_skip: int | None
    ) -> Mapping[str, torch.Tensor]:
        """The four tensors of `fullpipe.text.PromptEncoder.encode`."""
        ...

    def encode_images(self, images: np.ndarray) -> torch.Tensor:
        """[N, H, W, 3] uint8 → [N, 4, h, w] fp32 in the VAE's own units."""
        ...

    def decode_latents(self, latents: torch.Tensor) -> np.ndarray:
        """[N, 4, h, w] fp32 in the VAE's own units → [N, H, W, 3] uint8."""
        ...


class Pipeline:
    """Takes requests from any thread and answers each exactly once."""

    def __init__(
        self,
        config: PipelineConfig,
        unets: Sequence[Engine],
        stages: Stages,
        observer: Observer,
        lost: Callable[[], None] = lambda: None,
    ):
        """
        Args:
            unets: one for each of `config.loop.devices`; each gets a loop of its own.
            lost: is told when a GPU has failed, after which every request gets UNAVAILABLE.
        """
        self._config = config
        self._stages = stages
        self._observer = observer
        self._sampling = ModelSampling.from_scheduler_config(config.checkpoint.scheduler)
        self._latent_rgb = np.asarray(config.checkpoint.latent_rgb, dtype=np.float32)
        self._jobs: dict[str, Job] = {}
        self._ended: dict[str, str] = {}  # the newest ones: job id -> OK or the error's code
        self._guard = threading.Lock()
        self._is_closing = False
        self._is_lost = False
        self._tell_lost = lost
        self._has_step_cache = all(unet.has_shallow_pass for unet in unets)
        self._preparing = ThreadPoolExecutor(PREPARING_THREADS, "prepare")
        self._finishing = ThreadPoolExecutor(FINISHING_THREADS, "finish")
        self._drawing = ThreadPoolExecutor(1, "noise")
        self._table = functools.lru_cache(maxsize=256)(self._make_table)
        self._progress = ProgressBoard(self._jobs.get, self._preview)
        scale = config.checkpoint.vae_scale_factor
        self._line = WaitingLine()
        self._loops = [
            Loop(
                unet,
                torch.device(device),
                self._line,
                self._sampling,
                config.loop,
                native_pixels=config.defaults.height * config.defaults.width // scale**2,
                observer=observer,
                finished=lambda job: self._hand(self._finishing, self._finish, job),
                stepped=lambda job: self._progress.tell(),
                lost=self._lose,
            )
            for device, unet in zip(config.loop.devices, unets, strict=True)
        ]
        for loop in self._loops:
            loop.start()

    def call(self, inputs: Mapping[str, np.ndarray], reply: Reply) -> None:
        """Take one call of the loop model: a picture, `op=progress` or `op=cancel`.

        Never blocks. `reply` is called once, from any thread, with a Result for a picture, a
        dict for a control call, or the error.
        """
        try:
            asked = contract.parse(
                inputs,
                self._config.defaults,
                self._config.limits,
                tuple(SAMPLERS),
                SCHEDULERS,
                UNSUPPORTED,
            )
            if isinstance(asked, ProgressQuery):
                self._progress.ask(asked, reply)
            elif isinstance(asked, CancelOrder):
                reply(self._cancel(asked))
            else:
                self._submit(asked, reply)
        except Exception as error:
            self._observer.outcome(getattr(error, "code", "INTERNAL"))
            reply(_as_expected(error, "a request could not be taken"))

    def close(self) -> None:
        """Refuse new requests, answer the open ones, end all threads."""
        with self._guard:
            self._is_closing = True
        self._preparing.shutdown(cancel_futures=False)
        self._line.close()
        for loop in self._loops:
            loop.join()
        self._finishing.shutdown(cancel_futures=False)
        self._drawing.shutdown(cancel_futures=True)
        self._progress.close()

    def _lose(self) -> None:
        self._is_lost = True
        self._line.close()
        self._tell_lost()

    def _submit(self, request: Request, reply: Reply) -> None:
        if request.step_cache > 1 and not self._has_step_cache:
            raise InvalidRequest(
                f"step_cache={request.step_cache} is not served by this pipeline, allowed 1;"
                " `fullpipe assemble … --step-cache` makes one that does"
            )
        job = Job(request, self._config.limits.deadline_s, reply)
        allowed = self._config.limits.max_open_jobs
        with self._guard:
            if self._is_closing:
                raise Unavailable("the server is shutting down; try again")
            if self._is_lost:
                raise Unavailable(DEVICE_LOST)
            if len(self._jobs) >= allowed:
                raise Unavailable(f"{len(self._jobs)} jobs are open, allowed {allowed}; try later")
            if job.id in self._jobs:
                raise InvalidRequest(f"job_id={contract.shorten(job.id)} is already in use")
            self._jobs[job.id] = job
        self._observer.waiting(len(self._jobs), -1, -1)
        self._hand(self._preparing, self._prepare, job)

    def _cancel(self, order: CancelOrder) -> dict:
        job = self._jobs.get(order.job_id)
        if job is None:
            # Whoever lost the answer of a job must know whether it was made before asking again.
            outcome = self._ended.get(order.job_id)
            known = {"outcome": outcome} if outcome else {}
            return {"job_id": order.job_id, "state": "unknown", **known}
        job.cancel(Cancelled(f"job {order.job_id} was cancelled"))
        self._line.nudge()
        return {"job_id": order.job_id, "state": "cancelled"}

    def _hand(self, pool: ThreadPoolExecutor, stage: Callable[[Job], None], job: Job) -> None:
        def guarded() -> None:
            try:
                job.check_deadline()
                if job.error is not None:
                    raise job.error
                stage(job)
            except Exception as error:
                self._close_job(job, _as_expected(error, f"job {job.id} failed"))

        try:
            pool.submit(guarded)
        except RuntimeError:
            self._close_job(job, Unavailable("the server is shutting down; try again"))

    def _close_job(self, job: Job, outcome: Result | PipelineError) -> None:
        code = outcome.code if isinstance(outcome, PipelineError) else "OK"
        with self._guard:
            self._jobs.pop(job.id, None)
            self._ended[job.id] = code
            if len(self._ended) > REMEMBERED_JOBS:
                del self._ended[next(iter(self._ended))]
        self._observer.outcome(code)
        self._observer.waiting(len(self._jobs), -1, -1)
        for name, milliseconds in job.stage_ms.items():
            self._observer.stage(name, milliseconds)
        self._progress.tell()
        job.answer(outcome)

    def _prepare(self, job: Job) -> None:
        """Everything a job needs before its first step."""
        request = job.request
        latents, mask = self._start_latents(job)
        if "prompt_embeds" in request.arrays:
            encoded = {
                name: torch.from_numpy(array)
                for name, array in request.arrays.items()
                if name.endswith("_embeds")
            }
        else:
            encoded = dict(
                self._stages.encode_text(request.prompt, request.negative_prompt, request.clip_skip)
            )
            job.mark("text")
        job.work = self._work(request, encoded, latents, mask)
        job.steps = job.work.table.steps
        if job.error is not None:
            raise job.error
        job.latents = [None] * len(job.work.start)
        self._line.add(job)

    def _start_latents(self, job: Job) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Start latents [N, 4, h, w] in loop units and mask [N, 1, h, w] of a request."""
        request, facts, limits = job.request, self._config.checkpoint, self._config.limits
        scale = facts.vae_scale_factor
        arrays = request.arrays
        opened: dict[str, Any] = {
            "max_bytes": limits.max_image_bytes,
            "max_side_px": limits.max_size_px + contract.SIZE_MULTIPLE_PX - 1,
        }
        if "latents" in arrays:
            latents = torch.from_numpy(arrays["latents"].astype(np.float32))
            if latents.shape[1] != facts.latent_channels or not latents.isfinite().all():
                raise InvalidRequest(
                    f"latents has shape {list(latents.shape)}, needs"
                    f" [N, {facts.latent_channels}, h, w] and finite values"
                )
        elif request.has_start:
            if request.init_image_b64 is not None:
                pixels = decode_image(request.init_image_b64, name="init_image_b64", **opened)
            else:
                pixels = arrays["init_image"]
            pixels = _crop(pixels, contract.SIZE_MULTIPLE_PX)
            self._check_start(request, pixels.shape[2], pixels.shape[1], len(pixels))
            latents = self._stages.encode_images(pixels)
            job.mark("vae_encode")
        else:
            assert request.width is not None and request.height is not None
            latents = torch.zeros(
                1, facts.latent_channels, request.height // scale, request.width // scale
            )
        height, width = latents.shape[2:]
        self._check_start(request, width * scale, height * scale, len(latents))
        latents = latents.repeat(-(-request.batch_size // len(latents)), 1, 1, 1)

        mask = None
        if request.mask_b64 is not None:
            pixels = decode_mask(request.mask_b64, name="mask_b64", **opened)
            mask = torch.from_numpy(pixels.astype(np.float32) / 255.0)
        elif "mask" in arrays:
            mask = torch.from_numpy(arrays["mask"].astype(np.float32) / 255.0)
        elif "noise_mask" in arrays:
            mask = torch.from_numpy(arrays["noise_mask"].astype(np.float32))
            if not (mask.isfinite().all() and mask.min() >= 0 and mask.max() <= 1):
                raise InvalidRequest("noise_mask has values outside 0 … 1")
        if mask is not None:
            mask = torch.nn.functional.interpolate(mask[:, None], (height, width), mode="bilinear")
            mask = mask.repeat(-(-len(latents) // len(mask)), 1, 1, 1)[: len(latents)]
        return latents * facts.scaling_factor, mask

    def _check_start(self, request: Request, width: int, height: int, count: int) -> None:
        """The start picture decides the size; a request that also says one must agree."""
        limits = self._config.limits
        for name, got, said in (
            ("width", width, request.width),
            ("height", height, request.height),
        ):
            if said is not None and said != got:
                raise InvalidRequest(
                    f"{name}={said} but the start image has {name} {got}; make them equal or"
                    f" leave {name} out"
                )
            contract.check_size(name, got, limits)
        if count > limits.max_batch_size:
            raise InvalidRequest(f"{count} start images, allowed {limits.max_batch_size}")
        if request.batch_size > 1 and count > 1 and count != request.batch_size:
            raise InvalidRequest(
                f"batch_size={request.batch_size} but {count} start images; give one of them,"
                " equal numbers, or leave batch_size out"
            )

    def _work(
        self,
        request: Request,
        encoded: Mapping[str, torch.Tensor],
        latent_image: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> Work:
        sampler = SAMPLERS[request.sampler_name]
        count, _, height, width = latent_image.shape
        noise = mask_noise = start_noise(request.seed, count, height, width)
        if mask is not None and sampler.inpaint_seed_offset:
            seed = (request.seed + sampler.inpaint_seed_offset) % 2**64
            mask_noise = start_noise(seed, count, height, width)
        table, start, sampler_noise = NO_STEPS, latent_image, None
        if request.denoise > 0:
            sigmas, table = self._table(
                request.sampler_name, request.scheduler, request.steps, request.denoise
            )
            start = self._sampling.start(noise, latent_image, sigmas[0])
            if any(interval is not None for interval in table.noise):
                sampler_noise = SamplerNoise(
                    sampler.noise_kind,
                    request.seed,
                    tuple(noise.shape),
                    float(sigmas[sigmas > 0].min()),
                    float(sigmas.max()),
                    device=self._config.loop.devices[0],
                )
        is_guided = not math.isclose(request.cfg, 1.0) or sampler.needs_uncond
        return Work(
            embeds=self._embeds(encoded, is_guided),
            pooled=self._pooled(encoded) if self._config.checkpoint.is_sdxl else None,
            time_ids=self._time_ids(height, width) if self._config.checkpoint.is_sdxl else None,
            table=table,
            start=start,
            latent_image=latent_image,
            mask_noise=mask_noise,
            mask=mask,
            noise=sampler_noise,
            cfg=request.cfg,
            is_guided=is_guided,
            step_cache=request.step_cache,
            drawing=self._drawing if sampler_noise and sampler_noise.is_drawn_on_cpu else None,
        )

    def _make_table(
        self, sampler_name: str, scheduler: str, steps: int, denoise: float
    ) -> tuple[torch.Tensor, Table]:
        sigmas = calculate_sigmas(self._sampling, scheduler, steps, denoise, sampler_name)
        return sigmas, build_table(sampler_name, sigmas, self._sampling)

    def _embeds(self, encoded: Mapping[str, torch.Tensor], is_guided: bool) -> torch.Tensor:
        positive = encoded["prompt_embeds"].float()
        negative = encoded["negative_prompt_embeds"].float() if is_guided else positive
        width = self._config.checkpoint.embed_dim
        for name, embeds in (("prompt_embeds", positive), ("negative_prompt_embeds", negative)):
            _check_embeds(name, embeds, (1, embeds.shape[1], width))
        # Unequal lengths are repeated to a common multiple, which may be far longer than both.
        tokens = math.lcm(positive.shape[1], negative.shape[1])
        allowed = self._config.limits.max_prompt_tokens
        if tokens > allowed:
            raise InvalidRequest(
                f"prompt and negative_prompt of {positive.shape[1]} and {negative.shape[1]} tokens"
                f" make {tokens}, allowed {allowed}; shorten them or make them equally long"
            )
        return torch.cat(repeat_to_same_length(positive, negative))

    def _pooled(self, encoded: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if "pooled_prompt_embeds" not in encoded:
            raise InvalidRequest("pooled_prompt_embeds is missing; this checkpoint needs it")
        positive = encoded["pooled_prompt_embeds"].float()
        negative = encoded.get("negative_pooled_prompt_embeds", positive).float()
        shape = (1, self._config.checkpoint.pooled_dim)
        _check_embeds("pooled_prompt_embeds", positive, shape)
        _check_embeds("negative_pooled_prompt_embeds", negative, shape)
        return torch.cat([positive, negative])

    def _time_ids(self, height: int, width: int) -> torch.Tensor:
        """SDXL's size conditioning, [6]: original size, crop corner, target size, in pixels."""
        scale = self._config.checkpoint.vae_scale_factor
        size = [float(height * scale), float(width * scale)]
        return torch.tensor([*size, 0.0, 0.0, *size])

    def _finish(self, job: Job) -> None:
        """Decode and answer."""
        latents = torch.stack([latents for latents in job.latents if latents is not None])
        if not latents.isfinite().all():
            raise PipelineError(
                f"job {job.id} gave latents that are not finite; check cfg and the sampler"
            )
        latents = latents / self._config.checkpoint.scaling_factor
        images = None
        if job.request.output == "images":
            images = self._stages.decode_latents(latents)
            job.mark("vae_decode")
        self._close_job(job, Result(images, latents, self._info(job, latents)))

    def _info(self, job: Job, latents: torch.Tensor) -> dict:
        request = job.request
        scale = self._config.checkpoint.vae_scale_factor
        return {
            "job_id": job.id,
            "seed": request.seed,
            "width": latents.shape[3] * scale,
            "height": latents.shape[2] * scale,
            "batch_size": len(latents),
            "steps": request.steps,
            "cfg": request.cfg,
            "sampler_name": request.sampler_name,
            "scheduler": request.scheduler,
            "denoise": request.denoise,
            "step_cache": request.step_cache,
            "pipeline": self._config.name,
            "checkpoint": self._config.checkpoint.digest,
            "version": __version__,
            "milliseconds": {**job.stage_ms, "total": round(sum(job.stage_ms.values()), 3)},
            "mean_batch_rows": round(job.rows / job.ticks, 2) if job.ticks else 0.0,
        }

    def _preview(self, job: Job) -> str | None:
        """Base64 JPEG of the newest x0 prediction, one pixel per latent pixel."""
        if job.denoised is None:
            return None
        latent = job.denoised.permute(1, 2, 0).numpy()
        rgb = latent @ self._latent_rgb[:-1] + self._latent_rgb[-1]
        return jpeg_preview(
            ((rgb.clip(-1.0, 1.0) + 1.0) * 127.5).astype(np.uint8),
            max_side=max(latent.shape[:2]) * self._config.checkpoint.vae_scale_factor,
        )


def _check_embeds(name: str, embeds: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(embeds.shape) != shape or not embeds.isfinite().all():
        raise InvalidRequest(
            f"{name} has shape {list(embeds.shape)}, needs {list(shape)} and finite values"
        )


def _crop(pixels: np.ndarray, multiple: int) -> np.ndarray:
    """Centre crop to multiples, as ComfyUI's VAE does before encoding."""
    height, width = (side // multiple * multiple for side in pixels.shape[1:3])
    top, left = (pixels.shape[1] % multiple) // 2, (pixels.shape[2] % multiple) // 2
    return pixels[:, top : top + height, left : left + width]


def _as_expected(error: Exception, what: str) -> PipelineError:
    """Expected errors pass; anything else is logged once and answered with a generic line."""
    if isinstance(error, PipelineError):
        return error
    log.error("%s", what, exc_info=error)
    return PipelineError("the server failed on this request; its log has the cause")
