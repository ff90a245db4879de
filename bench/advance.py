"""What a sampler step costs the loop, by the number of slots; writes bench/results/advance.json.

Run it as `python bench/advance.py [--device cuda]`. The loop advances any mix of samplers at once,
so the host's part must not grow with the batch: compare the columns of one run with each other, not
with another machine's.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fullpipe.samplers import REGISTERS, SAMPLERS, advance, build_table  # noqa: E402
from fullpipe.schedulers import ModelSampling, calculate_sigmas  # noqa: E402

SLOTS = (1, 8, 32)
# Latents of the demo checkpoint, of SD1.5 and of SDXL at their native sizes.
LATENT_SIZES = (32, 64, 128)
REPEATS = 30


def main() -> None:
    """Time advance() for mixed samplers and the making of their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    torch.set_num_threads(1)
    sampling = ModelSampling.from_scheduler_config({})
    rows = _mixed_rows(sampling)

    measured = []
    for size in LATENT_SIZES:
        times = {slots: _time_advance(rows, slots, size, device) for slots in SLOTS}
        for slots, (host_ms, total_ms) in times.items():
            measured.append(
                {
                    "latent": size,
                    "slots": slots,
                    "host_ms": round(host_ms, 4),
                    "total_ms": round(total_ms, 4),
                    "total_over_one_slot": round(total_ms / times[1][1], 2),
                }
            )
    document = {
        "benchmark": "advance",
        "command": shlex.join(["python", *sys.argv]),
        "machine": _machine(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "samplers_mixed": len(SAMPLERS),
        "advance": measured,
        "table_of_20_steps_ms": _time_tables(sampling),
    }
    results = ROOT / "bench" / "results"
    results.mkdir(exist_ok=True)
    suffix = "" if device.type == "cpu" else f"_{device.type}"
    (results / f"advance{suffix}.json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


def _mixed_rows(sampling: ModelSampling) -> np.ndarray:
    """One row of the middle of every sampler's table: [samplers, K, K + 3]."""
    sigmas = {name: calculate_sigmas(sampling, "normal", 20, 1.0, name) for name in SAMPLERS}
    return np.stack([build_table(name, sigmas[name], sampling).matrices[10] for name in SAMPLERS])


def _time_advance(
    rows: np.ndarray, slots: int, size: int, device: torch.device
) -> tuple[float, float]:
    """Median milliseconds until advance() returns, and until its result is there."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    registers = random(slots, REGISTERS, 4, size, size)
    denoised, uncond_denoised, noise = (random(slots, 4, size, size) for _ in range(3))
    chosen = torch.from_numpy(rows[np.arange(slots) % len(rows)]).float().to(device)
    host, total = [], []
    for _ in range(REPEATS + 3):
        start = time.perf_counter()
        advance(registers, denoised, uncond_denoised, noise, chosen)
        returned = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.synchronize()
        host.append((returned - start) * 1e3)
        total.append((time.perf_counter() - start) * 1e3)
    return statistics.median(host[3:]), statistics.median(total[3:])


def _time_tables(sampling: ModelSampling) -> dict[str, float]:
    """Milliseconds to compute the sigmas and the table of a request, by sampler."""
    times = {}
    for name in SAMPLERS:
        start = time.perf_counter()
        for _ in range(5):
            build_table(name, calculate_sigmas(sampling, "normal", 20, 1.0, name), sampling)
        times[name] = round((time.perf_counter() - start) / 5 * 1e3, 3)
    return times


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, 1 thread"


if __name__ == "__main__":
    main()
