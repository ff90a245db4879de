"""What the comparison of batching stands on: equal traces, static batches that are static."""

from __future__ import annotations

import threading

import pytest
import torch

from bench.continuous import Arrival, Batcher, FixedBatch, largest_batch, make_trace
from fullpipe.config import LoopSettings
from fullpipe.engines import Engine


class Counted(Engine):
    """A real engine that remembers how many rows each call had."""

    def __init__(self, unet):
        self._unet = unet
        self.rows: list[int] = []

    def run(self, tensors):
        self.rows.append(len(tensors["sample"]))
        return self._unet.run(tensors)


def rows(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "sample": torch.randn(count, 4, 8, 8, generator=generator),
        "timestep": torch.randint(0, 1000, (count,), generator=generator),
        "encoder_hidden_states": torch.randn(count, 77, 128, generator=generator),
    }


def test_a_static_batch_keeps_its_rows_and_its_results(demo_unet):
    counted = Counted(demo_unet)
    batch = FixedBatch(counted)
    batch.reset(is_fixed=True)
    batch.run(rows(6))
    fewer = batch.run(rows(2))["noise_pred"]
    batch.reset(is_fixed=False)
    batch.run(rows(6))
    exact = batch.run(rows(2))["noise_pred"]
    assert counted.rows == [6, 6, 6, 2]
    torch.testing.assert_close(fewer, exact, atol=1e-5, rtol=0)


def test_a_trace_has_the_same_requests_at_every_rate():
    slow, fast = make_trace(40, rate=1.0), make_trace(40, rate=10.0)
    assert [a.inputs for a in slow] == [a.inputs for a in fast]
    for one, ten in zip(slow, fast, strict=True):
        assert one.at == pytest.approx(10 * ten.at)
    assert len({a.size for a in slow}) == 3 and len({a.inputs["steps"] for a in slow}) == 4


def test_batches_are_of_one_size_and_oldest_first():
    sizes = ["a", "a", "b", "a", "b", "b"]
    trace = [Arrival(n, (ord(size), 0), {"n": n}) for n, size in enumerate(sizes)]
    entered, go = threading.Event(), threading.Event()
    batches = []

    def run(batch):
        batches.append([arrival.inputs["n"] for arrival in batch])
        entered.set()
        go.wait(10)

    batcher = Batcher(run, lambda size: 2)
    batcher.add(trace[0])
    assert entered.wait(10)  # the first runs alone: nothing waits for a batch to fill
    for arrival in trace[1:]:
        batcher.add(arrival)
    go.set()
    batcher.finish()
    assert batches == [[0], [1, 3], [2, 4], [5]]


def test_a_batch_that_fails_fails_the_benchmark():
    def run(batch):
        raise ValueError("as it happens")

    batcher = Batcher(run, lambda size: 1)
    batcher.add(Arrival(0.0, (8, 8), {}))
    with pytest.raises(ValueError, match="as it happens"):
        batcher.finish()


def test_the_largest_batch_is_what_the_loop_puts_into_a_call():
    loop = LoopSettings(max_rows=16, slots=32)
    assert largest_batch(loop, 128 * 128, (128, 128)) == 8
    assert largest_batch(loop, 128 * 128, (64, 64)) == 32
