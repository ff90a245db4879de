"""What batching at every step brings: eight requests at a time against one at a time.

The number matters because a shared server is bought for its throughput, and because waiting for
somebody else's whole picture is what makes shared servers slow. Every request has another prompt
and seed, so no cache flatters. The phases take turns within one run.

    python -m bench.concurrency [--count 24] [--rounds 2] [--size 256]
"""

from __future__ import annotations

import argparse
import itertools

from bench.record import spread, store
from bench.served import load, prompts, served_demo
from fullpipe.client import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=24, help="requests of a phase")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()

    captions, seeds = prompts(), itertools.count()
    phases: dict[int, dict] = {n: {"seconds": 0.0, "each": []} for n in arguments.concurrency}
    with served_demo() as (server, _):
        client = Client(server.url)

        def make(_: int) -> object:
            return client.generate(
                next(captions),
                seed=next(seeds),
                steps=arguments.steps,
                width=arguments.size,
                height=arguments.size,
                output_format="png",
            )

        load(make, 4, 2)
        for concurrency in arguments.concurrency * arguments.rounds:
            seconds, each, _ = load(make, arguments.count, concurrency)
            phases[concurrency]["seconds"] += seconds
            phases[concurrency]["each"] += each
    rates = {n: len(phase["each"]) / phase["seconds"] for n, phase in phases.items()}
    one = rates[min(rates)]
    store(
        "concurrency",
        {
            "request": f"{arguments.size}x{arguments.size}, {arguments.steps} steps, euler, cfg 8",
            "by_concurrency": {
                str(n): {
                    "images_per_second": round(rates[n], 3),
                    "times_one_at_a_time": round(rates[n] / one, 3),
                    **spread(phases[n]["each"]),
                }
                for n in rates
            },
        },
    )


if __name__ == "__main__":
    main()
