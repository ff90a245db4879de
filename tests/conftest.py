"""Fixtures that most tests share: the demo checkpoint, and a pipeline in this process."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from fullpipe.config import LoopSettings
from fullpipe.engines.torch_engine import TorchUNet
from fullpipe.local import LocalPipeline
from fullpipe.stages import LocalStages

ROOT = Path(__file__).parents[1]
# Where in-process pipelines run, for the loop's tests on a GPU.
DEVICE = os.environ.get("FULLPIPE_TEST_DEVICE", "cpu")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing that an earlier run has compiled or laid out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The demo checkpoint, in diffusers' layout."""
    return ROOT / "demo" / "checkpoint"


@pytest.fixture(scope="session")
def repository(checkpoint, tmp_path_factory) -> Path:
    """Two pipelines of the demo checkpoint: the plain one, and one with the UNet over BLS."""
    from fullpipe.assemble import Choices, assemble

    out = tmp_path_factory.mktemp("served") / "repository"
    assemble(checkpoint, out)
    assemble(checkpoint, out, Choices(name="apart", loop=LoopSettings(unet="bls")))
    return out


@pytest.fixture(scope="session")
def config(repository):
    """The assembled pipeline's configuration."""
    from fullpipe.config import PipelineConfig

    return PipelineConfig.load(repository / "scheduler_model" / "1" / "pipeline.json")


@pytest.fixture(scope="session")
def demo_unet(checkpoint):
    """The demo checkpoint's UNet."""
    return TorchUNet(checkpoint / "unet", device=DEVICE)


@pytest.fixture(scope="session")
def demo_stages(checkpoint):
    """The demo checkpoint's text encoder and VAE."""
    return LocalStages(checkpoint, device=DEVICE)


@pytest.fixture
def open_pipeline(config, demo_unet, demo_stages):
    """Opens in-process pipelines with changed settings, and closes them after the test."""
    opened = []

    def open_one(unet=None, unets=None, stages=None, limits=None, **loop_settings):
        changed = dataclasses.replace(
            config,
            loop=dataclasses.replace(LoopSettings(device=DEVICE), **loop_settings),
            limits=dataclasses.replace(config.limits, **(limits or {})),
        )
        opened.append(LocalPipeline(changed, unets or [unet or demo_unet], stages or demo_stages))
        return opened[-1]

    yield open_one
    for pipeline in opened:
        pipeline.close()


@pytest.fixture(scope="session")
def triton(repository):
    """A real Triton Inference Server that serves the demo pipeline on free ports."""
    from fullpipe.server import ServerConfig, TritonServer

    with TritonServer(ServerConfig(repository, http_port=0, grpc_port=0, metrics_port=0)) as server:
        yield server


@pytest.fixture(scope="session")
def triton_url(triton) -> str:
    """Address of the HTTP endpoint of `triton`."""
    return triton.url
