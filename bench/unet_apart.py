"""The UNet in the loop's own process against the UNet as a Triton model of its own, over BLS.

The number matters because a UNet of its own has its own version, metrics and place, and costs a
call of another process in every step. Both pipelines are on one server and take turns, so the
difference of a tick is what the call costs.

    python -m bench.unet_apart [--count 16] [--rounds 2]
"""

from __future__ import annotations

import argparse
import itertools

from bench.record import spread, store
from bench.served import load, prompts, read_metrics, served_demo
from fullpipe.assemble import Choices
from fullpipe.client import DEFAULT_PIPELINE, Client
from fullpipe.config import LoopSettings

PIPELINES = {"in_loop": DEFAULT_PIPELINE, "over_bls": "apart"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=16, help="requests of a phase")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()

    captions, seeds = prompts(), itertools.count()
    shape = {"width": arguments.size, "height": arguments.size, "steps": arguments.steps}
    apart = Choices(name=PIPELINES["over_bls"], loop=LoopSettings(unet="bls"))
    with served_demo(None, apart) as (server, _):

        def measure(way: str, concurrency: int) -> tuple[float, list[float], float, float]:
            """Seconds in all, seconds of each, seconds in ticks, ticks."""
            client = Client(server.url, PIPELINES[way])
            label = f'pipeline="{PIPELINES[way]}"'
            before = read_metrics(server.metrics_url, label)

            def make(_: int) -> object:
                return client.generate(next(captions), seed=next(seeds), **shape)

            seconds, each, _ = load(make, arguments.count, concurrency)
            after = read_metrics(server.metrics_url, label)
            tick_seconds, ticks = (
                after[f"fullpipe_{name}_total"] - before.get(f"fullpipe_{name}_total", 0.0)
                for name in ("tick_seconds", "ticks")
            )
            return seconds, each, tick_seconds, ticks

        for way in PIPELINES:
            load(lambda _, way=way: Client(server.url, PIPELINES[way]).generate("warm"), 4, 4)
        by_concurrency = {}
        for concurrency in arguments.concurrency:
            phases: dict[str, list] = {way: [] for way in PIPELINES}
            for way in list(PIPELINES) * arguments.rounds:
                phases[way].append(measure(way, concurrency))
            by_concurrency[str(concurrency)] = {way: summary(p) for way, p in phases.items()}
    store(
        "unet_apart",
        {
            "request": f"{arguments.size}x{arguments.size}, {arguments.steps} steps, euler, cfg 8",
            "by_concurrency": by_concurrency,
            "call_ms_per_tick": round(
                by_concurrency["1"]["over_bls"]["tick_ms"]
                - by_concurrency["1"]["in_loop"]["tick_ms"],
                2,
            )
            if "1" in by_concurrency
            else None,
        },
    )


def summary(phases: list[tuple[float, list[float], float, float]]) -> dict:
    """All phases of one way at one concurrency."""
    seconds, each, tick_seconds, ticks = zip(*phases, strict=True)
    times = list(itertools.chain.from_iterable(each))
    return {
        "images_per_second": round(len(times) / sum(seconds), 3),
        "tick_ms": round(1e3 * sum(tick_seconds) / sum(ticks), 2),
        **spread(times),
    }


if __name__ == "__main__":
    main()
