"""The loop's Triton model by its parts; a stand-in for the module that only Triton has."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fullpipe.config import LoopSettings
from tests.conftest import ROOT


@pytest.fixture
def loop_model(monkeypatch):
    """`scheduler_model`'s file as a module."""
    stand_in = types.ModuleType("triton_python_backend_utils")
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    monkeypatch.delitem(sys.modules, "fullpipe.triton_adapter", raising=False)
    path = ROOT / "scheduler_model" / "1" / "model.py"
    spec = importlib.util.spec_from_file_location("loop_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("fullpipe.triton_adapter", None)


def over_bls(loop_model, config, tmp_path, **loop):
    settings = LoopSettings(unet="bls", **loop)
    return loop_model.BlsUNet(tmp_path, dataclasses.replace(config, loop=settings), "cpu")


def test_it_asks_for_the_rows_that_packages_were_compiled_for(loop_model, config, tmp_path):
    built = {"sizes": [[256, 256], [384, 128]], "buckets": [2, 8]}
    unet = over_bls(loop_model, config, tmp_path, engine="compiled", **built)
    assert unet.row_counts(32, 32, 77) == (2, 8)
    assert unet.row_counts(16, 48, 77) == (2, 8), "384x128 is 16 latents high"
    assert unet.row_counts(48, 16, 77) == ()
    assert unet.row_counts(32, 32, 154) == (), "a long prompt runs in eager torch, any rows"
    for engine in ("torch", "onnx", "tensorrt"):
        assert (
            over_bls(loop_model, config, tmp_path, engine=engine, **built).row_counts(32, 32, 77)
            == ()
        )


def test_every_row_travels_and_comes_back(loop_model, config, tmp_path, monkeypatch):
    sent = {}

    class Output:
        def __init__(self, tensor):
            self.to_dlpack = tensor.__dlpack__

    def call(model, inputs, outputs):
        sent.update(inputs, model=model, outputs=outputs)
        return {"noise_pred": Output(inputs["sample"] * 2)}

    monkeypatch.setattr(loop_model.triton, "call_model", call)
    unet = over_bls(loop_model, config, tmp_path)
    sample = torch.randn(3, 4, 8, 8)
    answer = unet.run({"sample": sample, "timestep": torch.arange(3)})
    assert torch.equal(answer["noise_pred"], sample * 2)
    assert (sent["model"], sent["outputs"]) == (config.models.unet, ["noise_pred"])
    assert torch.equal(sent["timestep"], torch.arange(3))


def test_every_device_decodes(loop_model, config, tmp_path, monkeypatch):
    """Two at a time on two devices, never two on one."""
    both = threading.Barrier(2, timeout=10)
    busy, most = set(), []

    class Decoder:
        def decode(self, latents):
            assert self not in busy, "a decoder runs for one thread at a time"
            busy.add(self)
            most.append(len(busy))
            both.wait()
            busy.discard(self)
            return latents

    asked = []
    monkeypatch.setattr(
        loop_model,
        "load_vae_decoder",
        lambda folder, config, device: asked.append(device) or Decoder(),
    )
    settings = LoopSettings(vae="loop", device="cpu:0,cpu:1")
    decoder = loop_model.OwnDecoder(dataclasses.replace(config, loop=settings), tmp_path)
    assert asked == ["cpu:0", "cpu:1"]
    with ThreadPoolExecutor(4) as threads:
        pictures = list(threads.map(decoder.decode_latents, torch.arange(4.0).split(1)))
    assert [float(picture[0]) for picture in pictures] == [0.0, 1.0, 2.0, 3.0]
    assert max(most) == 2
