"""The rivals of the GPU's benchmark, on the CPU with reduced random checkpoints."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from bench.rivals import complete, rival
from tests.engines.reduced import SMALL, TEXT_FOLDERS, build
from tests.parity.checkpoints import CLIP_L, NARROW, SD15_UNET
from tests.parity.comfyui import ComfyUI, install

SMALLEST = {"device": "cpu", "precision": "fp32", "steps": 2, "repeats": 1}
TIMES = {"p50_ms", "p99_ms", "min_ms", "max_ms", "count"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """For the rivals, which inherit it: threads of small networks would wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def reduced(request, tmp_path_factory) -> Path:
    """A checkpoint that has what this project needs, and no more."""
    return build(request.param, tmp_path_factory.mktemp("reduced") / request.param)


def test_a_reduced_checkpoint_is_completed_for_diffusers(reduced, tmp_path):
    before = sorted(reduced.rglob("*"))
    pipeline = DiffusionPipeline.from_pretrained(complete(reduced, tmp_path), local_files_only=True)
    assert sorted(reduced.rglob("*")) == before
    assert ("XL" in type(pipeline).__name__) == (reduced.name == "sdxl")
    for part, config in zip(TEXT_FOLDERS, SMALL[reduced.name][2], strict=False):
        assert pipeline.components[part].config.hidden_size == config["hidden_size"]


def test_diffusers_draws_a_checkpoint(reduced):
    told = rival("diffusers", reduced, **SMALLEST)
    assert set(told) >= TIMES, told
    assert told["count"] == 1 and 0 < told["min_ms"] <= told["p50_ms"] <= told["max_ms"]
    assert told["size_px"] == 64 and told["precision"] == "fp32"
    assert told["process_s"] > told["max_ms"] / 1e3


@pytest.mark.comfyui
def test_comfyui_draws_a_checkpoint():
    try:
        comfyui = install()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"ComfyUI could not be downloaded: {error.stderr}")
    # What ComfyUI does not read off the weights keeps its true size.
    sizes = {"sd1": (SD15_UNET | NARROW["sd15"], (128, 256, 512, 512), [CLIP_L])}
    with tempfile.TemporaryDirectory(prefix="rivals-") as name:
        checkpoint = build("sd1", Path(name) / "sd1", torch.float16, sizes=sizes)
        told = rival("comfyui", checkpoint, **SMALLEST)
        assert set(told) >= TIMES, told
        for part in ("ksampler", "vae_decode"):
            assert told[part]["count"] == 1 and 0 < told[part]["p50_ms"] < told["p50_ms"]
        assert told["version"] == "0.3.75" and told["size_px"] == 64
        assert told["unet_dtype"] == told["vae_dtype"] == "float32"
        lost = rival("comfyui", checkpoint, comfyui=comfyui.tree / "comfy", **SMALLEST)
        assert "has no comfy/sample.py" in lost["error"]


def test_a_given_comfyui_has_its_packages_beside_it(tmp_path):
    (tmp_path / "tree" / "comfy").mkdir(parents=True)
    (tmp_path / "tree" / "comfy" / "sample.py").touch()
    comfyui = ComfyUI.at(tmp_path / "tree")
    assert comfyui.extra_packages == tmp_path / "packages"


def test_a_rival_that_fails_or_hangs_is_an_error_in_its_own_row(tmp_path):
    failed = rival("diffusers", tmp_path / "nowhere", **SMALLEST)
    assert "ended with 1: FileNotFoundError" in failed["error"] and "p50_ms" not in failed
    slow = rival("diffusers", tmp_path / "nowhere", **SMALLEST, time_limit_s=0.1)
    assert "not done after 0 s" in slow["error"] and slow["process_s"] < 10
