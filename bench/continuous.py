"""Continuous batching against one request at a time and against static batches, same everything.

The numbers matter because batching decides what a shared server is worth: a static batch answers
nobody before its slowest member is done, and who comes a moment too late waits for the whole of
it. All four ways run in this process over the same loop, UNet and VAE, on the same Poisson trace
of pictures with different sizes, samplers and step counts:

* continuous: each request goes to the loop when it arrives;
* static: a batcher takes the oldest waiting request and all of its size, at most as many as the
  loop would put into one UNet call, and runs the whole batch to its slowest member's end. It never
  waits for a batch to fill;
* early exit: the same, but members that are done leave their rows empty, which a pipeline called
  with a batch cannot do; the batch is still answered, and followed by the next, as a whole;
* one at a time: the same with a largest batch of one.

Sizes are small because on 2 CPU cores a 256x256 picture keeps both cores busy by itself; there,
as with large pictures on a GPU, batching brings little but not waiting.

    python -m bench.continuous [--count 96] [--loads 0.5 0.75 0.95]
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch

from bench.record import spread, store
from bench.served import CHECKPOINT, prompts
from fullpipe.assemble import assemble
from fullpipe.config import LoopSettings
from fullpipe.engines import Engine
from fullpipe.engines.torch_engine import TorchUNet
from fullpipe.local import LocalPipeline, Silent
from fullpipe.stages import LocalStages

SIZES = ((128, 128), (128, 96), (96, 96))
STEPS = (4, 8, 20, 30)
SAMPLERS = ("euler", "euler_ancestral", "dpmpp_2m", "ddim")
TRACE_SEED = 20
POLICIES = ("continuous", "static", "early_exit", "one_at_a_time")
AT_ONCE = 1000.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=96, help="requests of the trace")
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[0.5, 0.75, 0.95], help="parts of the capacity"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = assemble(CHECKPOINT, Path(folder) / "repository")
    # Rows of a tick are counted at the native size, here the largest of the trace.
    native = dataclasses.replace(config.defaults, width=SIZES[0][0], height=SIZES[0][1])
    config = dataclasses.replace(config, defaults=native, loop=LoopSettings())
    unet, stages = FixedBatch(TorchUNet(CHECKPOINT / "unet")), LocalStages(CHECKPOINT)

    def run(policy: str, count: int, rate: float) -> dict:
        trace, ticks = make_trace(count, rate), Ticks()
        with LocalPipeline(config, [unet], stages, ticks) as pipeline:
            player = Player(pipeline, unet, config.loop, native.width * native.height)
            player.replay(trace, policy)
        return {**summary(trace), "useful_rows_per_tick": ticks.rows_per_tick()}

    run("continuous", 8, rate=AT_ONCE)
    at_once = {policy: run(policy, arguments.count, AT_ONCE) for policy in POLICIES}
    capacity = at_once["continuous"]["images_per_second"]
    loads = []
    for part in arguments.loads:
        ways = {policy: run(policy, arguments.count, part * capacity) for policy in POLICIES}
        loads.append({"offered_per_second": round(part * capacity, 3), "load": part, **ways})
        print(loads[-1], flush=True)
    store(
        "continuous",
        {
            "trace": f"{arguments.count} requests, sizes {[f'{w}x{h}' for w, h in SIZES]}, steps"
            f" {list(STEPS)}, samplers {list(SAMPLERS)}, cfg 8, Poisson arrivals",
            "largest_batch": largest_batch(config.loop, native.width * native.height, SIZES[0]),
            "images_per_second_all_at_once": {
                policy: measured["images_per_second"] for policy, measured in at_once.items()
            },
            "loads": loads,
            "continuous_over_at_the_highest_load": {
                policy: compare(loads[-1], policy) for policy in POLICIES[1:]
            },
        },
    )


@dataclasses.dataclass
class Arrival:
    """One request of a trace and what became of it; times in seconds since the trace began."""

    at: float
    size: tuple[int, int]
    inputs: dict
    first_step: float | None = None
    answered: float | None = None


def make_trace(count: int, rate: float) -> list[Arrival]:
    """Requests whose kinds are always the same; `rate` of them arrive a second on average."""
    rng = random.Random(TRACE_SEED)
    arrivals, at = [], 0.0
    for seed, prompt in zip(range(count), prompts(), strict=False):
        size = rng.choice(SIZES)
        inputs = {
            "prompt": prompt,
            "seed": seed,
            "job_id": f"{seed}",
            "width": size[0],
            "height": size[1],
            "steps": rng.choice(STEPS),
            "sampler_name": rng.choice(SAMPLERS),
        }
        arrivals.append(Arrival(at, size, inputs))
        at += rng.expovariate(rate)
    return arrivals


def largest_batch(loop: LoopSettings, native_pixels: int, size: tuple[int, int]) -> int:
    """Guided pictures of this size that the loop puts into one UNet call."""
    return min(loop.slots, loop.max_rows * native_pixels // (size[0] * size[1]) // 2)


class FixedBatch(Engine):
    """An engine whose calls stay as large as the largest since `reset`: static batches."""

    def __init__(self, unet: Engine):
        self._unet = unet
        self._rows = 0
        self.is_fixed = False

    def reset(self, is_fixed: bool) -> None:
        """Forget the last batch; `is_fixed` is False for batches that may shrink."""
        self._rows, self.is_fixed = 0, is_fixed

    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Engine`; rows of members that are done are computed and thrown away."""
        rows = len(tensors["sample"])
        self._rows = max(self._rows, rows)
        if not self.is_fixed or rows == self._rows:
            return self._unet.run(tensors)
        again = torch.arange(self._rows) % rows
        padded = {name: tensor[again] for name, tensor in tensors.items()}
        return {"noise_pred": self._unet.run(padded)["noise_pred"][:rows]}


class Player:
    """Sends traces to a pipeline in real time, by one of the policies."""

    def __init__(
        self, pipeline: LocalPipeline, unet: FixedBatch, loop: LoopSettings, native_pixels: int
    ):
        self._pipeline = pipeline
        self._unet = unet
        self._loop = loop
        self._native_pixels = native_pixels
        self._began = 0.0

    def replay(self, trace: list[Arrival], policy: str) -> None:
        """Send every request when it arrives, and wait for all answers."""
        self._unet.reset(is_fixed=False)
        self._began = time.perf_counter()
        batcher = (
            None
            if policy == "continuous"
            else Batcher(lambda b: self._batch(b, policy), self._largest(policy))
        )
        futures = []
        for arrival in trace:
            time.sleep(max(0.0, arrival.at - self._now()))
            if batcher is None:
                future = self._start(arrival)
                future.add_done_callback(lambda _, arrival=arrival: self._answered(arrival))
                futures.append(future)
            else:
                batcher.add(arrival)
        for future in futures:
            future.result()
        if batcher is not None:
            batcher.finish()

    def _largest(self, policy: str) -> Callable[[tuple[int, int]], int]:
        if policy == "one_at_a_time":
            return lambda size: 1
        return lambda size: largest_batch(self._loop, self._native_pixels, size)

    def _batch(self, batch: list[Arrival], policy: str) -> None:
        self._unet.reset(is_fixed=policy == "static")
        futures = [self._start(arrival) for arrival in batch]
        for future in futures:
            future.result()
        for arrival in batch:
            self._answered(arrival)

    def _start(self, arrival: Arrival) -> Future:
        answer = self._pipeline.submit(**arrival.inputs)
        watch_first_step(self._pipeline, arrival, self._now)
        return answer

    def _answered(self, arrival: Arrival) -> None:
        arrival.answered = self._now()
        if arrival.first_step is None:
            arrival.first_step = arrival.answered

    def _now(self) -> float:
        return time.perf_counter() - self._began


class Batcher:
    """Static batches: the next one starts when all of the last one are done."""

    def __init__(
        self,
        run: Callable[[list[Arrival]], None],
        largest: Callable[[tuple[int, int]], int],
    ):
        self._run_batch = run
        self._largest = largest
        self._waiting: deque[Arrival] = deque()
        self._changed = threading.Condition()
        self._is_last = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def add(self, arrival: Arrival) -> None:
        with self._changed:
            self._waiting.append(arrival)
            self._changed.notify()

    def finish(self) -> None:
        """Wait until all are answered; raises what one of them raised."""
        with self._changed:
            self._is_last = True
            self._changed.notify()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while batch := self._next():
            try:
                self._run_batch(batch)
            except BaseException as error:
                self._error = error
                return

    def _next(self) -> list[Arrival]:
        with self._changed:
            while not self._waiting:
                if self._is_last:
                    return []
                self._changed.wait()
            size = self._waiting[0].size
            batch = [a for a in self._waiting if a.size == size][: self._largest(size)]
            for arrival in batch:
                self._waiting.remove(arrival)
            return batch


def watch_first_step(pipeline: LocalPipeline, arrival: Arrival, now: Callable[[], float]) -> None:
    """Note when the first step of a submitted request is done."""

    def told(answer: Future) -> None:
        if answer.exception() is not None or answer.result()["state"] == "unknown":
            return  # it has ended, which its answer tells
        if answer.result()["step"] < 1:
            ask()
        elif arrival.first_step is None:
            arrival.first_step = now()

    def ask() -> None:
        query = {"op": "progress", "job_id": arrival.inputs["job_id"], "since": 0}
        pipeline.submit(**query, wait_ms=10_000).add_done_callback(told)

    ask()


def summary(trace: list[Arrival]) -> dict:
    """Throughput from the first arrival to the last answer, and waits from each arrival on."""
    assert all(arrival.answered is not None for arrival in trace)
    return {
        "images_per_second": round(len(trace) / max(a.answered for a in trace), 3),
        **spread([a.answered - a.at for a in trace]),
        "first_step": spread([a.first_step - a.at for a in trace]),
        "mean_ms": round(1e3 * statistics.mean(a.answered - a.at for a in trace), 1),
    }


def compare(load: dict, other: str) -> dict:
    """Continuous over another way: throughput above 1 and times below 1 are better."""
    ours, theirs = load["continuous"], load[other]
    return {
        "images_per_second": round(ours["images_per_second"] / theirs["images_per_second"], 3),
        "p50_ms": round(ours["p50_ms"] / theirs["p50_ms"], 3),
        "p99_ms": round(ours["p99_ms"] / theirs["p99_ms"], 3),
        "first_step_p50_ms": round(
            ours["first_step"]["p50_ms"] / theirs["first_step"]["p50_ms"], 3
        ),
    }


class Ticks(Silent):
    """Counts the ticks of a loop and their rows."""

    def __init__(self) -> None:
        self._ticks = self._rows = 0

    def tick(self, slots: int, rows: int, seconds: float) -> None:
        """See `Observer`."""
        self._ticks += 1
        self._rows += rows

    def rows_per_tick(self) -> float:
        return round(self._rows / self._ticks, 2)


if __name__ == "__main__":
    main()
