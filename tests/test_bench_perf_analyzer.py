"""NVIDIA's perf_analyzer runs unmodified against a pipeline, and the benchmark reads it rightly."""

from __future__ import annotations

import itertools
import json

import pytest

from bench.perf_analyzer import data, tool
from bench.served import prompts, read_metrics
from fullpipe.errors import PipelineError, Unavailable

SMALL = {"steps": 2, "width": 64, "height": 64}


def test_prompts_and_seeds_are_never_the_same_twice():
    requests = list(itertools.islice(data.varied(SMALL), 1000))
    assert len({request["prompt"] for request in requests}) == 1000
    assert len({request["seed"] for request in requests}) == 1000
    assert len(set(itertools.islice(prompts(), 500))) == 500


def test_input_file_is_what_the_tool_takes(tmp_path):
    path = data.write(tmp_path / "data.json", [{"prompt": "a", "seed": 2, **SMALL}])
    (entry,) = json.loads(path.read_text())["data"]
    assert entry == {"prompt": ["a"], "seed": [2], "steps": [2], "width": [64], "height": [64]}


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_every_request_is_answered_with_its_own_seed(triton, tmp_path, protocol):
    address = {"http": triton.url.removeprefix("http://"), "grpc": triton.grpc_address}[protocol]
    requests = list(itertools.islice(data.varied(SMALL), 8))
    before = read_metrics(triton.metrics_url)
    report = tool.measure(
        address,
        "full_pipeline",
        data.write(tmp_path / "data.json", requests),
        8,
        protocol=protocol,
        concurrency=4,
    )
    assert report["count"] == 8
    assert sorted(report["seeds"]) == [request["seed"] for request in requests]
    assert 0 < report["p50_ms"] <= report["p95_ms"] <= report["p99_ms"]
    assert report["images_per_second"] > 0
    after = read_metrics(triton.metrics_url)
    images = "fullpipe_image_steps_total"
    assert after[images] - before.get(images, 0.0) == 8 * SMALL["steps"]


@pytest.mark.triton
def test_poisson_arrivals(triton, tmp_path):
    requests = list(itertools.islice(data.varied(SMALL), 12))
    path = data.write(tmp_path / "data.json", requests)
    address = triton.url.removeprefix("http://")
    report = tool.measure(address, "full_pipeline", path, 6, rate=5.0)
    assert report["count"] >= 6  # one or two may be on their way when it has enough
    assert len(set(report["seeds"])) == report["count"]


@pytest.mark.triton
def test_what_the_server_refuses_is_an_error_here(triton, tmp_path):
    path = data.write(tmp_path / "data.json", [{"prompt": "a", **SMALL, "width": 63}])
    address = triton.url.removeprefix("http://")
    with pytest.raises(PipelineError, match="width=63"):
        tool.measure(address, "full_pipeline", path, 1, concurrency=1)


def test_metrics_that_are_not_there():
    assert read_metrics("") == {}
    with pytest.raises(Unavailable, match="no metrics at"):
        read_metrics("http://127.0.0.1:9/metrics")
