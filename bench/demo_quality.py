"""How often the demo checkpoint draws what an unseen caption asks for.

The demo stands for Stable Diffusion in every test and benchmark of this repository; that is only
worth something if its pictures are right. Captions are of attribute combinations that training
never saw, half of them in wordings that it never saw either, half of them of two objects;
`tests/picture.py` measures the pictures without knowing how they were made.

    python -m bench.demo_quality [--count 300] [--steps 20] [--size 256] [--cfg 8]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch

from bench.record import store
from demo.captions import held_out_example
from demo.sample import load, sample
from tests.picture import Verdict, matches, measure

CHECKPOINT = Path(__file__).parents[1] / "demo" / "checkpoint"
PARTS = ("colour", "background", "shape", "bound", "place", "size", "count", "all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=8.0)
    parser.add_argument("--size", default="256", help="256, or 256x384 for height x width")
    parser.add_argument("--sampler", choices=("euler", "dpmpp_2m"), default="euler")
    parser.add_argument("--all-colours", action="store_true", help="gray and purple too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--print-only", action="store_true", help="store no result")
    arguments = parser.parse_args()

    height, _, width = arguments.size.partition("x")
    rng = random.Random(arguments.seed)
    examples = [
        held_out_example(rng, things=1 + n % 2, is_any_colour=arguments.all_colours)
        for n in range(arguments.count)
    ]
    captions = [caption for _, caption in examples]
    seeds = [arguments.seed * 100_000 + n for n in range(arguments.count)]
    parts = load(arguments.checkpoint, arguments.device)
    verdicts: list[Verdict] = []
    seconds = 0.0
    for start in range(0, len(captions), arguments.batch):
        part = slice(start, start + arguments.batch)
        began = time.perf_counter()
        images = sample(
            parts,
            captions[part],
            seeds[part],
            size=(int(height), int(width or height)),
            steps=arguments.steps,
            cfg=arguments.cfg,
            sampler=arguments.sampler,
        )
        seconds += time.perf_counter() - began
        for image, caption, seed in zip(images, captions[part], seeds[part], strict=True):
            verdicts.append(matches(measure(image), caption))
            if not verdicts[-1].all:
                wrong = [name for name in PARTS if not getattr(verdicts[-1], name)]
                print(f"seed {seed}: {caption} | {', '.join(wrong)}", flush=True)

    groups = {
        "all": verdicts,
        "one_object": verdicts[0::2],
        "two_objects": verdicts[1::2],
    }
    result = {
        "percent_right": {name: shares(chosen) for name, chosen in groups.items() if chosen},
        "sampling_s": round(seconds, 1),
        "device": arguments.device,
    }
    if arguments.print_only:
        print(json.dumps(result))
    else:
        store("demo_quality", result)


def shares(verdicts: list[Verdict]) -> dict:
    """Per cent of the verdicts that are right, by part of the caption."""
    percent = {
        name: round(100 * sum(getattr(v, name) for v in verdicts) / len(verdicts), 1)
        for name in PARTS
    }
    return {"captions": len(verdicts), **percent}


if __name__ == "__main__":
    main()
