"""The `compiled` engine on an NVIDIA GPU: close to fp32, and the loop's promises hold on it.

The loop's own tests run there too: `FULLPIPE_TEST_DEVICE=cuda pytest tests/test_loop.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading

import pytest
import torch

from bench.fidelity import relative_errors, unet_inputs
from fullpipe.assemble import Choices, assemble
from fullpipe.config import LoopSettings
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


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def checkpoint(request, tmp_path_factory):
    """Random weights of each layout, with few layers."""
    return random_checkpoint(request.param, "fp16", tmp_path_factory.mktemp(request.param))


def random_checkpoint(family, precision, folder):
    dtype = torch_dtype(precision)
    return build(family, folder / "checkpoint", dtype, sizes=LEAN, sample_size=16)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(("precision", "buckets"), [("fp16", [2, 4]), ("bf16", [2])])
def test_compiled_networks_are_close_to_fp32(family, precision, buckets, tmp_path):
    """Of the same weights: to round another checkpoint's to bf16 costs 0.8 % by itself."""
    checkpoint = random_checkpoint(family, precision, tmp_path)
    loop = dataclasses.replace(COMPILED, precision=precision, buckets=buckets)
    config = assemble(checkpoint, tmp_path / "repository", Choices(loop=loop))
    unet = load_unet(tmp_path / "repository/scheduler_model/1/unet", config, "cuda")
    errors = relative_errors(tmp_path / "repository", unet, config)
    print(precision, errors)
    assert len(errors) >= len(buckets) + 3
    for name, error in errors.items():
        assert math.isfinite(error), name
        assert error < 1e-2, f"{name}: {error}"


def test_text_on_a_gpu_is_what_it_is_on_a_cpu(checkpoint):
    on_gpu, on_cpu = (
        PromptEncoder.from_folder(checkpoint, device=device) for device in ("cuda", "cpu")
    )
    long = "a red circle, " * 60
    for prompts in (("a", ""), ("a (red:1.3) circle", "b"), ("a", ""), (long, "a"), (long, long)):
        for clip_skip in (None, -1, -2):
            got, wanted = (coder.encode(*prompts, clip_skip) for coder in (on_gpu, on_cpu))
            for name in wanted:
                torch.testing.assert_close(got[name].cpu(), wanted[name], rtol=1e-4, atol=1e-4)


def test_compiled_ticks_give_the_same_picture_in_company(checkpoint, tmp_path):
    config = assemble(checkpoint, tmp_path / "repository", Choices(loop=COMPILED))
    unet = load_unet(tmp_path / "repository/scheduler_model/1/unet", config, "cuda")
    stages = LocalStages(checkpoint, device="cuda", dtype=torch.float16)
    pipeline = LocalPipeline(config, [unet], stages)
    try:
        alone = [pipeline.generate(prompt="a", **settings).latents for settings in SETTINGS]
        again = [pipeline.generate(prompt="a", **settings).latents for settings in SETTINGS]
        futures = [pipeline.submit(prompt="a", **settings) for settings in SETTINGS]
        beside = [future.result(timeout=60).latents for future in futures]
    finally:
        pipeline.close()
    for one, two, other in zip(alone, again, beside, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, two), "the same request twice differs"
        # Kernels for other numbers of rows round in another order.
        assert (one - other).norm() < 2e-2 * one.norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_gpus_share_a_queue(checkpoint, tmp_path):
    loop = dataclasses.replace(COMPILED, device="cuda:0,cuda:1")
    config = assemble(checkpoint, tmp_path / "repository", Choices(loop=loop))
    folder = tmp_path / "repository/scheduler_model/1/unet"
    unets = [load_unet(folder, config, device) for device in config.loop.devices]
    used = set()
    for unet in unets:
        unet.run = functools.partial(_noting_device, unet.run, used)
    pipeline = LocalPipeline(config, unets, LocalStages(checkpoint, device="cuda"))
    try:
        alone = [pipeline.generate(prompt="a", **settings).latents for settings in SETTINGS]
        for _ in range(3):
            futures = [pipeline.submit(prompt="a", **settings) for settings in SETTINGS]
            for one, future in zip(alone, futures, strict=True):
                other = future.result(timeout=60).latents
                assert torch.isfinite(other).all()
                assert (one - other).norm() < 2e-2 * one.norm()
        batch = pipeline.generate(prompt="a", batch_size=4, seed=1, steps=6, cfg=4.0)
        assert (batch.latents[:1] - alone[0]).norm() < 2e-2 * alone[0].norm()
    finally:
        pipeline.close()
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
                given = torch.randn(rows, 256, device=device)
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


def test_a_graphed_unet_is_the_unet(checkpoint, tmp_path):
    """Also where its inputs change from call to call, and with rows that it was not built for."""
    config = assemble(checkpoint, tmp_path / "repository", Choices(loop=COMPILED))
    folder = tmp_path / "repository/scheduler_model/1/unet"
    unet = load_unet(folder, config, "cuda")
    graphed = GraphedUNet(unet, torch.device("cuda"))
    assert graphed.row_counts(16, 16, 77) == (2, 4)
    for rows in (2, 4, 2, 3, 2):
        inputs = unet_inputs(config, rows, "cuda")
        wanted = unet.run(inputs)["noise_pred"].clone()
        got = graphed.run(inputs)["noise_pred"]
        assert (got - wanted).norm() < 1e-3 * wanted.norm(), rows
