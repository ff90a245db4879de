"""What a sampler step costs the loop, by the number of slots.

The numbers matter because the loop advances any mix of samplers at once, so what the host does
must not grow with the batch: `operations` counts what it launches, and a latent of size 1 times
little but those launches. The rest is arithmetic, the device's part.

    python -m bench.advance [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.record import store
from fullpipe.samplers import REGISTERS, SAMPLERS, advance, build_table
from fullpipe.schedulers import ModelSampling, calculate_sigmas

SLOTS = (1, 8, 32)
# Launches alone; then latents of the demo checkpoint, of SD1.5 and of SDXL at their native sizes.
LATENT_SIZES = (1, 32, 64, 128)
REPEATS = 50


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
        ticks = {slots: _tick(rows, slots, size, device) for slots in SLOTS}
        times = {slots: _time(tick, device) for slots, tick in ticks.items()}
        measured += [
            {
                "latent": size,
                "slots": slots,
                "operations": _count_operations(ticks[slots]),
                "ms": round(times[slots], 4),
                "over_one_slot": round(times[slots] / times[1], 2),
            }
            for slots in SLOTS
        ]
    name = "advance" if device.type == "cpu" else f"advance_{device.type}"
    store(name, {"advance": measured, "table_of_20_steps_ms": _time_tables(sampling)})


def _mixed_rows(sampling: ModelSampling) -> np.ndarray:
    """One row of the middle of every sampler's table: [samplers, K, K + 3]."""
    sigmas = {name: calculate_sigmas(sampling, "normal", 20, 1.0, name) for name in SAMPLERS}
    return np.stack([build_table(name, sigmas[name], sampling).matrices[10] for name in SAMPLERS])


def _tick(
    rows: np.ndarray, slots: int, size: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """The arguments of advance() for so many slots, each of another sampler."""
    registers = torch.randn(slots, REGISTERS, 4, size, size, device=device)
    denoised, uncond_denoised, noise = torch.randn(3, slots, 4, size, size, device=device)
    chosen = torch.from_numpy(rows[np.arange(slots) % len(rows)]).float().to(device)
    return registers, denoised, uncond_denoised, noise, chosen


def _time(tick: tuple[torch.Tensor, ...], device: torch.device) -> float:
    """Median milliseconds until the result is there."""
    times = []
    for _ in range(REPEATS + 3):
        start = time.perf_counter()
        advance(*tick)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[3:])


class _Counter(TorchDispatchMode):
    """Counts the operations that reach a device; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += not function.is_view
        return function(*args, **(kwargs or {}))


def _count_operations(tick: tuple[torch.Tensor, ...]) -> int:
    with _Counter() as counter:
        advance(*tick)
    return counter.operations


def _time_tables(sampling: ModelSampling) -> dict[str, float]:
    """Median milliseconds to compute the sigmas and the table of a request, by sampler."""
    medians = {}
    for name in SAMPLERS:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            build_table(name, calculate_sigmas(sampling, "normal", 20, 1.0, name), sampling)
            times.append((time.perf_counter() - start) * 1e3)
        medians[name] = round(statistics.median(times), 3)
    return medians


if __name__ == "__main__":
    main()
