"""The denoising loop: one thread that advances every image in flight, a table row per tick.

A turn is: wait for the running tick, sweep, admit, launch the next tick, settle what has ended.
Nobody waits for anybody else's whole image: a newcomer takes part in the next tick of its shape,
shapes take turns, and slots take turns where more images are in flight than rows fit into one
tick. On a GPU a tick only is queued by its launch, so that the host settles one tick while the next
one runs; elsewhere it has been run when its launch returns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import torch

from fullpipe.config import LoopSettings
from fullpipe.engines import Engine
from fullpipe.errors import PipelineError, Unavailable
from fullpipe.job import Job
from fullpipe.row_counts import RowCounts
from fullpipe.schedulers import ModelSampling
from fullpipe.slots import Group, Occupant, Shape
from fullpipe.waiting_line import WaitingLine

log = logging.getLogger(__name__)

# Groups that nobody is in, kept on a GPU for the sake of their recorded graphs.
IDLE_GROUPS = 4
DEVICE_LOST = "the GPU failed; the server has to be restarted"


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


@dataclasses.dataclass
class _Tick:
    """One launched tick: what becomes known when it has ended."""

    shape: Shape
    is_shallow: bool
    slots: int
    rows: int
    run_rows: int | None
    started: float
    steps: list[tuple[Occupant, int, torch.Tensor | None]]
    finals: list[tuple[Occupant, torch.Tensor]]
    ended: torch.cuda.Event | None = None
    seconds: float = 0.0

    def stop_clock(self) -> None:
        """Take the time; on a GPU after waiting for its end."""
        if self.ended is not None:
            self.ended.synchronize()
        self.seconds = time.perf_counter() - self.started


class Loop:
    """Runs ticks on its own thread and device for as long as there is work."""

    def __init__(
        self,
        unet: Engine,
        device: torch.device,
        line: WaitingLine,
        sampling: ModelSampling,
        settings: LoopSettings,
        native_pixels: int,
        observer: Observer,
        finished: Callable[[Job], None],
        stepped: Callable[[Job], None],
        lost: Callable[[], None],
    ):
        """
        Args:
            device: of the slots and of `unet`.
            line: where jobs wait; other loops may take from it too.
            native_pixels: latent pixels of the native size, to which `max_rows` refers.
            finished: gets each job once, with `latents` complete or `error` set.
            stepped: is told after each step of a job; must return at once.
            lost: is told when the GPU has failed; this process can't use it any more.
        """
        self._unet = unet
        self._device = device
        self._line = line
        self._number = line.join()
        self._sampling = sampling
        self._settings = settings
        self._native_pixels = native_pixels
        self._observer = observer
        self._finished = finished
        self._stepped = stepped
        self._lost = lost
        self._groups: dict[Shape, Group] = {}
        self._idle: OrderedDict[Shape, Group] = OrderedDict()
        self._running: _Tick | None = None
        self._ticks = 0
        self._row_counts = RowCounts()
        self._copies: torch.cuda.Stream | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"denoising-loop-{self._number}", daemon=True
        )

    def start(self) -> None:
        """Start the loop's thread."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread, which ends after its line is closed; jobs in it get UNAVAILABLE."""
        if self._thread.is_alive():
            self._thread.join()

    @property
    def _in_flight(self) -> int:
        return sum(len(group.taken) for group in self._groups.values())

    def _run(self) -> None:
        with self._on_device():
            while self._line.wait(has_work=bool(self._groups or self._running)):
                try:
                    self._turn()
                except torch.AcceleratorError:
                    log.exception("%s failed", self._device)
                    self._lost()
                    self._end_all(Unavailable(DEVICE_LOST))
                    return
                except Exception:
                    log.exception("the denoising loop failed outside of a tick; its jobs are ended")
                    self._end_all(PipelineError("the denoising loop failed; see the server's log"))
            self._end_all(Unavailable("the server is shutting down; try again"))

    @contextlib.contextmanager
    def _on_device(self):
        """On a GPU, a stream of the loop's own that comes before others', and one for copies."""
        if self._device.type != "cuda":
            yield
            return
        with torch.cuda.device(self._device):
            self._copies = torch.cuda.Stream()
            with torch.cuda.stream(torch.cuda.Stream(priority=-1)):
                yield

    def _turn(self) -> None:
        ended, self._running = self._running, None
        if ended is not None:
            ended.stop_clock()
        self._sweep()
        self._admit()
        launched = self._launch() if self._groups else []
        if ended is not None:
            self._settle(ended)
        for tick in launched:
            if tick.ended is not None and tick is launched[-1]:
                self._running = tick
            else:
                self._settle(tick)

    def _sweep(self) -> None:
        """Free what is cancelled, failed or too late, before any more work is put into it."""
        seated = [
            group.occupant(slot).job for group in self._groups.values() for slot in group.taken
        ]
        for job in dict.fromkeys([*self._line.jobs(), *seated]):
            job.check_deadline()
            if job.error is not None:
                self._drop(job)

    def _drop(self, job: Job) -> None:
        """Take a job out of this loop and the line, and hand it on with its error."""
        self._line.remove(job)
        for group in list(self._groups.values()):
            for slot in group.taken:
                if group.occupant(slot).job is job:
                    group.occupants[slot] = None
            self._forget_if_empty(group)
        if job.claim_end():
            self._finished(job)

    def _admit(self) -> None:
        """Oldest first, an image a slot, as long as slots are free."""
        while self._in_flight < self._settings.slots:
            entry = self._line.take(self._number, self._in_flight)
            if entry is None:
                break
            job, image = entry
            assert job.work is not None
            if "queue" not in job.stage_ms:
                job.mark("queue")
            if not len(job.work.table.sigmas):
                self._store(job, image, job.work.start[image])
                continue
            try:
                self._group_of(job).put(job, image)
            except Exception as error:
                self._fail(job, error)
                self._drop(job)
        self._report_load()

    def _group_of(self, job: Job) -> Group:
        assert job.work is not None
        height, width = job.work.start.shape[2:]
        shape = Shape(height, width, job.work.embeds.shape[1])
        if shape not in self._groups:
            group = self._idle.pop(shape, None)
            self._groups[shape] = group or Group(
                shape, self._settings.slots, self._device, self._sampling
            )
        return self._groups[shape]

    def _launch(self) -> list[_Tick]:
        """Start a tick of the shape whose turn it is; several where one failed and was split."""
        group = self._choose_group()
        return self._launch_slots(group, self._choose_slots(group))

    def _choose_group(self) -> Group:
        """The shape that has waited longest since its last tick; among equals the oldest job."""

        def waited(group: Group) -> tuple[int, float]:
            sitting = [group.occupant(slot) for slot in group.taken]
            return max(s.last_tick for s in sitting), min(s.job.arrived for s in sitting)

        return min(self._groups.values(), key=waited)

    def _choose_slots(self, group: Group) -> list[int]:
        """Slots in the order of their last tick, then of arrival, until the rows are full.

        Whoever has waited longest, a newcomer since it got its slot, comes first and decides
        whether the tick is a whole pass of the UNet or a shallow one. So nobody who is due for the
        other kind waits for more than one tick of each of those that are there.
        """

        def turn(slot: int) -> tuple[int, float, int]:
            occupant = group.occupant(slot)
            return occupant.last_tick, occupant.job.arrived, occupant.image

        shape = group.shape
        budget = self._settings.max_rows * self._native_pixels // (shape.height * shape.width)
        first = min(group.taken, key=lambda slot: (group.occupant(slot).waits_since, *turn(slot)))
        is_shallow = group.occupant(first).is_shallow
        alike = [slot for slot in group.taken if group.occupant(slot).is_shallow == is_shallow]
        waiting = sorted(alike, key=lambda slot: (slot != first, *turn(slot)))
        built = self._unet.row_counts(shape.height, shape.width, shape.tokens)
        if built:
            wanted = sum(group.occupant(slot).rows for slot in waiting)
            budget = self._row_counts.choose((shape, is_shallow), wanted, budget, built)
        chosen: list[int] = []
        for slot in waiting:
            budget -= group.occupant(slot).rows
            if chosen and budget < 0:
                break
            chosen.append(slot)
        return sorted(chosen)

    def _launch_slots(self, group: Group, slots: list[int]) -> list[_Tick]:
        """One tick; if it fails with several jobs in it, each is tried alone to spare the rest."""
        sitting = [group.occupant(slot) for slot in slots]
        is_shallow = sitting[0].is_shallow
        now = time.monotonic()
        for occupant in sitting:
            occupant.last_tick, occupant.waits_since = self._ticks, now
        self._ticks += 1
        started = time.perf_counter()
        try:
            run_rows = group.tick(slots, self._unet)
        except torch.AcceleratorError:
            raise  # nothing runs on that device any more
        except Exception as error:
            return self._isolate(group, slots, error)
        rows = sum(occupant.rows for occupant in sitting)
        for job in dict.fromkeys(occupant.job for occupant in sitting):
            job.ticks += 1
            job.rows += rows
        tick = _Tick(group.shape, is_shallow, len(slots), rows, run_rows, started, [], [])
        for slot, occupant in zip(slots, sitting, strict=True):
            step = int(occupant.work.table.step_of_row[occupant.position - 1])
            wants_preview = occupant.image == 0 and occupant.job.wants_preview
            tick.steps.append((occupant, step, group.denoised(slot) if wants_preview else None))
            if occupant.is_done:
                tick.finals.append((occupant, group.latents(slot)))
                group.occupants[slot] = None
        self._forget_if_empty(group)
        if self._device.type == "cuda":
            tick.ended = torch.cuda.Event()
            tick.ended.record()
        else:
            tick.stop_clock()
        return [tick]

    def _isolate(self, group: Group, slots: list[int], error: Exception) -> list[_Tick]:
        jobs: dict[Job, list[int]] = {}
        for slot in slots:
            jobs.setdefault(group.occupant(slot).job, []).append(slot)
        if len(jobs) == 1:
            self._fail(next(iter(jobs)), error)
            return []
        return [tick for own in jobs.values() for tick in self._launch_slots(group, own)]

    def _fail(self, job: Job, error: Exception) -> None:
        """Mark a job as failed; the cause of a surprise goes to the log, once."""
        if isinstance(error, torch.OutOfMemoryError):
            log.error("job %s: %s", job.id, str(error).splitlines()[0])
            error = Unavailable("the GPU's memory is full; ask for a smaller picture, or try later")
        elif not isinstance(error, PipelineError):
            log.error("job %s failed in the loop", job.id, exc_info=error)
            error = PipelineError("the denoising step failed; the server's log has the cause")
        job.cancel(error)

    def _settle(self, tick: _Tick) -> None:
        """Tell of the steps of an ended tick, and hand on what it has completed."""
        copying = torch.cuda.stream(self._copies) if self._copies else contextlib.nullcontext()
        with copying:
            for occupant, step, prediction in tick.steps:
                job = occupant.job
                if occupant.image == 0 and step > job.steps_done:
                    job.steps_done = step
                    if prediction is not None:
                        job.denoised = prediction.cpu()
                    self._stepped(job)
            for occupant, latents in tick.finals:
                self._store(occupant.job, occupant.image, latents.cpu())
        if tick.run_rows is not None:
            self._row_counts.saw((tick.shape, tick.is_shallow), tick.run_rows, tick.seconds)
        self._observer.tick(tick.slots, tick.rows, tick.seconds)
        self._report_load()

    def _store(self, job: Job, image: int, latents: torch.Tensor) -> None:
        if job.store(image, latents) and job.claim_end():
            job.mark("loop")
            self._finished(job)

    def _report_load(self) -> None:
        queued, in_flight = self._line.report(self._number, self._in_flight)
        self._observer.waiting(-1, queued, in_flight)

    def _forget_if_empty(self, group: Group) -> None:
        if group.taken or self._groups.pop(group.shape, None) is None:
            return
        if self._device.type == "cuda":
            self._idle[group.shape] = group
            if len(self._idle) > IDLE_GROUPS:
                self._idle.popitem(last=False)

    def _end_all(self, error: PipelineError) -> None:
        self._running = None
        seated = [
            group.occupant(slot).job for group in self._groups.values() for slot in group.taken
        ]
        for job in dict.fromkeys([*self._line.jobs(), *seated]):
            job.cancel(error)
            self._drop(job)
        self._groups.clear()
