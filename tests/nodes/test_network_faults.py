"""What docs/comfyui.md promises for every way in which a network or a server can fail."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import urllib.request

import numpy as np
import pytest
from graphs import Graph, Run, full_pipeline, node_of, pipeline_inputs, server_inputs

pytestmark = [pytest.mark.comfyui, pytest.mark.triton]

LONG = {"steps": 150, "width": 256, "height": 256}
TRANSPORTS = pytest.mark.parametrize("server", ["default", "streaming"])
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbusy"


class Outcomes:
    """How many requests the loop has answered since, by outcome."""

    def __init__(self, triton):
        self._triton = triton
        self._before = self._read()
        while True:  # what was answered a moment ago may not be published yet
            time.sleep(0.4)
            before, self._before = self._before, self._read()
            if before == self._before and not before["open"]:
                break

    def wait(self, **expected: int) -> None:
        """Until the counts are as expected and nothing is open; they must not go beyond."""
        until = time.monotonic() + 20
        while True:
            now = self._read()
            counts = {code: now.get(code, 0) - self._before.get(code, 0) for code in expected}
            if counts == expected and not now["open"]:
                return
            assert time.monotonic() < until, (counts, now)
            time.sleep(0.1)

    def _read(self) -> dict[str, float]:
        text = urllib.request.urlopen(self._triton.metrics_url, timeout=10).read().decode()
        found: dict[str, float] = {"open": 0.0}
        for line in text.splitlines():
            if 'pipeline="full_pipeline"' not in line:
                continue
            if line.startswith("fullpipe_requests_total"):
                found[line.split('outcome="')[1].split('"')[0]] = float(line.split()[-1])
            elif line.startswith("fullpipe_open_jobs"):
                found["open"] = float(line.split()[-1])
        return found


@pytest.fixture
def outcomes(triton) -> Outcomes:
    """Counts of the server's answers."""
    return Outcomes(triton)


def fresh(server: str, **changed) -> dict:
    """A workflow that no cache knows."""
    return full_pipeline(server, **{"seed": time.monotonic_ns() % 2**32, **changed})


@TRANSPORTS
def test_refused(comfy, network, server):
    network.refuse()
    run = Run(comfy, fresh(server))
    message = run.fail()
    assert network.url in message and "'full_pipeline" in message
    assert "refused the connection; start the server" in message
    assert [text for text in run.texts() if "(2 of 2)" in text], "the repeats are not shown"
    assert run.seconds < 10


@TRANSPORTS
def test_refused_at_first(comfy, network, outcomes, server):
    network.refuse()
    run = Run(comfy, fresh(server))
    run.until("text")
    network.restore()
    run.succeed()
    outcomes.wait(OK=1)


def test_an_address_that_takes_no_connections(comfy):
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(2):  # nobody accepts these, and the queue has room for no more
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        graph = Graph()
        address = "http://{}:{}".format(*full.getsockname())
        inputs = server_inputs("default", address=address, retries=0, connect_timeout_s=1.0)
        choice = graph.add("TritonServer", **inputs)
        node = graph.add("TritonFullPipeline", **pipeline_inputs(seed=1, server=[choice, 0]))
        run = Run(comfy, graph.save(node))
        assert "did not take the connection within 1 s" in run.fail()
        assert run.seconds < 8


@TRANSPORTS
def test_hanging(comfy, network, server):
    Run(comfy, fresh(server)).succeed()
    network.is_hanging = True
    run = Run(comfy, fresh(server))
    message = run.fail()
    assert network.url in message
    assert "has not answered anything" in message or "was silent for" in message
    assert run.seconds < 30


@TRANSPORTS
def test_hanging_in_the_middle_of_a_job(comfy, network, server):
    run = Run(comfy, fresh(server, **LONG))
    run.until("progress", 2)
    network.break_connections()
    network.is_hanging = True
    assert "It did not come back within 4 s" in run.fail()
    assert run.seconds < 30


@TRANSPORTS
def test_cut_in_the_middle_makes_one_picture(comfy, network, outcomes, server):
    reference = Run(comfy, full_pipeline(server, seed=5, steps=40)).succeed().pixels()
    outcomes.wait(OK=1)
    run = Run(comfy, full_pipeline(server, seed=5, steps=40, batch_size=2))
    run.until("progress", 3)
    network.break_connections()
    run.succeed()
    assert np.abs(run.pixels()[0] - reference[0].astype(int)).max() <= 1  # two share the UNet
    outcomes.wait(OK=2, CANCELLED=1)
    assert any("Waiting for the server" in text for text in run.texts())


def test_a_stream_cut_within_an_event(comfy, network, outcomes):
    network.cut_next(b"generate_stream", after_bytes=1500)
    Run(comfy, fresh("streaming", steps=40)).succeed()
    outcomes.wait(OK=1, CANCELLED=1)


def test_a_picture_that_was_made_and_lost_is_not_made_again(comfy, network, outcomes):
    network.cut_next(b"/v2/models/full_pipeline/infer", after_bytes=0)
    run = Run(comfy, fresh("default", preview=False))
    assert "had made the picture, but its answer was lost" in run.fail()
    outcomes.wait(OK=1)


@TRANSPORTS
def test_busy(comfy, network, outcomes, server):
    Run(comfy, fresh(server)).succeed()
    network.answer = BUSY
    run = Run(comfy, fresh(server))
    run.until("text")
    network.restore()
    run.succeed()
    network.answer = BUSY
    message = Run(comfy, fresh(server)).fail()
    assert "busy; try again later" in message and network.url in message
    outcomes.wait(OK=2)


@pytest.mark.parametrize(
    ("server", "delay_ms"), [("default", 50), ("streaming", 50), ("patient", 500)]
)
def test_slow(comfy, network, outcomes, server, delay_ms):
    Run(comfy, fresh(server)).succeed()
    network.delay_s = delay_ms / 1000
    graph = fresh(server)
    run = Run(comfy, graph).succeed()
    assert run.steps(node_of(graph, "TritonFullPipeline"))[-1] == (8, 8)
    assert run.seconds < 30
    outcomes.wait(OK=2)


def test_a_server_that_dies_in_the_middle_of_a_job(comfy, triton):
    Run(comfy, full_pipeline("patient", seed=1, steps=2)).succeed()
    run = Run(comfy, full_pipeline("patient", seed=6, steps=60))
    run.until("progress", 3)
    os.kill(triton.pid, signal.SIGKILL)
    run.succeed()
    triton.wait_ready()
    again = Run(comfy, full_pipeline("streaming", seed=6, steps=60, preview=False)).succeed()
    np.testing.assert_array_equal(run.pixels(), again.pixels())


@TRANSPORTS
def test_an_interrupt_ends_the_job(comfy, outcomes, server):
    run = Run(comfy, fresh(server, **LONG))
    run.until("progress", 3)
    comfy.call("/interrupt", {})
    assert run.finish()["type"] == "execution_interrupted"
    outcomes.wait(CANCELLED=1, OK=0)


def test_an_interrupt_while_it_waits_for_a_server(comfy, network):
    network.refuse()
    run = Run(comfy, fresh("patient"))
    run.until("text")
    comfy.call("/interrupt", {})
    assert run.finish()["type"] == "execution_interrupted"


def test_nodes_side_by_side(comfy, network, outcomes):
    graph = Graph()
    nodes = [
        graph.add("TritonFullPipeline", **pipeline_inputs(seed=seed, steps=30)) for seed in (1, 2)
    ]
    graph.save(nodes[0])
    run = Run(comfy, graph.save(nodes[1])).succeed()
    shown = [e["data"]["node"] for e in run.events if e["type"] == "progress"]
    first = {node: shown.index(node) for node in nodes}
    last = {node: len(shown) - shown[::-1].index(node) for node in nodes}
    assert max(first.values()) < min(last.values()), "one waited for the other"
    outcomes.wait(OK=2)


def test_a_failure_of_one_ends_the_job_of_the_other(comfy, outcomes):
    graph = Graph()
    bad = graph.add("TritonFullPipeline", **pipeline_inputs(width=5000, seed=3))
    good = graph.add("TritonFullPipeline", **pipeline_inputs(**LONG, seed=4))
    graph.save(good)
    assert "width=5000 must be a multiple of 8" in Run(comfy, graph.save(bad)).fail()
    outcomes.wait(OK=0)


def test_node_definitions_do_not_wait_for_a_server_that_hangs(comfy, network):
    network.is_hanging = True
    started = time.monotonic()
    definitions = comfy.call("/object_info")
    assert time.monotonic() - started < 5
    inputs = definitions["TritonFullPipeline"]["input"]["required"]
    assert "full_pipeline" in inputs["pipeline"][1]["options"]
    assert "euler" in inputs["sampler_name"][1]["options"]
