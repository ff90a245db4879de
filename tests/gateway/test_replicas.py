"""Two replicas: one is killed, drained, stopped or frozen under load, and who notices."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fullpipe.errors import Cancelled, PipelineError, Unavailable
from tests.gateway.doors import PROMPT, SMALL, bearer, http1, picture_body, wait_until

pytestmark = [pytest.mark.gateway, pytest.mark.triton]

GENERATE = "/v2/models/full_pipeline/generate"
WORK = {**SMALL, "steps": 30}


class Load:
    """Requests from several threads, until it is left; what became of each."""

    def __init__(self, make, threads: int = 4):
        self.outcomes: list = []
        self._make = make
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        while not self._is_over.is_set():
            started = time.monotonic()
            try:
                outcome: object = self._make()
            except PipelineError as error:
                outcome = error
            self.outcomes.append((outcome, started, time.monotonic() - started))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception):
        self._is_over.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive(), "a request hangs"

    def wait_for_more(self, count: int, limit_s: float = 60) -> None:
        wanted = len(self.outcomes) + count
        wait_until(lambda: len(self.outcomes) >= wanted, limit_s, "the load stands still")


@pytest.fixture
def door(open_gateway):
    return open_gateway()


def replica_is(door, name, status):
    return lambda: door.admin.replicas()[name]["status"].startswith(status)


def test_load_goes_to_both(door):
    body = picture_body(steps=20)
    key = door.key("a")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: http1(door, "POST", GENERATE, bearer(key), body), range(12)))
    wait_until(lambda: len(door.log(call="generate", status=200)) == 12, 20, "lines are missing")
    assert {line["replica"] for line in door.log(call="generate")} == {"r1", "r2"}


def test_killed_replica(door, replicas):
    """Repeatable requests all finish; the others end soon with a clear error, and none hangs."""
    key = door.key("a")
    client = door.client(key)  # says that its requests may be repeated
    body = picture_body(**WORK)

    def plain():
        return http1(door, "POST", GENERATE, bearer(key), body)

    with Load(lambda: client.generate(PROMPT, **WORK), 3) as repeatable, Load(plain, 3) as others:
        repeatable.wait_for_more(3)
        killed, killed_at = replicas[0].pid, time.monotonic()
        os.kill(killed, signal.SIGKILL)
        wait_until(replica_is(door, "r1", "DOWN"), 20, "the gateway does not notice")
        repeatable.wait_for_more(6)
        others.wait_for_more(6)
        wait_until(replica_is(door, "r1", "UP"), 90, "the replica does not come back")
        repeatable.wait_for_more(3)
    assert replicas[0].pid != killed
    assert [
        outcome for outcome, _, _ in repeatable.outcomes if isinstance(outcome, Exception)
    ] == []
    broken = [row for row in others.outcomes if row[0].status != 200]
    for answer, started, _ in broken:
        assert started < killed_at + 5, "the gateway went on using a dead replica"
        assert answer.status in (502, 503)
        assert json.loads(answer.body)["error"].startswith("UNAVAILABLE: ")
    assert max(seconds for _, _, seconds in repeatable.outcomes + others.outcomes) < 30


def test_frozen_replica_is_left_and_its_requests_end(door, replicas):
    """A server that neither answers nor breaks off: health checks find it within seconds."""
    key = door.key("a")
    client = door.client(key, timeout_s=40)
    stopped = replicas[1].pid
    with Load(lambda: client.generate(PROMPT, **WORK), 4) as load:
        load.wait_for_more(4)
        os.kill(stopped, signal.SIGSTOP)
        try:
            wait_until(replica_is(door, "r2", "DOWN"), 20, "the gateway does not notice")
            load.wait_for_more(8)
        finally:
            os.kill(stopped, signal.SIGCONT)
        wait_until(replica_is(door, "r2", "UP"), 30, "the replica does not come back")
    broken = [outcome for outcome, _, _ in load.outcomes if isinstance(outcome, Exception)]
    assert all(isinstance(error, Unavailable) for error in broken), broken
    assert len(broken) <= 4, "more requests broke than were in flight"


def test_drained_replica_loses_none(door):
    key = door.key("a")
    body = picture_body(**WORK)  # not repeatable: a lost one would show

    def make():
        return http1(door, "POST", GENERATE, bearer(key), body).status

    with Load(make, 4) as load:
        load.wait_for_more(4)
        door.admin.drain("r2", timeout_s=60)
        before = len(door.log(replica="r2"))
        load.wait_for_more(6)
        assert len(door.log(replica="r2")) == before, "a drained replica got a request"
        door.admin.set_replica("r2", "ready")
        load.wait_for_more(4)
    assert {status for status, _, _ in load.outcomes} == {200}
    with pytest.raises(PipelineError, match="no replica r9; there are: r1, r2"):
        door.admin.drain("r9")


def test_no_replica_at_all(open_gateway, replicas):
    door = open_gateway()
    key = door.key("a")
    for name in ("r1", "r2"):
        door.admin.order(f"set server triton/{name} state maint")
    answer = http1(door, "POST", GENERATE, bearer(key), picture_body())
    assert answer.status == 503
    assert answer.headers["retry-after"] == "2"
    assert json.loads(answer.body)["error"].startswith("UNAVAILABLE: no server can take")
    assert http1(door, "GET", "/v2/health/ready").status == 503
    assert http1(door, "POST", "/v2/repository/index", bearer(key), b"{}").status == 503


@pytest.fixture(params=["client", "node pack"])
def cancel(request, door):
    """Cancels a job by its id, as the client or as the node pack does; the key is `key`."""
    key = door.key("a")
    client = door.client(key)
    if request.param == "client":
        yield types.SimpleNamespace(client=client, ask=lambda job_id: client.cancel(job_id))
        return
    package = types.ModuleType("node_pack_alone")  # without its __init__, which wants ComfyUI
    package.__path__ = [str(Path(__file__).parents[2] / "client_nodes")]
    sys.modules[package.__name__] = package
    settings, endpoint, triton = (
        importlib.import_module(f"{package.__name__}.{name}")
        for name in ("settings", "endpoint", "triton")
    )
    server = settings.Server(url=door.url, api_key=key, ca_cert=str(door.folder / "tls.pem"))

    def ask(job_id):
        where = endpoint.Endpoint(server)
        return triton.control(where, "scheduler_model", "cancel", job_id, timeout_s=5)

    yield types.SimpleNamespace(client=client, ask=ask)
    for name in [name for name in sys.modules if name.startswith(package.__name__)]:
        del sys.modules[name]


def test_cancel_finds_the_replica_that_has_the_job(cancel):
    for number in range(4):  # by chance alone every one of them would be found once in 16 times
        job_id = f"job-{number}-{time.monotonic_ns()}"
        caught: list = []

        def make(job_id=job_id, caught=caught):
            try:
                cancel.client.generate(PROMPT, steps=150, job_id=job_id)
            except Cancelled as error:
                caught.append(error)

        thread = threading.Thread(target=make)
        thread.start()
        wait_until(lambda j=job_id: cancel.ask(j)["state"] == "cancelled", 20, "not found")
        thread.join(30)
        assert str(caught[0]) == f"job {job_id} was cancelled"


def test_lost_stream_cancels_its_job_through_the_gateway(door, replicas):
    stream = door.client(door.key("a")).stream(PROMPT, steps=150, width=256, height=256)
    next(stream)
    stream.close()
    wait_until(
        lambda: sum(int(row["scur"] or 0) for row in door.admin.replicas().values()) == 0,
        20,
        "the stream is still open behind the gateway",
    )
