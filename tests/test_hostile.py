"""Ten thousand hostile requests against a real Triton: an error each, and nobody is hurt."""

from __future__ import annotations

import numpy as np
import psutil
import pytest

from fullpipe.client import Client
from tests.hostile import attack

pytestmark = pytest.mark.triton

COUNT = 10_000


def resident_bytes(triton):
    root = psutil.Process(triton.pid)
    return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)])


def stubs(triton):
    return {p.pid for p in psutil.Process(triton.pid).children(recursive=True)}


def test_hostile_requests_get_their_error_and_do_no_harm(triton):
    client = Client(triton.url, timeout_s=60)
    wanted = {"prompt": "a red circle on a white background", "seed": 7, "steps": 4}
    before = client.generate(**wanted).pixels
    attack(triton.url, 1000, seed=1)  # allocators and caches reach their size
    memory, alive = resident_bytes(triton), stubs(triton)
    report = attack(triton.url, COUNT, seed=2)
    assert sum(report["answers"].values()) == COUNT
    assert report["accepted"] == []
    assert report["unclear"] == []
    assert report["slowest_s"] < 15
    assert stubs(triton) == alive, "a stub died"
    assert np.array_equal(client.generate(**wanted).pixels, before)
    assert resident_bytes(triton) < 1.05 * memory
