"""Step caching in the loop: whole and shallow ticks, with the real demo networks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fullpipe.assemble import Choices, assemble
from fullpipe.cli import main
from fullpipe.config import LoopSettings, PipelineConfig
from fullpipe.engines import Engine
from fullpipe.engines.torch_engine import TorchUNet
from fullpipe.errors import Cancelled, InvalidRequest, PipelineError, SetupError
from fullpipe.row_counts import RowCounts
from tests.conftest import DEVICE
from tests.test_loop import wait_until

SMALL = {"width": 128, "height": 128}
RED = "a red circle on a white background"
MIXED = [
    {"prompt": RED, "seed": 1, "steps": 7, "cfg": 4.0, "step_cache": 2},
    {"prompt": "a blue square", "seed": 2, "steps": 9, "cfg": 1.0, "step_cache": 3},
    {"prompt": "a green star", "seed": 3, "steps": 5, "sampler_name": "heun", "cfg": 3.0},
    {
        "prompt": "a pink heart",
        "seed": 4,
        "steps": 7,
        "sampler_name": "euler_ancestral",
        "cfg": 4.0,
        "step_cache": 3,
    },
    {"prompt": "a black ring", "seed": 5, "steps": 9, "sampler_name": "dpmpp_2m", "cfg": 2.0},
    {
        "prompt": "a cyan hexagon",
        "seed": 6,
        "steps": 4,
        "sampler_name": "heun",
        "cfg": 1.0,
        "step_cache": 2,
    },
]


class Counted(Engine):
    """A real engine that notes of each call its kind and rows; may have fixed numbers of rows.

    What it answers for rows of empty seats is NaN.
    """

    def __init__(self, engine: Engine, counts: tuple[int, ...] = ()):
        self.engine, self.counts = engine, counts
        self.has_shallow_pass = engine.has_shallow_pass
        self.calls: list[tuple[str, int]] = []
        self.before = lambda tensors: None

    def row_counts(self, height, width, tokens):
        return self.counts

    def run(self, tensors):
        self.before(tensors)
        kind = "shallow" if "deep" in tensors else "whole"
        self.calls.append((kind, len(tensors["sample"])))
        is_empty = tensors["encoder_hidden_states"].abs().amax((1, 2)) == 0
        answer = self.engine.run(tensors)
        for tensor in answer.values():
            tensor[is_empty] = torch.nan
        return answer


@pytest.fixture(scope="module")
def unet(checkpoint):
    return TorchUNet(checkpoint / "unet", device=DEVICE, step_cache=True)


@pytest.fixture
def counted(unet):
    return Counted(unet)


@pytest.fixture(scope="module")
def repository_with(checkpoint, tmp_path_factory):
    """A repository of a pipeline that serves step caching."""
    out = tmp_path_factory.mktemp("cached") / "repository"
    assert main(["assemble", str(checkpoint), "--out", str(out), "--step-cache"]) == 0
    return out


def kinds(engine: Counted) -> list[str]:
    return [kind for kind, _ in engine.calls]


@pytest.mark.parametrize("step_cache", [1, 2, 3, 10])
def test_the_whole_unet_runs_at_every_nth_row(open_pipeline, counted, step_cache):
    pipeline = open_pipeline(unet=counted)
    info = pipeline.generate(prompt=RED, steps=7, step_cache=step_cache, **SMALL).info
    wanted = ["shallow" if row % step_cache else "whole" for row in range(7)]
    assert kinds(counted) == wanted
    assert info["step_cache"] == step_cache


def test_rows_of_the_table_are_counted_not_steps(open_pipeline, counted):
    """A step of heun looks at the UNet twice, but the last."""
    pipeline = open_pipeline(unet=counted)
    pipeline.generate(prompt=RED, steps=3, sampler_name="heun", step_cache=2, **SMALL)
    assert kinds(counted) == ["whole", "shallow", "whole", "shallow", "whole"]


@pytest.mark.parametrize("settings", MIXED[2::2], ids=lambda s: s.get("sampler_name"))
def test_1_is_what_a_pipeline_without_it_makes(open_pipeline, unet, config, settings):
    plain, cached = open_pipeline(), open_pipeline(unet=unet)
    settings = {**settings, "step_cache": 1}
    wanted, got = (p.generate(**settings, **SMALL) for p in (plain, cached))
    difference = (got.latents - wanted.latents).abs().max() * config.checkpoint.scaling_factor
    assert difference < 1e-5


@pytest.mark.parametrize("step_cache", [2, 3])
def test_alone_twice_is_bit_equal(open_pipeline, unet, step_cache):
    pipeline = open_pipeline(unet=unet)
    wanted = {"prompt": RED, "seed": 7, "steps": 8, "step_cache": step_cache, **SMALL}
    first, second = (pipeline.generate(**wanted) for _ in range(2))
    assert torch.equal(first.latents, second.latents)
    exact = pipeline.generate(**{**wanted, "step_cache": 1})
    assert (exact.latents - first.latents).abs().max() > 1e-2, "nothing was cached"


@pytest.mark.parametrize("counts", [(), (2, 4, 8)], ids=str)
def test_same_images_alone_and_beside_others(open_pipeline, unet, config, counts):
    """Mixed rhythms, samplers and guidance; what the rows of empty seats answer reaches nobody."""
    alone = open_pipeline(unet=unet)
    wanted = [alone.generate(**settings, **SMALL).latents for settings in MIXED]
    counted = Counted(unet, counts)
    together = open_pipeline(unet=counted)
    for _ in range(2):  # slots that others have left
        futures = [together.submit(**settings, **SMALL) for settings in MIXED]
        for future, latents in zip(futures, wanted, strict=True):
            difference = (future.result(timeout=60).latents - latents).abs().max()
            assert difference * config.checkpoint.scaling_factor < 1e-4
    for kind in ("whole", "shallow"):
        assert any(rows > 2 for found, rows in counted.calls if found == kind), "nobody met"
    if counts:
        assert {rows for _, rows in counted.calls} <= set(counts)


def test_what_a_shallow_tick_costs_says_nothing_of_whole_ones(open_pipeline, unet, monkeypatch):
    """The loop learns what numbers of rows cost; a shallow tick takes a third of the time."""
    seen: dict[bool, list[float]] = {False: [], True: []}
    monkeypatch.setattr(
        RowCounts, "saw", lambda _, kind, count, seconds: seen[kind[1]].append(seconds)
    )
    pipeline = open_pipeline(unet=Counted(unet, (2, 4)))
    pipeline.generate(prompt=RED, steps=12, step_cache=3, **SMALL)
    assert [len(seen[is_shallow]) for is_shallow in (False, True)] == [4, 8]


def test_images_of_one_rhythm_find_each_other(open_pipeline, counted):
    """Whoever is out of phase is met halfway: the one that waits takes those along that fit."""
    pipeline = open_pipeline(unet=counted)
    first = pipeline.submit(prompt=RED, seed=1, steps=40, cfg=1.0, step_cache=2, **SMALL)
    wait_until(lambda: len(counted.calls) >= 3)
    pipeline.submit(prompt=RED, seed=2, steps=12, cfg=1.0, step_cache=2, **SMALL).result()
    rows = [rows for _, rows in counted.calls]
    assert not first.done()
    assert rows.count(2) >= 11
    first.result()


def test_nobody_starves(open_pipeline, counted):
    """Before every tick there is a newcomer again, due for a whole pass, and two rows are all."""
    pipeline = open_pipeline(unet=counted, max_rows=2)
    line = pipeline._pipeline._line
    big = {"width": 256, "height": 256, "cfg": 1.0}
    newcomers = []

    def let_another_one_in(tensors):
        if len(newcomers) < 40:
            newcomers.append(pipeline.submit(prompt=RED, steps=1, **big))
            wait_until(line.jobs)

    counted.before = let_another_one_in
    patient = pipeline.submit(prompt=RED, steps=9, step_cache=3, job_id="patient", **big)
    patient.result(timeout=60)
    assert len(newcomers) < 25, "newcomers came before it"
    for future in newcomers:
        future.result(timeout=20)


def test_a_cancelled_job_leaves_no_trace_in_its_slot(open_pipeline, counted):
    wanted = {"prompt": "a blue square", "seed": 3, "steps": 6, "step_cache": 3, **SMALL}
    expected = open_pipeline(unet=counted.engine).generate(**wanted).latents
    pipeline = open_pipeline(unet=counted, slots=1)
    doomed = pipeline.submit(prompt=RED, steps=150, step_cache=2, job_id="doomed", **SMALL)
    wait_until(lambda: len(counted.calls) >= 3)
    waiting = pipeline.submit(**wanted)
    pipeline.generate(op="cancel", job_id="doomed")
    with pytest.raises(Cancelled):
        doomed.result(timeout=10)
    assert torch.equal(waiting.result(timeout=20).latents, expected)


def test_a_failing_job_spares_the_others(open_pipeline, counted):
    def fail_on_huge(tensors):
        if "deep" in tensors and tensors["sample"].abs().max() > 1e4:
            raise RuntimeError("device-side failure")

    counted.before = fail_on_huge
    pipeline = open_pipeline(unet=counted)
    wanted = {"prompt": RED, "steps": 6, "step_cache": 2, **SMALL}
    good = [pipeline.submit(seed=n, **wanted) for n in range(2)]
    latents = np.full((1, 4, 16, 16), 1e8, np.float32)
    bad = pipeline.submit(prompt=RED, steps=6, step_cache=2, latents=latents)
    with pytest.raises(PipelineError, match="the denoising step failed"):
        bad.result(timeout=20)
    for future in good:
        assert future.result(timeout=20).latents.isfinite().all()


def test_a_masked_picture_and_a_batch(open_pipeline, unet):
    pipeline = open_pipeline(unet=unet)
    start = np.full((1, 128, 128, 3), 255, np.uint8)
    mask = np.zeros((1, 128, 128), np.uint8)
    mask[:, :, 64:] = 255
    wanted = {"prompt": RED, "seed": 3, "steps": 6, "init_image": start, "mask": mask}
    exact, cached = (pipeline.generate(step_cache=n, batch_size=2, **wanted) for n in (1, 2))
    kept, painted = (slice(None, 8), slice(9, None))
    assert torch.allclose(cached.latents[..., kept], exact.latents[..., kept], atol=1e-4)
    assert not torch.allclose(cached.latents[..., painted], exact.latents[..., painted], atol=1e-2)


def test_a_pipeline_without_it_says_how_to_get_it(open_pipeline):
    pipeline = open_pipeline()
    said = r"^step_cache=2 is not served by this pipeline, allowed 1; `fullpipe assemble … --step-c"
    with pytest.raises(InvalidRequest, match=said) as caught:
        pipeline.generate(prompt=RED, step_cache=2, **SMALL)
    assert "\n" not in str(caught.value)
    assert pipeline.generate(prompt=RED, step_cache=1, steps=1, **SMALL).info["step_cache"] == 1


@pytest.mark.parametrize("value", [-1, 0, 11, 2**31 - 1])
def test_a_rhythm_out_of_range(open_pipeline, unet, value):
    with pytest.raises(InvalidRequest, match=f"step_cache={value} is out of range, allowed 1 … 10"):
        open_pipeline(unet=unet).generate(prompt=RED, step_cache=value, **SMALL)


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "onnx"},
        {"engine": "tensorrt"},
        {"unet": "bls"},
        {"engine": "tensorrt", "unet": "plan"},
        {"engine": "compiled", "unet": "bls"},
    ],
    ids=str,
)
def test_what_cannot_serve_it_is_refused_before_anything_is_built(checkpoint, tmp_path, settings):
    choices = Choices(loop=LoopSettings(step_cache=True, **settings))
    said = "allowed: engine=torch or compiled with unet=loop"
    with pytest.raises(SetupError, match=said) as caught:
        assemble(checkpoint, tmp_path / "repository", choices)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "repository").iterdir())


def test_an_assembled_pipeline_says_that_it_serves_it(repository_with, repository):
    for folder, has_it in ((repository_with, True), (repository, False)):
        config = PipelineConfig.load(folder / "scheduler_model" / "1" / "pipeline.json")
        assert config.loop.step_cache is has_it
        ensemble = (folder / "full_pipeline" / "config.pbtxt").read_text(encoding="utf-8")
        assert f'\\"step_cache\\": {json.dumps(has_it)}' in ensemble


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_recorded_ticks_equal_eager_ones(open_pipeline, checkpoint, config):
    """A graph of each kind of tick, with empty seats; the second round replays."""
    eager = TorchUNet(checkpoint / "unet", device="cuda", step_cache=True)
    eager.is_capturable = False
    wanted = open_pipeline(unet=eager, device="cuda")
    graphs = open_pipeline(
        unet=TorchUNet(checkpoint / "unet", device="cuda", step_cache=True), device="cuda"
    )
    for _ in range(2):
        futures = [graphs.submit(**settings, **SMALL) for settings in MIXED]
        for future, settings in zip(futures, MIXED, strict=True):
            difference = future.result().latents - wanted.generate(**settings, **SMALL).latents
            assert difference.abs().max() * config.checkpoint.scaling_factor < 1e-3
