"""Recording CUDA graphs, as far as a machine without a GPU can tell."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from types import SimpleNamespace

import torch

from fullpipe import graphs


def test_one_thread_records_at_a_time_with_a_stand_in_for_cuda(monkeypatch):
    inside, most, collecting = [], [], []

    @contextlib.contextmanager
    def graph(recorded, *, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        yield

    def run():
        inside.append(None)
        most.append(len(inside))
        collecting.append(gc.isenabled())
        time.sleep(0.002)
        inside.pop()
        return ["output"]

    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(graphs.record(run))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert answers == [("graph", ["output"])] * 4
    assert len(most) == 4 * (graphs.WARM_UP_RUNS + 1)
    assert set(most) == {1}
    recorded = graphs.WARM_UP_RUNS
    assert not any(collecting[recorded :: recorded + 1]), "garbage was collected while recording"
    assert gc.isenabled()
