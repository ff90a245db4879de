"""A pipeline of ONNX engines on a real Triton Inference Server, with others beside it.

One of them has lost the end of its UNet, one decodes in the loop's process and caches steps.
"""

from __future__ import annotations

import base64
import json
import urllib.request

import numpy as np
import pytest

from fullpipe.assemble import Choices, assemble
from fullpipe.cli import main
from fullpipe.client import Client, Picture
from fullpipe.config import Limits, LoopSettings
from fullpipe.engines.torch_engine import TorchUNet
from fullpipe.errors import InvalidRequest, PipelineError
from fullpipe.local import LocalPipeline
from fullpipe.server import ServerConfig, TritonServer

pytestmark = pytest.mark.triton

RED = "a (red:1.2) circle on a white background"
SMALL = {"steps": 4, "cfg": 3.0, "seed": 7, "width": 128, "height": 128}


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
    """Three pipelines, of which `cut` has lost the end of its UNet; and the server's log."""
    repository = tmp_path_factory.mktemp("engines") / "repository"
    onnx = LoopSettings(engine="onnx")
    sizes = Limits(max_size_px=256)
    assemble(checkpoint, repository, Choices(loop=onnx, limits=sizes))
    assemble(checkpoint, repository, Choices(name="cut", loop=onnx))
    near = LoopSettings(vae="loop", step_cache=True)
    assemble(checkpoint, repository, Choices(name="near", loop=near))
    weights = repository / "cut_scheduler_model" / "1" / "unet" / "unet.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-5000])
    lines: list[str] = []
    settings = ServerConfig(repository, http_port=0, grpc_port=0, metrics_port=0)
    with TritonServer(settings, log=lines.append) as server:
        yield server, lines


@pytest.fixture(scope="module")
def client(served):
    return Client(served[0].url, timeout_s=120)


def test_onnx_makes_the_picture_that_torch_makes(client, config, demo_unet, demo_stages):
    with LocalPipeline(config, [demo_unet], demo_stages) as pipeline:
        own = pipeline.generate(prompt=RED, negative_prompt="blue", **SMALL)
    picture = client.generate(RED, negative_prompt="blue", **SMALL)
    difference = np.abs(picture.pixels.astype(int) - own.images)
    assert own.images.std() > 20, "nothing is drawn"
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.01


def test_onnx_from_a_start_image(client, config, demo_unet, demo_stages):
    start = client.generate(RED, **SMALL).pixels
    asked = {"init_image": start, "steps": 4, "denoise": 0.6, "seed": 3, "cfg": 3.0}
    with LocalPipeline(config, [demo_unet], demo_stages) as pipeline:
        own = pipeline.generate(prompt="a blue square", **asked)
    picture = client.generate("a blue square", **asked)
    difference = np.abs(picture.pixels.astype(int) - own.images)
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.01


def test_a_decoder_in_the_loop_gives_the_same_pixels(served, config, demo_unet, demo_stages):
    near = Client(served[0].url, pipeline="near", timeout_s=60)
    with LocalPipeline(config, [demo_unet], demo_stages) as pipeline:
        own = pipeline.generate(prompt=RED, batch_size=2, **SMALL)
    assert np.array_equal(near.generate(RED, batch_size=2, **SMALL).pixels, own.images)
    url = f"{served[0].url}/v2/models/near_vae_decoder/stats"
    with urllib.request.urlopen(url, timeout=20) as answer:
        (statistics,) = json.load(answer)["model_stats"]
    assert statistics["inference_count"] == 0, "the model was called all the same"


def test_step_caching_over_http(served, client, config, checkpoint, demo_stages, tmp_path):
    near = Client(served[0].url, pipeline="near", timeout_s=60)
    unet = TorchUNet(checkpoint / "unet", step_cache=True)
    with LocalPipeline(config, [unet], demo_stages) as pipeline:
        own, exact = (pipeline.generate(prompt=RED, step_cache=n, **SMALL) for n in (2, 1))
    assert np.abs(own.images.astype(int) - exact.images).max() > 2, "nothing was cached"
    picture = near.generate(RED, step_cache=2, **SMALL)
    # Threads are shared out differently in this process, so single levels may differ.
    assert np.abs(picture.pixels.astype(int) - own.images).max() <= 1
    assert picture.info["step_cache"] == 2
    body = json.dumps({"prompt": RED, "step_cache": 2, "output_format": "png", **SMALL}).encode()
    with urllib.request.urlopen(f"{served[0].url}/v2/models/near/generate", body, 60) as answer:
        png = base64.b64decode(json.load(answer)["image"])
    assert np.array_equal(Picture({}, [png]).pixels, picture.pixels)
    options = [f"--{name}={value}" for name, value in {**SMALL, "step-cache": 2}.items()]
    out = tmp_path / "streamed.png"
    argv = ["generate", RED, "-o", str(out), "--pipeline", "near", "--url", served[0].url]
    assert main([*argv, *options]) == 0
    assert np.array_equal(Picture({}, [out.read_bytes()]).pixels, picture.pixels)
    with pytest.raises(InvalidRequest, match="step_cache=2 is not served by this pipeline"):
        client.generate(RED, step_cache=2, **SMALL)
    facts = {pipeline.name: pipeline.facts for pipeline in client.pipelines()}
    assert facts["near"]["step_cache"] and not facts["full_pipeline"]["step_cache"]


def test_a_broken_pipeline_is_named_and_the_other_one_serves_on(served, client):
    server, lines = served
    ready = {pipeline.name: pipeline.ready for pipeline in client.pipelines()}
    assert ready == {"full_pipeline": True, "near": True}
    (told,) = [line for line in lines if line.startswith("error: model 'cut_scheduler_model'")]
    assert "unet.onnx.data has " in told and " bytes, needed " in told
    assert "; rebuild it with: fullpipe assemble " in told and "--engine onnx" in told
    with pytest.raises(PipelineError):
        Client(server.url, pipeline="cut", timeout_s=20).generate(RED, **SMALL)
    assert client.generate(RED, **SMALL).pixels.shape == (1, 128, 128, 3)


def test_a_size_out_of_range_gets_one_line(client):
    message = r"width=320 must be a multiple of 8 in \[64, 256\]"
    with pytest.raises(InvalidRequest, match=message):
        client.generate(RED, steps=2, width=320, height=128)
    start = np.zeros((1, 128, 320, 3), np.uint8)
    with pytest.raises(InvalidRequest, match=message):
        client.generate(RED, steps=2, init_image=start, denoise=0.5)
