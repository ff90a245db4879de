"""Step caching: how far its pictures are from the exact ones, and what it saves.

The number matters because step caching buys time with fidelity, and who turns it on must know the
price: the same captions and seeds are drawn with every value of `step_cache`, in turns within one
run. The same time could be saved with fewer steps, so those stand beside it: as many exact ones as
take the same time. Pixels have 256 levels; PSNR is of the mean squared error over all of them. A
picture that is another one may still be right, so the share of captions that are drawn rightly is
told too (`tests/picture.py` measures that). The demo's network is small and was trained on flat
shapes: its distances say little about Stable Diffusion's, for which arXiv:2312.00858
has figures.

    python -m bench.step_cache [--count 40] [--steps 20 50] [--values 1 2 3 5]
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.record import store
from bench.served import CHECKPOINT
from demo.captions import held_out_example
from demo.contact_sheet import sheet
from fullpipe.assemble import Choices, assemble
from fullpipe.config import LoopSettings
from fullpipe.engines import Engine
from fullpipe.engines.loading import load_unet
from fullpipe.local import LocalPipeline
from fullpipe.stages import LocalStages
from tests.picture import matches, measure

SHEET = Path(__file__).parent / "plots" / "step_cache.png"
SHEET_ROWS = 5
THUMB_PX = 256


class Timed(Engine):
    """A real engine that adds up the time of its calls."""

    has_shallow_pass = True

    def __init__(self, engine: Engine):
        self._engine = engine
        self.seconds = 0.0

    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Engine`."""
        started = time.perf_counter()
        answer = self._engine.run(tensors)
        self.seconds += time.perf_counter() - started
        return answer


@dataclasses.dataclass
class Drawn:
    """What came of one value of `step_cache`."""

    pictures: list[np.ndarray] = dataclasses.field(default_factory=list)
    unet_s: list[float] = dataclasses.field(default_factory=list)

    def measured(self, exact: Drawn, captions: list[str]) -> dict:
        """Distance from the exact pictures, and UNet time against theirs."""
        pairs = zip(self.pictures, exact.pictures, strict=True)
        errors = [got.astype(float) - wanted for got, wanted in pairs]
        squares = [float((error**2).mean()) for error in errors]
        psnr = [10 * np.log10(255**2 / square) for square in squares if square]
        rights = [matches(measure(p), c).all for p, c in zip(self.pictures, captions, strict=True)]
        unet_s = float(np.median(self.unet_s))
        return {
            "unet_ms": round(unet_s * 1e3, 1),
            "unet_time_ratio": round(unet_s / float(np.median(exact.unet_s)), 3),
            "mean_abs_difference": round(float(np.mean([abs(e).mean() for e in errors])), 2),
            "psnr_db_median": round(float(np.median(psnr)), 1) if psnr else None,
            "psnr_db_worst": round(min(psnr), 1) if psnr else None,
            "percent_right": round(100 * float(np.mean(rights)), 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--values", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--cfg", type=float, default=8.0)
    arguments = parser.parse_args()

    rng = random.Random(0)
    captions = [held_out_example(rng, things=1 + n % 2)[1] for n in range(arguments.count)]
    with tempfile.TemporaryDirectory(prefix="bench-step-cache-") as name:
        choices = Choices(loop=LoopSettings(step_cache=True))
        config = assemble(CHECKPOINT, Path(name) / "repository", choices)
    unet = Timed(load_unet(CHECKPOINT / "unet", config, "cpu"))
    by_steps, shown = {}, None
    with LocalPipeline(config, [unet], LocalStages(CHECKPOINT)) as pipeline:

        def draw(caption: str, seed: int, steps: int, value: int, into: Drawn) -> None:
            unet.seconds = 0.0
            asked = {"prompt": caption, "seed": seed, "steps": steps, "cfg": arguments.cfg}
            result = pipeline.generate(step_cache=value, **asked)
            assert result.images is not None
            into.pictures.append(result.images[0])
            into.unet_s.append(unet.seconds)

        draw(captions[0], 0, 3, 2, Drawn())
        for steps in arguments.steps:
            drawn = {value: Drawn() for value in {1: 0, **dict.fromkeys(arguments.values)}}
            for seed, caption in enumerate(captions):
                for value, into in drawn.items():
                    draw(caption, seed, steps, value, into)
            points = {value: some.measured(drawn[1], captions) for value, some in drawn.items()}
            for value, point in points.items():
                if value == 1:
                    continue
                fewer = Drawn()
                count = max(1, round(steps * point["unet_time_ratio"]))
                for seed, caption in enumerate(captions):
                    draw(caption, seed, count, 1, fewer)
                point["fewer_steps"] = {"steps": count, **fewer.measured(drawn[1], captions)}
            by_steps[str(steps)] = {str(value): point for value, point in points.items()}
            shown = shown or _sheet({v: some.pictures for v, some in drawn.items()}, captions)
    assert shown is not None
    shown.save(SHEET, optimize=True)
    store(
        "step_cache",
        {
            "request": f"demo, {config.defaults.width}x{config.defaults.height}, euler, cfg"
            f" {arguments.cfg:g}, one picture at a time",
            "captions": arguments.count,
            "sheet_steps": arguments.steps[0],
            "by_steps": by_steps,
        },
    )


def _sheet(pictures: Mapping[int, list[np.ndarray]], captions: list[str]) -> Image.Image:
    """Rows are captions, columns the values of `step_cache`."""
    rows = range(min(SHEET_ROWS, len(captions)))
    cells = [
        (own[row], f"{value}: {captions[row]}") for row in rows for value, own in pictures.items()
    ]
    return sheet(*zip(*cells, strict=True), columns=len(pictures), thumb=THUMB_PX)


if __name__ == "__main__":
    main()
