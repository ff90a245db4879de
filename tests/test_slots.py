"""Seats, ticks of a fixed number of rows, and several loops behind one line."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from fullpipe.engines import Engine
from fullpipe.errors import Cancelled, Unavailable
from fullpipe.seats import Seats, pack_seats
from tests.conftest import DEVICE

SMALL = {"width": 128, "height": 128}
RED = "a red circle on a white background"
MIXED = [
    {"prompt": RED, "seed": 1, "steps": 6, "cfg": 4.0},
    {"prompt": "a blue square", "seed": 2, "steps": 9, "cfg": 1.0},
    {"prompt": "a green star", "seed": 3, "steps": 8, "sampler_name": "heun", "cfg": 3.0},
    {
        "prompt": "a pink heart",
        "seed": 4,
        "steps": 7,
        "sampler_name": "euler_ancestral",
        "cfg": 4.0,
    },
    {"prompt": "a black ring", "seed": 5, "steps": 9, "sampler_name": "dpmpp_2m", "cfg": 2.0},
]


class Built(Engine):
    """A real engine behind a few row counts; rows of empty seats are answered with NaN."""

    def __init__(self, engine: Engine, counts: tuple[int, ...]):
        self.engine, self.counts = engine, counts
        self.calls: list[tuple[int, int]] = []

    def row_counts(self, height, width, tokens):
        return self.counts

    def run(self, tensors):
        # The spare slot holds no prompt, and every prompt of a request gives embeddings.
        is_empty = tensors["encoder_hidden_states"].abs().amax((1, 2)) == 0
        self.calls.append((len(is_empty), int((~is_empty).sum())))
        noise_pred = self.engine.run(tensors)["noise_pred"]
        noise_pred[is_empty] = torch.nan
        return {"noise_pred": noise_pred}


class Counted(Engine):
    """A real engine that counts its rows, and says from which threads it was called."""

    def __init__(self, engine: Engine):
        self.engine, self.rows, self.threads = engine, 0, set()

    def run(self, tensors):
        self.rows += len(tensors["sample"])
        self.threads.add(threading.get_ident())
        return self.engine.run(tensors)


@pytest.mark.parametrize("rows", [None, 6, 8])
@pytest.mark.parametrize(
    "is_guided", list(itertools.product([True, False], repeat=3)), ids=lambda value: str(value)
)
def test_every_seat_finds_its_halves(is_guided, rows):
    slots, spare = [4, 0, 2], 9
    packed, count = pack_seats(slots, is_guided, spare, rows)
    seats = Seats.view(packed, count)
    needed = 3 + sum(is_guided)
    assert len(seats.seat) == len(seats.half) == (rows or needed)
    for n, slot in enumerate(slots):
        positive, negative = int(seats.positive[n]), int(seats.negative[n])
        assert seats.slot[n] == slot and seats.is_taken[n] == 1
        assert (seats.seat[positive], seats.half[positive]) == (n, 0)
        if is_guided[n]:
            assert (seats.seat[negative], seats.half[negative]) == (n, 1)
        else:
            assert negative == positive
    assert (seats.slot[3:] == spare).all() and (seats.is_taken[3:] == 0).all()
    assert (seats.slot[seats.seat[needed:]] == spare).all(), "an empty row reads somebody's slot"


def test_ticks_of_fixed_rows_change_nothing(open_pipeline, demo_unet, config):
    """What the rows of empty seats answer, NaN here, reaches no picture."""
    exact = open_pipeline()
    wanted = [exact.generate(**settings, **SMALL).latents for settings in MIXED]
    built = Built(demo_unet, (2, 4, 8))
    padded = open_pipeline(unet=built)
    futures = [padded.submit(**settings, **SMALL) for settings in MIXED]
    for future, latents in zip(futures, wanted, strict=True):
        difference = (future.result(timeout=60).latents - latents).abs().max()
        assert difference * config.checkpoint.scaling_factor < 1e-4
    assert {rows for rows, _ in built.calls} <= {2, 4, 8}
    assert any(live < rows for rows, live in built.calls), "no tick had an empty row"
    assert all(live >= 0.75 * rows or rows == 2 for rows, live in built.calls)


def test_several_loops_share_one_line(open_pipeline, demo_unet, config):
    alone = open_pipeline()
    wanted = [alone.generate(**settings, **SMALL).latents for settings in MIXED]
    unets = [Counted(demo_unet), Counted(demo_unet)]
    pipeline = open_pipeline(unets=unets, device=f"{DEVICE}, {DEVICE}")
    futures = [pipeline.submit(**settings, **SMALL) for settings in MIXED]
    for future, latents in zip(futures, wanted, strict=True):
        difference = (future.result(timeout=60).latents - latents).abs().max()
        assert difference * config.checkpoint.scaling_factor < 1e-4
    assert all(unet.rows for unet in unets), "one loop did all the work"
    assert all(len(unet.threads) == 1 for unet in unets)
    assert not unets[0].threads & unets[1].threads


def test_the_images_of_one_request_spread_over_loops(open_pipeline, demo_unet):
    settings = {"prompt": RED, "seed": 7, "steps": 6, "sampler_name": "dpmpp_2m_sde", "cfg": 2.0}
    wanted = open_pipeline().generate(batch_size=4, **settings, **SMALL)
    unets = [Counted(demo_unet), Counted(demo_unet)]
    pipeline = open_pipeline(unets=unets, device=f"{DEVICE},{DEVICE}")
    for _ in range(3):
        batch = pipeline.generate(batch_size=4, **settings, **SMALL)
        assert torch.allclose(batch.latents, wanted.latents, atol=1e-3)
    shares = [unet.rows / (3 * 4 * 2 * 6) for unet in unets]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0.2, shares


def test_a_job_in_two_loops_is_answered_once(open_pipeline, demo_unet):
    pipeline = open_pipeline(
        unets=[Counted(demo_unet), Counted(demo_unet)], device=f"{DEVICE},{DEVICE}"
    )
    doomed = pipeline.submit(prompt=RED, steps=150, batch_size=4, job_id="doomed", **SMALL)
    while pipeline.generate(op="progress", job_id="doomed", wait_ms=100).get("step", 0) < 1:
        pass
    pipeline.generate(op="cancel", job_id="doomed")
    with pytest.raises(Cancelled):  # a second answer would raise InvalidStateError in a loop
        doomed.result(timeout=10)
    assert pipeline.generate(prompt=RED, steps=2, **SMALL).images is not None
    left = [pipeline.submit(prompt=RED, steps=150, batch_size=3, **SMALL) for _ in range(2)]
    pipeline.close()
    for future in left:
        with pytest.raises(Unavailable, match="shutting down"):
            future.result(timeout=10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_recorded_tick_equals_an_eager_one(open_pipeline, checkpoint, config):
    from fullpipe.engines.torch_engine import TorchUNet

    eager = TorchUNet(checkpoint / "unet", device="cuda")
    eager.is_capturable = False
    wanted = open_pipeline(unet=eager, device="cuda")
    recorded = Built(TorchUNet(checkpoint / "unet", device="cuda"), (2, 4, 8))
    recorded.run = recorded.engine.run
    recorded.is_capturable = True
    graphs = open_pipeline(unet=recorded, device="cuda")
    futures = [graphs.submit(**settings, **SMALL) for settings in MIXED]
    for future, settings in zip(futures, MIXED, strict=True):
        difference = future.result().latents - wanted.generate(**settings, **SMALL).latents
        assert difference.abs().max() * config.checkpoint.scaling_factor < 1e-3
