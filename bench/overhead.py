"""What serving costs: one request at a time over HTTP against the same loop without Triton.

The number matters because everything this project adds around the networks (HTTP, the ensemble,
five processes, picture compression) is waste from the point of view of who waits for one picture.
The two ways take turns within one run, so that a busy machine disturbs both alike.

    python -m bench.overhead [--count 12] [--steps 20]
"""

from __future__ import annotations

import argparse
import time

from bench.record import spread, store
from bench.served import CHECKPOINT, prompts, served_demo
from fullpipe.client import Client
from fullpipe.image import encode_images
from fullpipe.local import LocalPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    over_http: list[float] = []
    in_process: list[float] = []
    captions = prompts()
    with served_demo() as (server, config), LocalPipeline.open(CHECKPOINT, config) as local:
        client = Client(server.url)
        for number in range(arguments.count + 2):
            wanted = {"prompt": next(captions), "seed": number, "steps": arguments.steps}
            started = time.perf_counter()
            client.generate(output_format="png", **wanted)
            middle = time.perf_counter()
            encode_images(local.generate(**wanted).images, "png")
            ended = time.perf_counter()
            if number >= 2:  # the first ones warm up
                over_http.append(middle - started)
                in_process.append(ended - middle)
    http, local_ms = spread(over_http), spread(in_process)
    store(
        "overhead",
        {
            "request": f"256x256, {arguments.steps} steps, euler, cfg 8, png, concurrency 1",
            "over_http": http,
            "in_process": local_ms,
            "http_over_in_process": round(http["p50_ms"] / local_ms["p50_ms"], 3),
        },
    )


if __name__ == "__main__":
    main()
