"""What batching at every step brings: eight requests at a time against one at a time.

The number matters because a shared server is bought for its throughput, and because waiting for
somebody else's whole picture is what makes shared servers slow. Every request has another prompt
and seed, so no cache flatters. The phases take turns within one run.

    python -m bench.concurrency [--count 24] [--rounds 2] [--sizes 256 128]
"""

from __future__ import annotations

import argparse
import itertools

from bench.record import spread, store
from bench.served import load, prompts, served_demo
from fullpipe.client import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=64, help="requests of a phase")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 128], help="pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()

    captions, seeds = prompts(), itertools.count()
    with served_demo() as (server, _):
        client = Client(server.url)

        def measure(size: int) -> dict:
            def make(_: int) -> object:
                return client.generate(
                    next(captions),
                    seed=next(seeds),
                    steps=arguments.steps,
                    width=size,
                    height=size,
                    output_format="png",
                )

            load(make, 4, 2)
            seconds = dict.fromkeys(arguments.concurrency, 0.0)
            each: dict[int, list[float]] = {n: [] for n in arguments.concurrency}
            for concurrency in arguments.concurrency * arguments.rounds:
                passed, times, _ = load(make, arguments.count, concurrency)
                seconds[concurrency] += passed
                each[concurrency] += times
            rates = {n: len(each[n]) / seconds[n] for n in seconds}
            return {
                str(n): {
                    "images_per_second": round(rates[n], 3),
                    "times_one_at_a_time": round(rates[n] / rates[min(rates)], 3),
                    **spread(each[n]),
                }
                for n in rates
            }

        by_size = {f"{size}x{size}": measure(size) for size in arguments.sizes}
    store(
        "concurrency",
        {
            "request": f"{arguments.steps} steps, euler, cfg 8, png; by size and concurrency",
            "by_size": by_size,
        },
    )


if __name__ == "__main__":
    main()
