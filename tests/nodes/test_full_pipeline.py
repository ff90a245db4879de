"""Triton Full Pipeline in a real ComfyUI, against a real Triton Inference Server."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import PROMPT, SMALL, Run, full_pipeline, node_of

from fullpipe.client import Client

pytestmark = [pytest.mark.comfyui, pytest.mark.triton]


@pytest.fixture(scope="module")
def expected(triton_url) -> np.ndarray:
    """The server's own picture of `full_pipeline()`."""
    return Client(triton_url).generate(PROMPT, **SMALL, width=128, height=128).pixels


@pytest.mark.parametrize("server", [None, "streaming"])
@pytest.mark.parametrize("preview", [True, False])
def test_the_picture_is_the_servers(comfy, expected, server, preview):
    run = Run(comfy, full_pipeline(server, preview=preview)).succeed()
    np.testing.assert_array_equal(run.pixels(), expected)


@pytest.mark.parametrize("server", [None, "streaming"])
def test_every_step_and_a_preview_that_can_be_recognised(comfy, server):
    graph = full_pipeline(server, width=256, height=256, steps=12, seed=11)
    run = Run(comfy, graph).succeed()
    assert run.steps(node_of(graph, "TritonFullPipeline")) == [(n, 12) for n in range(1, 13)]
    assert len(run.previews) >= 11  # the first step may be over before anybody asked
    preview = np.asarray(run.previews[-1].convert("RGB").resize((256, 256)))
    seen, drawn = figure(preview), figure(run.pixels()[0])
    assert 0.05 < drawn.mean() < 0.5
    assert (seen & drawn).sum() / (seen | drawn).sum() > 0.8


def figure(pixels: np.ndarray) -> np.ndarray:
    """Where a picture differs from its most frequent brightness, [H, W] bool."""
    brightness = pixels.astype(float).mean(2)
    distance = np.abs(brightness - np.median(brightness))
    return distance > distance.max() / 2


def test_one_request_a_run(comfy, network):
    Run(comfy, full_pipeline("streaming", seed=21)).succeed()
    asked = [path for path in network.traffic.requests if path.endswith(("/infer", "_stream"))]
    assert asked == ["/v2/models/full_pipeline_stream/generate_stream"]


def test_the_same_again_comes_from_comfyuis_cache(comfy, network):
    graph = full_pipeline(seed=22)
    Run(comfy, graph).succeed()
    network.restore()
    Run(comfy, graph).succeed()
    assert not [path for path in network.traffic.requests if path.endswith("/infer")]
