"""CUDA graphs: recorded at first use, replayed with one copy of what is new and one launch.

A graph replays the same kernels on the same addresses (cf. "Constraints" in PyTorch's CUDA graph
notes). So a tick reads its seats from a tensor that stays, and everything else from the slot
tensors; who takes part is decided by what is copied into the seats before a replay. A function of
tensors gets its arguments in the same way.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

WARM_UP_RUNS = 2
# Starting a recording synchronises the device, and the first run of a kernel loads it: either ends
# a recording that another thread has begun.
_recording = threading.Lock()


def record(run: Callable[[], Any], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Warm up and record on the current stream, which must not be the default one.

    Other threads of this process go on using the GPU meanwhile; those that record wait.

    Args:
        run: only queues work there.
        pool: of memory, shared with graphs that never run at the same time; None for a new one.
    Returns:
        The graph, and what `run` gave: tensors that every replay fills anew.
    """
    with _recording:
        for _ in range(WARM_UP_RUNS):
            run()
        stream = torch.cuda.current_stream()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (
            _no_collection(),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            outputs = run()
    return graph, outputs


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Collect Python's garbage before, not meanwhile: CUDA may refuse to free what is in it."""
    gc.collect()
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


class TickGraphs:
    """The graphs of one group of slots; they share one pool of memory, as one runs at a time."""

    def __init__(self, device: torch.device):
        self.are_possible = device.type == "cuda"
        self._device = device
        self._recorded: dict[Hashable, _Recorded] = {}
        self._pool: Any = None

    def forget(self) -> None:
        """Drop the graphs, because a tensor that they read has been replaced.

        Their memory is not recorded into again: once its last graph is gone, torch takes it back.
        """
        self._recorded.clear()
        self._pool = None

    def replay(
        self,
        key: Hashable,
        packed: torch.Tensor,
        empty: Callable[[], torch.Tensor],
        tick: Callable[[torch.Tensor], None],
    ) -> None:
        """Run a tick for these seats, on the current stream, which must not be the default one.

        The tick before must be over, because its seats are overwritten.

        Args:
            key: what makes two ticks the same work but for their seats.
            packed: the seats, int64 on the CPU, always of the same length for a key.
            empty: makes seats of that length that are all empty. The first tick of a key runs with
                these, twice to warm up and once to be recorded, so that nobody moves.
            tick: the work, given the seats on the device.
        """
        recorded = self._recorded.get(key)
        if recorded is None:
            recorded = self._recorded[key] = self._record(empty(), tick)
        recorded.staging.copy_(packed)
        recorded.seats.copy_(recorded.staging, non_blocking=True)
        recorded.graph.replay()

    def _record(self, packed: torch.Tensor, tick: Callable[[torch.Tensor], None]) -> _Recorded:
        staging, seats = packed.pin_memory(), packed.to(self._device)
        graph, _ = record(lambda: tick(seats), self._pool)
        self._pool = graph.pool()
        return _Recorded(staging, seats, graph)


class _Recorded(NamedTuple):
    """One graph, the seats that it reads, and the pinned memory in which the host writes them."""

    staging: torch.Tensor
    seats: torch.Tensor
    graph: torch.cuda.CUDAGraph


class CallGraphs:
    """Functions of tensors as graphs, for any number of threads; the least used goes first."""

    def __init__(self, device: torch.device, most: int):
        """`most`: graphs that are kept, each with memory of its own for what it works with."""
        self._device = device
        self._most = most
        self._stream = torch.cuda.Stream(device)
        self._recorded: OrderedDict[Hashable, _RecordedCall] = OrderedDict()
        self._turn = threading.Lock()

    def call(
        self,
        key: Hashable,
        inputs: Sequence[torch.Tensor],
        run: Callable[..., Sequence[torch.Tensor | None]],
    ) -> list[torch.Tensor | None]:
        """`run(*inputs)`, recorded at the first call of a key.

        Args:
            key: what makes two calls the same work but for the values of their inputs: their
                shapes and dtypes, and whatever else `run` decides by.
            inputs: on any device.
            run: only queues work, on inputs on the graphs' device; what it gives may hold None.
        Returns:
            What `run` gave, tensors on the graphs' device of their own, ready for the caller's
            stream there.
        """
        caller = torch.cuda.current_stream(self._device)
        with self._turn, torch.cuda.stream(self._stream):
            self._stream.wait_stream(caller)
            recorded = self._recorded.get(key) or self._record(key, inputs, run)
            self._recorded.move_to_end(key)
            for kept, given in zip(recorded.inputs, inputs, strict=True):
                kept.copy_(given)
            recorded.graph.replay()
            outputs = [None if out is None else out.clone() for out in recorded.outputs]
        caller.wait_stream(self._stream)
        for out in outputs:
            if out is not None:
                out.record_stream(caller)
        return outputs

    def _record(
        self,
        key: Hashable,
        inputs: Sequence[torch.Tensor],
        run: Callable[..., Sequence[torch.Tensor | None]],
    ) -> _RecordedCall:
        kept = [tensor.to(self._device, copy=True) for tensor in inputs]
        graph, outputs = record(lambda: run(*kept))
        if len(self._recorded) == self._most:  # nothing runs any more: recording has waited
            self._recorded.popitem(last=False)
        recorded = self._recorded[key] = _RecordedCall(graph, kept, outputs)
        return recorded


class _RecordedCall(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    outputs: Sequence[torch.Tensor | None]
