"""One request in flight: what it asked for, what it holds, what became of it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np
import torch

from fullpipe.contract import Request
from fullpipe.errors import PipelineError, Unavailable
from fullpipe.noise import SamplerNoise
from fullpipe.samplers import Table


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished job hands back.

    Attributes:
        images: [N, H, W, 3] uint8, or None when latents were asked for.
        latents: [N, 4, h, w] fp32 in the VAE's own units, on the CPU.
        info: what `info` reports.
    """

    images: np.ndarray | None
    latents: torch.Tensor
    info: dict


@dataclasses.dataclass
class Work:
    """What the loop needs of a job; made beside the loop, owned by the loop's thread after that.

    Attributes:
        embeds: [2, L, C] fp32, positive and negative.
        pooled: [2, P] fp32 for SDXL, else None.
        time_ids: [6] fp32 for SDXL, else None.
        table: the sampler's rows.
        start: [N, 4, h, w] fp32, the first sample.
        latent_image: [N, 4, h, w] fp32 in loop units.
        mask_noise: [N, 4, h, w] fp32, what the kept part of a masked image is noised with.
        mask: [N, 1, h, w] fp32, 1 = repaint, or None.
        noise: draws the sampler's own noise, or None for a deterministic table.
        is_guided: whether rows of the negative half are evaluated.
        step_cache: at every so many table rows the whole UNet runs, at the others a shallow pass.
        drawing: where the next noise is drawn while the loop runs a tick; None draws it when asked.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None
    time_ids: torch.Tensor | None
    table: Table
    start: torch.Tensor
    latent_image: torch.Tensor
    mask_noise: torch.Tensor
    mask: torch.Tensor | None
    noise: SamplerNoise | None
    cfg: float
    is_guided: bool
    step_cache: int = 1
    drawing: Executor | None = None

    def __post_init__(self) -> None:
        self._guard = threading.Lock()  # images of one job may sit in different loops
        self._drawn: dict[int, torch.Tensor] = {}
        self._takers: dict[int, int] = {}
        self._next_draw = 0

    def noise_at(self, position: int, image: int) -> torch.Tensor:
        """Sampler noise [4, h, w] of one image at one table row.

        A generator yields its draws in the table's order and for the whole batch at once, while
        images of one job may advance in different ticks: draws wait here until `release_noise`.
        """
        assert self.noise is not None
        self._draw(position)
        with self._guard:
            return self._drawn[position][image]

    def _draw(self, position: int) -> None:
        """Draw up to this row, once; whoever asks meanwhile waits."""
        assert self.noise is not None
        with self._guard:
            while self._next_draw <= position:
                interval = self.table.noise[self._next_draw]
                if interval is not None:
                    self._drawn[self._next_draw] = self.noise.draw(interval)
                    self._takers[self._next_draw] = len(self.start)
                self._next_draw += 1

    def release_noise(self, position: int) -> None:
        """One more image is past this row; the draw goes when all are, and the next is drawn."""
        with self._guard:
            if position in self._takers:
                self._takers[position] -= 1
                if not self._takers[position]:
                    del self._takers[position], self._drawn[position]
        if (
            self.drawing is not None
            and self.noise is not None
            and position + 1 < len(self.table.sigmas)
        ):
            with contextlib.suppress(RuntimeError):  # the server is shutting down
                self.drawing.submit(self._draw, position + 1)


class Job:
    """A request from its arrival to its one answer.

    Threads: `cancel`, `store` and `claim_end` may be called from anywhere; everything else belongs
    to whoever holds the job: first a preparing thread, then the loops, then a finishing thread.
    """

    def __init__(
        self,
        request: Request,
        deadline_s: float,
        reply: Callable[[Result | PipelineError], None],
    ):
        self.request = request
        self.id = request.job_id
        self.arrived = time.monotonic()
        self.deadline = self.arrived + deadline_s
        self.stage_ms: dict[str, float] = {}
        self.work: Work | None = None
        self.latents: list[torch.Tensor | None] = []
        self.steps = request.steps
        self.steps_done = 0
        self.ticks = 0
        self.rows = 0
        self.wants_preview = False
        self.denoised: torch.Tensor | None = None
        self.error: PipelineError | None = None
        self._reply = reply
        self._marked = self.arrived
        self._guard = threading.Lock()
        self._has_left = False

    def cancel(self, error: PipelineError) -> None:
        """Ask for an early end; whoever holds the job answers it with `error` next."""
        if self.error is None:
            self.error = error

    def store(self, image: int, latents: torch.Tensor) -> bool:
        """Keep the latents of one image; whether they were the last that was missing."""
        with self._guard:
            self.latents[image] = latents
            return all(latents is not None for latents in self.latents)

    def claim_end(self) -> bool:
        """True for whoever asks first: that one hands the job on from the loops."""
        with self._guard:
            is_first, self._has_left = not self._has_left, True
            return is_first

    def check_deadline(self) -> None:
        """Cancel the job when its time is over."""
        if time.monotonic() > self.deadline:
            limit = self.deadline - self.arrived
            self.cancel(Unavailable(f"not finished within the deadline of {limit:g} s"))

    def mark(self, stage: str) -> None:
        """Book the time since the last mark to `stage`, in milliseconds."""
        now = time.monotonic()
        self.stage_ms[stage] = round((now - self._marked) * 1e3, 3)
        self._marked = now

    def answer(self, outcome: Result | PipelineError) -> None:
        """Send the one answer."""
        self._reply(outcome)
