"""How often the demo checkpoint draws what an unseen caption asks for.

    python bench/demo_quality.py --count 300

The demo stands for Stable Diffusion in every test and benchmark of this repository; that is only
worth something if its pictures are right. Captions are of attribute combinations that training
never saw, half of them in wordings that it never saw either; `tests/picture.py` measures the
pictures. The last line is one JSON document, also written to `--out`.
"""

import argparse
import json
import platform
import random
import sys
import time
from pathlib import Path

import diffusers
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from picture import matches, measure  # noqa: E402

from demo.captions import held_out_example  # noqa: E402
from demo.sample import load, sample  # noqa: E402


def verdicts(parts, captions, seeds, batch, **options):
    """Sample and measure; returns one Verdict per caption and the seconds of sampling."""
    found, seconds = [], 0.0
    for start in range(0, len(captions), batch):
        part = slice(start, start + batch)
        began = time.perf_counter()
        images = sample(parts, captions[part], seeds[part], **options)
        seconds += time.perf_counter() - began
        found += [
            matches(measure(image), caption)
            for image, caption in zip(images, captions[part], strict=True)
        ]
    return found, seconds


def summary(examples, found):
    """Percentages over all captions, over single objects and over pairs."""

    def percent(name, chosen):
        return round(100 * sum(getattr(verdict, name) for verdict in chosen) / len(chosen), 2)

    is_pair = [len(scene.things) == 2 for scene, _ in examples]
    groups = {
        "all": found,
        "one_object": [v for v, pair in zip(found, is_pair, strict=True) if not pair],
        "two_objects": [v for v, pair in zip(found, is_pair, strict=True) if pair],
    }
    names = ("colour", "background", "shape", "bound", "place", "size", "count", "all")
    return {
        group: {"captions": len(chosen), **{name: percent(name, chosen) for name in names}}
        for group, chosen in groups.items()
        if chosen
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=str(ROOT / "demo/checkpoint"))
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=8.0)
    parser.add_argument("--size", default="256", help="256, or 256x384 for height x width")
    parser.add_argument("--sampler", choices=("euler", "dpmpp_2m"), default="euler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default=str(ROOT / "bench/results/demo_quality.json"))
    args = parser.parse_args()

    height, _, width = args.size.partition("x")
    rng = random.Random(args.seed)
    examples = [held_out_example(rng, things=1 + n % 2) for n in range(args.count)]
    captions = [caption for _, caption in examples]
    seeds = [args.seed * 100_000 + n for n in range(args.count)]
    options = {
        "size": (int(height), int(width or height)),
        "steps": args.steps,
        "cfg": args.cfg,
        "sampler": args.sampler,
    }
    parts = load(args.checkpoint, args.device)
    found, seconds = verdicts(parts, captions, seeds, args.batch, **options)
    failures = [
        {"caption": caption, "seed": seed, "wrong": [k for k, ok in vars(v).items() if not ok]}
        for caption, seed, v in zip(captions, seeds, found, strict=True)
        if not v.all
    ]
    for failure in failures:
        print(f"seed {failure['seed']}: {failure['caption']} | {', '.join(failure['wrong'])}")
    report = {
        "command": f"python bench/demo_quality.py --count {args.count} --steps {args.steps} "
        f"--cfg {args.cfg:g} --size {args.size} --sampler {args.sampler} --seed {args.seed}",
        "percent_right": summary(examples, found),
        "failures": failures,
        "sampling_s": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "device": args.device,
        },
    }
    Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({**report, "failures": len(failures)}))


if __name__ == "__main__":
    main()
