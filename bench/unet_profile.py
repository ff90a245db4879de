"""Where the time of a UNet call goes on a GPU: attention, convolutions, products, all between.

The numbers matter because they say what is worth making faster. Kernels are told apart by their
names; times are those of the kernels alone, summed up over calls of an assembled pipeline's UNet on
random inputs at its native size, which the GPU runs one after the other. The decoder's call for one
picture is taken apart in the same way.

    python -m bench.unet_profile FOLDER --name sd1 [--rows 2 16]
"""

from __future__ import annotations

import argparse
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.fidelity import unet_inputs
from bench.record import store
from fullpipe.config import PipelineConfig
from fullpipe.engines.loading import load_unet, load_vae_decoder

CALLS = 5
LONGEST = 40
# The first that matches. Inductor says in a kernel's name what it fused, a convolution's bias too.
KINDS = {
    "matrix product, by Triton": r"^triton_tem",
    "norms: sums": r"^triton_(red|per)",
    # `as_strided` is left by `fullpipe.engines.memory_order`, which keeps a norm's scale so.
    "norms applied": r"^triton_poi\w*(group_norm|layer_norm|as_strided)",
    "element by element": r"^triton_",
    "attention": r"sdpa|fmha|flash|attention",
    "convolution": r"fprop|conv(?!ert)|implicit|nchw|nhwc|winograd|im2col",
    "matrix product": r"gemm|nvjet|cublas|cutlass|splitK",
    "copies": r"copy|memset|memcpy|elementwise|vectorized",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository", type=Path, help="assembled, with the UNet in the loop")
    parser.add_argument("--name", required=True, help="of the result: unet_profile_NAME")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 16])
    arguments = parser.parse_args()
    folder = arguments.repository / "scheduler_model" / "1"
    config = PipelineConfig.load(folder / "pipeline.json")
    device = config.loop.devices[0]
    unet = load_unet(folder / "unet", config, device)
    by_rows = {}
    for rows in arguments.rows:
        inputs = unet_inputs(config, rows, device)
        by_rows[str(rows)] = _profiled(functools.partial(unet.run, inputs))
    decoder = load_vae_decoder(
        arguments.repository / config.models.vae_decoder / "1" / "vae", config, device
    )
    latents = torch.randn(1, *unet_inputs(config, 1, device)["sample"].shape[1:], device=device)
    store(
        f"unet_profile_{arguments.name}",
        {
            "device": torch.cuda.get_device_name(device),
            "network": f"UNet at {config.defaults.width}x{config.defaults.height},"
            f" {config.loop.engine}, {config.loop.precision}",
            "by_rows": by_rows,
            "decoder": _profiled(functools.partial(decoder.decode, latents)),
        },
        "unet_profile",
    )


def _profiled(call: Callable[[], object]) -> dict:
    """Of one call, the average of some, after one that is not counted."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    return by_kind(
        (event.key, event.count / CALLS, event.self_device_time_total / CALLS / 1e3)
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )


def by_kind(kernels: Iterable[tuple[str, float, float]]) -> dict:
    """Sums by kind, and the longest kernels.

    Args:
        kernels: name, calls and milliseconds of each, in one UNet call.
    """
    kernels = sorted(kernels, key=lambda kernel: -kernel[2])
    total = sum(milliseconds for _, _, milliseconds in kernels)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, calls, milliseconds in kernels:
        kind = kind_of(name)
        sums[kind][0] += milliseconds
        sums[kind][1] += calls
    return {
        "kernels_ms": round(total, 3),
        "kinds": {
            kind: {
                "ms": round(milliseconds, 3),
                "percent": round(100 * milliseconds / total, 1),
                "kernels": round(calls),
            }
            for kind, (milliseconds, calls) in sorted(sums.items(), key=lambda item: -item[1][0])
        },
        "longest": [
            {"kernel": name[:120], "calls": round(calls), "ms": round(milliseconds, 3)}
            for name, calls, milliseconds in kernels[:LONGEST]
        ],
    }


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return "other"


if __name__ == "__main__":
    main()
