"""`fullpipe assemble` as a command: its options, and what they mean for `fullpipe.assemble`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fullpipe.client import DEFAULT_PIPELINE
from fullpipe.config import ENGINES, PRECISIONS, Limits, LoopSettings
from fullpipe.contract import SIZE_MULTIPLE_PX

REPOSITORY = Path("repository")


def add_options(command: argparse.ArgumentParser) -> None:
    """Give the command its checkpoint and its options."""
    limits, loop = Limits(), LoopSettings()
    add = command.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a diffusers folder or a .safetensors")
    add("--name", default=DEFAULT_PIPELINE, help="name of the pipeline on the server")
    add("--out", type=Path, default=REPOSITORY, metavar="DIR", help="the repository's folder")
    add("--device", default=loop.device, help="torch device of the loop and its UNet")
    add("--engine", choices=ENGINES, default=loop.engine, help="what executes the networks")
    add("--precision", choices=PRECISIONS, default=loop.precision, help="of the networks")
    add(
        "--sizes",
        type=_sizes,
        metavar="WxH,...",
        help="picture sizes that the engine is built for; left out: the checkpoint's own",
    )
    add(
        "--unet",
        choices=("loop", "bls", "plan"),
        default=loop.unet,
        help="in the loop, a model, or a model of Triton's own TensorRT backend",
    )
    add(
        "--vae",
        choices=("bls", "loop"),
        help="its decoder: a model, or there too; left out: there for compiled on a GPU",
    )
    add(
        "--defaults",
        type=_defaults,
        default={},
        metavar="NAME=VALUE,...",
        help="of requests, such as steps=4,cfg=1,sampler_name=lcm,scheduler=sgm_uniform",
    )
    add("--max-size", type=int, metavar="PX", help="largest side; left out: native size and half")
    add("--max-batch", type=int, default=limits.max_batch_size, metavar="N", help="per request")
    add("--max-rows", type=int, default=loop.max_rows, metavar="N", help="UNet rows of a tick")
    add("--step-cache", action="store_true", help="let requests ask for step_cache")


def run(args: argparse.Namespace) -> int:
    """Assemble, showing how far it is; returns the exit code."""
    from fullpipe.assemble import Choices, assemble
    from fullpipe.meter import Meter

    choices = Choices(
        name=args.name,
        limits=Limits(max_size_px=args.max_size or 0, max_batch_size=args.max_batch),
        loop=LoopSettings(
            device=args.device,
            engine=args.engine,
            precision=args.precision,
            sizes=args.sizes or [],
            unet=args.unet,
            vae=args.vae or _vae(args),
            max_rows=args.max_rows,
            step_cache=args.step_cache,
        ),
        defaults=args.defaults,
    )
    meter = Meter()
    try:
        assemble(args.checkpoint, args.out, choices, report=print, progress=meter)
    finally:
        meter.clear()
    print(f"serve it with: fullpipe serve {args.out}")
    return 0


def _vae(args: argparse.Namespace) -> str:
    """Two processes take turns on a GPU; a decoder in the loop's overlaps with other steps."""
    is_beside = args.engine == "compiled" and args.unet == "loop" and args.device != "cpu"
    return "loop" if is_beside else "bls"


def _sizes(text: str) -> list[list[int]]:
    try:
        sizes = [[int(side) for side in size.split("x")] for size in text.split(",")]
    except ValueError:
        sizes = [[]]
    if any(len(size) != 2 or any(s <= 0 or s % SIZE_MULTIPLE_PX for s in size) for size in sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be sizes such as 512x512,768x512, multiples of {SIZE_MULTIPLE_PX}"
        )
    return sizes


def _defaults(text: str) -> dict[str, str]:
    pairs = [pair.strip().partition("=") for pair in text.split(",")]
    if any(not (name and equals and value) for name, equals, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} must be like steps=4,cfg=1")
    return {name: value for name, _, value in pairs}
