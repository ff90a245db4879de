"""The remote stages, each swapped for ComfyUI's own node: the picture stays the same.

Both sides have the same checkpoint of the SD1.5 architecture, with random weights (see
tests/parity/checkpoints.py).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from comfy_server import ComfyServer
from conftest import IMPATIENT, NODES
from graphs import Graph, Run, server_inputs
from images import Distance
from PIL import Image

from fullpipe.assemble import Choices, assemble
from fullpipe.config import LoopSettings
from fullpipe.server import ServerConfig, TritonServer

pytestmark = [pytest.mark.comfyui, pytest.mark.triton]

POSITIVE = "a (red:1.3) circle on a white background, (blurry:0.6) edges"
NEGATIVE = "a dark picture, noise"
SAMPLING = {
    "seed": 42,
    "steps": 4,
    "cfg": 5.0,
    "sampler_name": "dpmpp_2m",
    "scheduler": "karras",
    "denoise": 1.0,
}
PIPELINE = {"pipeline": "full_pipeline"}
LOCAL = {"text": "core", "sampler": "core", "decoder": "core", "encoder": "core"}


@pytest.fixture(scope="module")
def folder():
    """Room for gigabytes of weights, which pytest's own folders would keep for three runs."""
    with tempfile.TemporaryDirectory(prefix="stages-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def comfy(folder):
    """A ComfyUI and a Triton that serve one checkpoint."""
    comfy = ComfyServer(
        folder / "comfyui",
        {"triton-full-pipeline": NODES},
        {"FULLPIPE_COMFYUI_CONFIG": str(folder / "servers.json"), "OMP_NUM_THREADS": "2"},
    )
    (folder / "sd15").mkdir()
    write_checkpoint("sd15", folder / "sd15", comfy.checkpoints / "sd15.safetensors")
    settings = Choices(loop=LoopSettings(unet="bls"), stage_threads=2)
    assemble(folder / "sd15", folder / "repository", settings)
    shutil.rmtree(folder / "sd15")
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    start = np.random.default_rng(3).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(start).resize((64, 64)).save(comfy.base / "input" / "start.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[16:56, 24:] = 255
    Image.fromarray(mask).save(comfy.base / "input" / "mask.png")
    with TritonServer(ServerConfig(folder / "repository", **ports, log_level="error")) as server:
        entry = {"url": server.url, **IMPATIENT}
        (folder / "servers.json").write_text(json.dumps({"servers": {"default": entry}}))
        with comfy:
            yield comfy
        server.stop(now=True)


def picture(comfy, *, is_inpainting: bool = False, **parts: str) -> np.ndarray:
    """One picture; `parts` says of text, encoder, sampler and decoder whose node it is."""
    parts = LOCAL | parts
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")

    def encode(text: str) -> str:
        if parts["text"] == "triton":
            return graph.add("TritonCLIPTextEncode", **PIPELINE, text=text, clip_skip=0)
        return graph.add("CLIPTextEncode", clip=[loader, 1], text=text)

    sampling = dict(SAMPLING)
    if is_inpainting:
        sampling["denoise"] = 0.7
        start = [graph.add("LoadImage", image="start.png"), 0]
        if parts["encoder"] == "triton":
            latent = graph.add("TritonVAEEncode", **PIPELINE, pixels=start)
        else:
            latent = graph.add("VAEEncode", pixels=start, vae=[loader, 2])
        mask = graph.add("LoadImageMask", image="mask.png", channel="red")
        latent = graph.add("SetLatentNoiseMask", samples=[latent, 0], mask=[mask, 0])
    else:
        latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    ends = {"positive": [encode(POSITIVE), 0], "negative": [encode(NEGATIVE), 0]}
    ends["latent_image"] = [latent, 0]
    if parts["sampler"] == "triton":
        sampled = graph.add("TritonKSampler", **PIPELINE, **ends, **sampling, preview=True)
    else:
        model = loader
        if parts["sampler"] == "unet":
            model = graph.add("TritonRemoteUNet", **PIPELINE)
        sampled = graph.add("KSampler", model=[model, 0], **ends, **sampling)
    if parts["decoder"] == "triton":
        return (
            Run(comfy, graph.save(graph.add("TritonVAEDecode", **PIPELINE, samples=[sampled, 0])))
            .succeed()
            .pixels()
        )
    decoded = graph.add("VAEDecode", samples=[sampled, 0], vae=[loader, 2])
    return Run(comfy, graph.save(decoded)).succeed().pixels()


@pytest.fixture(scope="module")
def local(comfy) -> np.ndarray:
    """ComfyUI's own picture."""
    return picture(comfy)


@pytest.mark.parametrize(
    "parts",
    [
        {"text": "triton", "sampler": "triton", "decoder": "triton"},
        {"sampler": "triton", "decoder": "triton"},
        {"text": "triton", "decoder": "triton"},
        {"text": "triton", "sampler": "triton"},
        {"sampler": "unet"},
        {"text": "triton", "sampler": "unet", "decoder": "triton"},
    ],
    ids=lambda parts: ", ".join(f"{part} {whose}" for part, whose in parts.items()),
)
def test_swapped_for_the_core_node(comfy, local, parts):
    distance = Distance.between(picture(comfy, **parts), local)
    assert distance.is_equal, distance


def test_inpainting(comfy):
    theirs = picture(comfy, is_inpainting=True)
    remote = dict.fromkeys(LOCAL, "triton")
    distance = Distance.between(picture(comfy, is_inpainting=True, **remote), theirs)
    assert distance.is_equal, distance
    distance = Distance.between(picture(comfy, is_inpainting=True, sampler="unet"), theirs)
    assert distance.is_equal, distance


def test_the_whole_pipeline_gives_the_same(comfy, local):
    graph = Graph()
    node = graph.add(
        "TritonFullPipeline",
        **PIPELINE,
        positive=POSITIVE,
        negative=NEGATIVE,
        **SAMPLING,
        **{"width": 64, "height": 64, "batch_size": 1, "preview": False, "clip_skip": 0},
        with_latent=True,
        fallback_checkpoint="none",
    )
    # Its LATENT, decoded, is its IMAGE.
    graph.add("SaveImage", images=[node, 0], filename_prefix="nodes")
    decoded = graph.add("TritonVAEDecode", **PIPELINE, samples=[node, 1])
    pixels = Run(comfy, graph.save(decoded)).succeed().pixels()
    for one in pixels:
        assert Distance.between(one[None], local).is_equal


def test_the_fallback_paints_the_same_and_says_so(comfy, local):
    graph = Graph()
    server = graph.add(
        "TritonServer", **server_inputs("default", address="http://127.0.0.1:9", retries=0)
    )
    inputs = {"width": 64, "height": 64, "batch_size": 1, "preview": True, "clip_skip": 0}
    inputs |= {"with_latent": False, "fallback_checkpoint": "sd15.safetensors", **SAMPLING}
    node = graph.add(
        "TritonFullPipeline",
        **PIPELINE,
        positive=POSITIVE,
        negative=NEGATIVE,
        **inputs,
        server=[server, 0],
    )
    run = Run(comfy, graph.save(node)).succeed()
    assert Distance.between(run.pixels(), local).is_equal
    assert any("PAINTED HERE with sd15.safetensors" in text for text in run.texts())
    (notice,) = [e["data"] for e in run.events if e["type"] == "triton_full_pipeline.notice"]
    assert "127.0.0.1:9" in notice["detail"]


@pytest.mark.parametrize("name", ["ConditioningCombine", "ConditioningSetArea"])
def test_a_conditioning_that_the_server_cannot_do_is_refused(comfy, name):
    graph = Graph()
    text = graph.add("TritonCLIPTextEncode", **PIPELINE, text="a red circle", clip_skip=0)
    if name == "ConditioningCombine":
        two = graph.add(name, conditioning_1=[text, 0], conditioning_2=[text, 0])
    else:
        area = {"width": 64, "height": 64, "x": 0, "y": 0, "strength": 1.0}
        two = graph.add(name, conditioning=[text, 0], **area)
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    ends = {"positive": [two, 0], "negative": [text, 0], "latent_image": [latent, 0]}
    sampled = graph.add("TritonKSampler", **PIPELINE, **ends, **SAMPLING, preview=False)
    decoded = graph.add("TritonVAEDecode", **PIPELINE, samples=[sampled, 0])
    message = Run(comfy, graph.save(decoded)).fail()
    assert message.startswith("positive ") and "Triton Remote UNet" in message
