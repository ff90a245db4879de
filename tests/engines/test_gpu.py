"""The `compiled` engine on an NVIDIA GPU: close to fp32, and the loop's promises hold on it.

The loop's own tests run there too: `FULLPIPE_TEST_DEVICE=cuda pytest tests/test_loop.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from bench.fidelity import relative_errors, unet_inputs
from fullpipe.assemble import Choices, assemble
from fullpipe.config import LoopSettings, PipelineConfig
from fullpipe.engines.graphed import GraphedUNet
from fullpipe.engines.loading import load_unet, torch_dtype
from fullpipe.graphs import CallGraphs
from fullpipe.local import LocalPipeline
from fullpipe.stages import LocalStages
from fullpipe.text import PromptEncoder
from tests.engines.reduced import LEAN, build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
COMPILED = LoopSettings(device="cuda", engine="compiled", precision="fp16", buckets=[2, 4])
SETTINGS = [
    {"seed": 1, "steps": 6, "cfg": 4.0},
    {"seed": 2, "steps": 9, "cfg": 1.0},
    {"seed": 3, "steps": 8, "cfg": 3.0, "sampler_name": "heun"},
    {"seed": 4, "steps": 7, "cfg": 2.0, "sampler_name": "dpmpp_2m"},
]


BUCKETS = {"fp16": [2, 4], "bf16": [2]}


@dataclasses.dataclass
class Assembled:
    checkpoint: Path
    repository: Path
    config: PipelineConfig

    def load_unet(self):
        folder = self.repository / "scheduler_model/1/unet"
        return load_unet(folder, self.config, self.config.loop.devices[0])


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Random weights of each layout and precision, with few layers, all compiled at once."""
    folders = {
        (family, precision): tmp_path_factory.mktemp(f"{family}-{precision}")
        for family, precision in itertools.product(["sd1", "sdxl"], BUCKETS)
    }
    for (family, precision), folder in folders.items():
        dtype = torch_dtype(precision)
        build(family, folder / "checkpoint", dtype, sizes=LEAN, sample_size=16)

    # In processes: diffusers' loading changes torch's defaults for every thread of its own.
    with ProcessPoolExecutor(len(folders), multiprocessing.get_context("spawn")) as pool:
        made = pool.map(assembled, [precision for _, precision in folders], folders.values())
        return dict(zip(folders, made, strict=True))


def assembled(precision, folder):
    checkpoint, repository = folder / "checkpoint", folder / "repository"
    loop = dataclasses.replace(COMPILED, precision=precision, buckets=BUCKETS[precision])
    return Assembled(checkpoint, repository, assemble(checkpoint, repository, Choices(loop=loop)))


@pytest.fixture(params=["sd1", "sdxl"])
def pipeline(request, pipelines):
    """Of each layout, in fp16."""
    return pipelines[request.param, "fp16"]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("precision", BUCKETS)
def test_compiled_networks_are_close_to_fp32(family, precision, pipelines):
    """Of the same weights: to round another checkpoint's to bf16 costs 0.8 % by itself."""
    made = pipelines[family, precision]
    errors = relative_errors(made.repository, made.load_unet(), made.config)
    print(precision, errors)
    assert len(errors) >= len(BUCKETS[precision]) + 3
    for name, error in errors.items():
        assert math.isfinite(error), name
        assert error < 1e-2, f"{name}: {error}"


def test_text_on_a_gpu_is_what_it_is_on_a_cpu(pipeline):
    on_gpu, on_cpu = (
        PromptEncoder.from_folder(pipeline.checkpoint, device=device) for device in ("cuda", "cpu")
    )
    long = "a red circle, " * 60
    for prompts in (("a", ""), ("a (red:1.3) circle", "b"), ("a", ""), (long, "a"), (long, long)):
        for clip_skip in (None, -1, -2):
            got, wanted = (coder.encode(*prompts, clip_skip) for coder in (on_gpu, on_cpu))
            for name in wanted:
                torch.testing.assert_close(got[name].cpu(), wanted[name], rtol=1e-4, atol=1e-4)


def test_compiled_ticks_give_the_same_picture_in_company(pipeline):
    stages = LocalStages(pipeline.checkpoint, device="cuda", dtype=torch.float16)
    with LocalPipeline(pipeline.config, [pipeline.load_unet()], stages) as served:
        alone = [served.generate(prompt="a", **settings).latents for settings in SETTINGS]
        again = [served.generate(prompt="a", **settings).latents for settings in SETTINGS]
        futures = [served.submit(prompt="a", **settings) for settings in SETTINGS]
        beside = [future.result(timeout=60).latents for future in futures]
    for one, two, other in zip(alone, again, beside, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, two), "the same request twice differs"
        # Kernels for other numbers of rows round in another order.
        assert (one - other).norm() < 2e-2 * one.norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_gpus_share_a_queue(pipeline, tmp_path):
    loop = dataclasses.replace(COMPILED, device="cuda:0,cuda:1")
    config = assemble(pipeline.checkpoint, tmp_path / "repository", Choices(loop=loop))
    folder = tmp_path / "repository/scheduler_model/1/unet"
    unets = [load_unet(folder, config, device) for device in config.loop.devices]
    assert torch.cuda.current_device() == 0, "a load leaves another GPU as the thread's own"
    used = set()
    for unet in unets:
        unet.run = functools.partial(_noting_device, unet.run, used)
    stages = LocalStages(pipeline.checkpoint, device="cuda")
    with LocalPipeline(config, unets, stages) as served:
        alone = [served.generate(prompt="a", **settings).latents for settings in SETTINGS]
        for _ in range(3):
            futures = [served.submit(prompt="a", **settings) for settings in SETTINGS]
            for one, future in zip(alone, futures, strict=True):
                other = future.result(timeout=60).latents
                assert torch.isfinite(other).all()
                assert (one - other).norm() < 2e-2 * one.norm()
        batch = served.generate(prompt="a", batch_size=4, seed=1, steps=6, cfg=4.0)
        assert (batch.latents[:1] - alone[0]).norm() < 2e-2 * alone[0].norm()
    assert used == {torch.device("cuda", 0), torch.device("cuda", 1)}


def _noting_device(run, used, tensors):
    used.add(tensors["sample"].device)
    return run(tensors)


def test_threads_record_one_after_the_other():
    """Recording at the same time would end each other's recordings."""
    device, errors = torch.device("cuda"), []
    weights = torch.randn(256, 256, device=device)

    def work():
        try:
            graphs = CallGraphs(device, most=4)
            for rows in range(1, 9):
                given = torch.randn(rows, 256).to(device)  # its own dice belong to a recording
                for _ in range(2):
                    (got,) = graphs.call(rows, [given], lambda x: [(x @ weights).softmax(1)])
                    torch.testing.assert_close(got, (given @ weights).softmax(1))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


def test_a_graphed_unet_is_the_unet(pipeline):
    """Also where its inputs change from call to call, and with rows that it was not built for."""
    unet = pipeline.load_unet()
    graphed = GraphedUNet(unet, torch.device("cuda"))
    assert graphed.row_counts(16, 16, 77) == (2, 4)
    for rows in (2, 4, 2, 3, 2):
        inputs = unet_inputs(pipeline.config, rows, "cuda")
        wanted = unet.run(inputs)["noise_pred"].clone()
        got = graphed.run(inputs)["noise_pred"]
        assert (got - wanted).norm() < 1e-3 * wanted.norm(), rows
