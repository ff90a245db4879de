"""One picture against diffusers' own StableDiffusionPipeline, same weights, steps and guidance.

The number matters because whoever serves instead of calling diffusers must not wait longer for a
single picture. Both run in this process and take turns; both decode to pixels.

    python -m bench.diffusers_pipeline [--count 12]
"""

from __future__ import annotations

import argparse
import time

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

from bench.record import spread, store
from bench.served import CHECKPOINT, prompts, served_demo
from fullpipe.client import Client
from fullpipe.local import LocalPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    theirs = StableDiffusionPipeline.from_pretrained(
        CHECKPOINT, dtype=torch.float32, local_files_only=True
    )
    theirs.scheduler = EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    captions, steps = prompts(), arguments.steps
    seconds: dict[str, list[float]] = {"diffusers": [], "in_process": [], "over_http": []}
    with served_demo() as (server, config), LocalPipeline.open(CHECKPOINT, config) as local:
        client = Client(server.url)
        for number in range(arguments.count + 2):
            prompt = next(captions)
            generator = torch.Generator().manual_seed(number)
            ways = {
                "diffusers": lambda prompt=prompt, generator=generator: theirs(
                    prompt, num_inference_steps=steps, guidance_scale=8.0, generator=generator
                ),
                "in_process": lambda prompt=prompt, seed=number: local.generate(
                    prompt=prompt, seed=seed, steps=steps
                ),
                "over_http": lambda prompt=prompt, seed=number: client.generate(
                    prompt, seed=seed, steps=steps
                ),
            }
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                if number >= 2:  # the first ones warm up
                    seconds[name].append(time.perf_counter() - started)
    spreads = {name: spread(values) for name, values in seconds.items()}
    base = spreads["diffusers"]["p50_ms"]
    store(
        "diffusers_pipeline",
        {
            "request": f"256x256, {arguments.steps} steps, euler, cfg 8, one picture",
            **spreads,
            "in_process_over_diffusers": round(spreads["in_process"]["p50_ms"] / base, 3),
            "over_http_over_diffusers": round(spreads["over_http"]["p50_ms"] / base, 3),
        },
    )


if __name__ == "__main__":
    main()
