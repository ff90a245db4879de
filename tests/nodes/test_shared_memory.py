"""Pictures through shared memory where client and server share a machine."""

from __future__ import annotations

import json
import urllib.request

import numpy as np
import pytest
from graphs import PROMPT, Graph, Run, full_pipeline, pipeline_inputs

from fullpipe.client import Client

pytestmark = [pytest.mark.comfyui, pytest.mark.triton]

LARGE = {"width": 512, "height": 512, "steps": 1, "cfg": 1.0, "seed": 3}
REGISTER = "/register"


@pytest.fixture(scope="module")
def expected(triton_url) -> np.ndarray:
    """The server's own picture."""
    return Client(triton_url).generate(PROMPT, **LARGE).pixels


def regions(triton_url: str) -> list:
    """What the server still has."""
    with urllib.request.urlopen(f"{triton_url}/v2/systemsharedmemory/status", timeout=10) as answer:
        return json.load(answer)


@pytest.mark.parametrize("server", ["default", "streaming"])
def test_used_only_where_it_is_on(comfy, network, triton_url, expected, server):
    run = Run(comfy, full_pipeline(server, **LARGE, preview=False)).succeed()
    np.testing.assert_array_equal(run.pixels(), expected)
    registered = [path for path in network.traffic.requests if path.endswith(REGISTER)]
    assert bool(registered) == (server == "default")
    assert (network.traffic.received_bytes < 100_000) == (server == "default")
    assert not regions(triton_url)


def test_a_server_that_forbids_it_gets_binary_tensors(comfy, network, expected):
    for seed in (3, 4):
        network.restore()
        network.forbidden = "/v2/systemsharedmemory"
        run = Run(comfy, full_pipeline("walled", **{**LARGE, "seed": seed}, preview=False))
        run.succeed()
        if seed == 3:
            np.testing.assert_array_equal(run.pixels(), expected)
        asked = [path for path in network.traffic.requests if path.endswith(REGISTER)]
        assert len(asked) <= (seed == 3), "it asks again and again"


def test_start_pictures_and_latents(comfy, triton_url):
    graph = Graph()
    first = graph.add("TritonFullPipeline", **pipeline_inputs(**LARGE, preview=False))
    changed = {**LARGE, "steps": 2, "with_latent": True, "denoise": 0.5, "preview": True}
    second = graph.add("TritonFullPipeline", **pipeline_inputs(**changed, image=[first, 0]))
    encoded = graph.add("TritonVAEEncode", pipeline="full_pipeline", pixels=[first, 0])
    decoded = graph.add("TritonVAEDecode", pipeline="full_pipeline", samples=[second, 1])
    again = graph.add("TritonVAEDecode", pipeline="full_pipeline", samples=[encoded, 0])
    for node in (first, second, decoded, again):
        graph.save(node)
    run = Run(comfy, graph.nodes).succeed()
    start, image, from_latent, round_trip = run.pixels().astype(int)
    assert np.abs(image - from_latent).max() <= 1
    assert np.abs(start - round_trip).mean() < 12
    assert not regions(triton_url)
