"""What breaks, breaks cleanly: killed processes, lost clients, shutdown with open requests.

The behaviour that is checked here is the one that the README promises.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from fullpipe.client import Client
from fullpipe.errors import PipelineError, Unavailable
from fullpipe.server import ServerConfig, TritonServer

pytestmark = pytest.mark.triton

RED = "a red circle on a white background"
LONG = {"prompt": RED, "steps": 150, "width": 256, "height": 256}


@pytest.fixture
def server(checkpoint, tmp_path):
    """A server of its own, because the tests break it; quiet."""
    from fullpipe.assemble import assemble

    assemble(checkpoint, tmp_path / "repository")
    settings = ServerConfig(tmp_path / "repository", http_port=0, grpc_port=0, metrics_port=0)
    with TritonServer(settings, log=lambda line: None) as running:
        yield running


class Call:
    """A request on a thread of its own, with what became of it and when."""

    def __init__(self, make):
        self.outcome = None
        self.ended = None
        self.thread = threading.Thread(target=self._run, args=(make,), daemon=True)
        self.thread.start()

    def _run(self, make):
        try:
            self.outcome = make()
        except PipelineError as error:
            self.outcome = error
        self.ended = time.monotonic()

    def wait(self, seconds):
        self.thread.join(seconds)
        assert self.ended is not None, "the request hangs"
        return self.outcome


def stub_of(server, model):
    for process in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(f"/{model}/1/model.py" in word for word in process.cmdline()):
                return process.pid
    raise AssertionError(f"{model} has no stub")


def wait_for_picture(client, wanted, seconds=120):
    limit = time.monotonic() + seconds
    while True:
        try:
            return client.generate(**wanted)
        except Unavailable:
            assert time.monotonic() < limit, "the server did not come back"
            time.sleep(0.5)


def started(client):
    """Open a plain request and a stream, and wait until the loop works on them."""
    plain = Call(lambda: client.generate(**LONG))
    stream = client.stream(**LONG)
    next(stream)
    streamed = Call(lambda: list(stream))
    return plain, streamed


@pytest.mark.parametrize("victim", ["scheduler_model", "tritonserver"])
def test_killed_process_breaks_connections_and_comes_back(server, victim):
    client = Client(server.url, timeout_s=60)
    wanted = {"prompt": RED, "seed": 7, "steps": 3}
    before = client.generate(**wanted).pixels
    calls = started(client)
    pid = server.pid if victim == "tritonserver" else stub_of(server, victim)
    family = [p.pid for p in psutil.Process(server.pid).children(recursive=True)]
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    for call in calls:
        assert isinstance(call.wait(15), Unavailable)
        assert call.ended - killed < 10
    again = wait_for_picture(client, wanted)
    assert np.array_equal(again.pixels, before)
    assert server.restarts == 1
    assert not [pid for pid in family if psutil.pid_exists(pid)], "stubs were left behind"


def test_stop_answers_open_requests_and_leaves_nothing(server):
    client = Client(server.url, timeout_s=60)
    call = Call(lambda: client.generate(RED, seed=7, steps=30))
    time.sleep(0.5)
    family = [p.pid for p in psutil.Process(server.pid).children(recursive=True)]
    shared = set(Path("/dev/shm").iterdir())
    server.stop()
    assert call.wait(5).pixels.shape == (1, 256, 256, 3)
    assert not [pid for pid in family if psutil.pid_exists(pid)], "stubs were left behind"
    left = {path for path in shared & set(Path("/dev/shm").iterdir()) if owned(path, family)}
    assert not left, f"shared memory was left behind: {left}"


def owned(path, family):
    """Whether a region belongs to the stopped server: one that nobody alive has open."""
    opened = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            opened |= {m.path for m in process.memory_maps() if m.path.startswith("/dev/shm")}
    return str(path) not in opened and path.stat().st_mtime > time.time() - 600


def test_client_lost_in_mid_stream_frees_its_slot(server):
    client = Client(server.url, timeout_s=60)
    with client.stream(**LONG) as stream:
        next(stream)
    limit = time.monotonic() + 5
    while True:
        rows = client.generate(RED, steps=2, cfg=1.0, width=256, height=256).info
        if rows["mean_batch_rows"] == 1.0:
            break
        assert time.monotonic() < limit, "the lost job still takes rows"
