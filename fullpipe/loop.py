"""The denoising loop: one thread that advances every image in flight, a table row per tick.

A tick is: sweep, admit, choose, run, retire. Nobody waits for anybody else's whole image: a
newcomer takes part in the next tick of its shape, shapes take turns, and slots take turns where
more images are in flight than rows fit into one tick.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from fullpipe.config import LoopSettings
from fullpipe.engines import Engine
from fullpipe.errors import PipelineError, Unavailable
from fullpipe.job import Job
from fullpipe.schedulers import ModelSampling
from fullpipe.slots import Group, Occupant, Shape

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Who is told what happens; the Triton adapter turns it into metrics."""

    def tick(self, slots: int, rows: int, seconds: float) -> None:
        """One tick ended."""

    def stage(self, name: str, milliseconds: float) -> None:
        """A job left a stage."""

    def outcome(self, code: str) -> None:
        """A job was answered: "OK" or an error code."""

    def waiting(self, open_jobs: int, queued_images: int, slots: int) -> None:
        """How much work is in the house."""


class Loop:
    """Runs ticks on its own thread for as long as there is work."""

    def __init__(
        self,
        unet: Engine,
        sampling: ModelSampling,
        settings: LoopSettings,
        native_pixels: int,
        observer: Observer,
        finished: Callable[[Job], None],
        stepped: Callable[[Job], None],
    ):
        """
        Args:
            native_pixels: latent pixels of the native size, to which `max_rows` refers.
            finished: gets each job once, with `latents` complete or `error` set.
            stepped: is told after each step of a job; must return at once.
        """
        self._unet = unet
        self._sampling = sampling
        self._settings = settings
        self._native_pixels = native_pixels
        self._observer = observer
        self._finished = finished
        self._stepped = stepped
        self._device = torch.device(settings.device)
        self._queue: deque[tuple[Job, int]] = deque()
        self._groups: dict[Shape, Group] = {}
        self._ticks = 0
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="denoising-loop", daemon=True)

    def start(self) -> None:
        """Start the loop's thread."""
        self._thread.start()

    def add(self, job: Job) -> None:
        """Queue a prepared job; every image of it takes a slot of its own."""
        assert job.work is not None
        job.latents = [None] * len(job.work.start)
        with self._wake:
            self._queue.extend((job, image) for image in range(len(job.latents)))
            self._wake.notify()

    def nudge(self) -> None:
        """Have cancelled jobs swept now rather than at the next tick."""
        with self._wake:
            self._wake.notify()

    def close(self) -> None:
        """End the thread; jobs still in it are finished with UNAVAILABLE."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def _in_flight(self) -> int:
        return sum(len(group.taken) for group in self._groups.values())

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or self._queue or self._groups):
                    self._wake.wait()
                if self._closing:
                    break
            try:
                self._turn()
            except Exception:
                log.exception("the denoising loop failed outside of a tick; its jobs are ended")
                self._finish_all(PipelineError("the denoising loop failed; the log has the cause"))
        self._finish_all(Unavailable("the server is shutting down; try again"))

    def _turn(self) -> None:
        self._sweep()
        self._admit()
        if self._groups:
            group = self._choose_group()
            self._run_tick(group, self._choose_slots(group))
            self._retire(group)

    def _sweep(self) -> None:
        """Free what is cancelled, failed or too late, before any more work is put into it."""
        with self._wake:
            queued = [job for job, _ in self._queue]
        seated = [
            group.occupant(slot).job for group in self._groups.values() for slot in group.taken
        ]
        ended = []
        for job in dict.fromkeys([*queued, *seated]):
            job.check_deadline()
            if job.error is not None:
                ended.append(job)
        for job in ended:
            self._drop(job)
            self._finished(job)

    def _drop(self, job: Job) -> None:
        with self._wake:
            self._queue = deque(entry for entry in self._queue if entry[0] is not job)
        for group in list(self._groups.values()):
            for slot in group.taken:
                if group.occupant(slot).job is job:
                    group.occupants[slot] = None
            self._forget_if_empty(group)

    def _admit(self) -> None:
        """Oldest first, an image a slot, as long as slots are free."""
        free = self._settings.slots - self._in_flight
        while free > 0:
            with self._wake:
                if not self._queue:
                    break
                job, image = self._queue.popleft()
            assert job.work is not None
            if "queue" not in job.stage_ms:
                job.mark("queue")
            if not len(job.work.table.sigmas):
                job.latents[image] = job.work.start[image]
                self._finish_if_complete(job)
                continue
            height, width = job.work.start.shape[2:]
            shape = Shape(height, width, job.work.embeds.shape[1])
            if shape not in self._groups:
                self._groups[shape] = Group(
                    shape, self._settings.slots, self._device, self._sampling
                )
            try:
                self._groups[shape].put(job, image)
                free -= 1
            except Exception as error:
                self._fail(job, error)
                self._drop(job)
                self._finished(job)
        self._observer.waiting(-1, len(self._queue), self._in_flight)

    def _choose_group(self) -> Group:
        """The shape that has waited longest since its last tick; among equals the oldest job."""

        def waited(group: Group) -> tuple[int, float]:
            sitting = [group.occupant(slot) for slot in group.taken]
            return max(s.last_tick for s in sitting), min(s.job.arrived for s in sitting)

        return min(self._groups.values(), key=waited)

    def _choose_slots(self, group: Group) -> list[int]:
        """Slots in the order of their last tick, then of arrival, until the rows are full."""

        def turn(slot: int) -> tuple[int, float, int]:
            occupant = group.occupant(slot)
            return occupant.last_tick, occupant.job.arrived, occupant.image

        shape = group.shape
        budget = self._settings.max_rows * self._native_pixels // (shape.height * shape.width)
        chosen: list[int] = []
        for slot in sorted(group.taken, key=turn):
            budget -= _rows(group.occupant(slot))
            if chosen and budget < 0:
                break
            chosen.append(slot)
        return sorted(chosen)

    def _run_tick(self, group: Group, slots: list[int]) -> None:
        """One tick; if it fails with several jobs in it, each is tried alone to spare the rest."""
        sitting = [group.occupant(slot) for slot in slots]
        for occupant in sitting:
            occupant.last_tick = self._ticks
        self._ticks += 1
        started = time.perf_counter()
        try:
            denoised = group.tick(slots, self._unet)
        except Exception as error:
            self._isolate(group, slots, error)
            return
        rows = sum(_rows(occupant) for occupant in sitting)
        for job in dict.fromkeys(occupant.job for occupant in sitting):
            job.ticks += 1
            job.rows += rows
        for occupant, prediction in zip(sitting, denoised, strict=True):
            self._report_step(occupant, prediction)
        self._observer.tick(len(slots), rows, time.perf_counter() - started)

    def _isolate(self, group: Group, slots: list[int], error: Exception) -> None:
        jobs: dict[Job, list[int]] = {}
        for slot in slots:
            jobs.setdefault(group.occupant(slot).job, []).append(slot)
        if len(jobs) == 1:
            self._fail(next(iter(jobs)), error)
            return
        for own in jobs.values():
            self._run_tick(group, own)

    def _fail(self, job: Job, error: Exception) -> None:
        """Mark a job as failed; the cause of a surprise goes to the log, once."""
        if not isinstance(error, PipelineError):
            log.error("job %s failed in the loop", job.id, exc_info=error)
            error = PipelineError("the denoising step failed; the server's log has the cause")
        job.cancel(error)

    def _report_step(self, occupant: Occupant, prediction: torch.Tensor) -> None:
        job = occupant.job
        assert job.work is not None
        step = int(job.work.table.step_of_row[occupant.position - 1])
        if occupant.image == 0 and step > job.steps_done:
            job.steps_done = step
            if job.wants_preview:
                job.denoised = prediction.to("cpu", copy=True)
            self._stepped(job)

    def _retire(self, group: Group) -> None:
        for slot in group.taken:
            occupant = group.occupant(slot)
            job = occupant.job
            assert job.work is not None
            if occupant.position == len(job.work.table.sigmas):
                job.latents[occupant.image] = group.latents(slot)
                group.occupants[slot] = None
                self._finish_if_complete(job)
        self._forget_if_empty(group)
        self._observer.waiting(-1, -1, self._in_flight)

    def _finish_if_complete(self, job: Job) -> None:
        if all(latents is not None for latents in job.latents):
            job.mark("loop")
            self._finished(job)

    def _forget_if_empty(self, group: Group) -> None:
        if not group.taken:
            self._groups.pop(group.shape, None)

    def _finish_all(self, error: PipelineError) -> None:
        with self._wake:
            jobs = dict.fromkeys(job for job, _ in self._queue)
            self._queue.clear()
        for group in self._groups.values():
            jobs.update(dict.fromkeys(group.occupant(slot).job for slot in group.taken))
        self._groups.clear()
        for job in jobs:
            job.cancel(error)
            self._finished(job)


def _rows(occupant: Occupant) -> int:
    assert occupant.job.work is not None
    return 2 if occupant.job.work.is_guided else 1
