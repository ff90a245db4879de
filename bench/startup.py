"""From nothing to ready: seconds until the demo pipeline answers, and the memory it then holds.

The number matters because replicas are started under load, and because several pipelines share a
machine. Memory is the proportional set size of all processes after one picture (shared pages are
counted once), beside the plain sum of resident sizes.

    python -m bench.startup
"""

from __future__ import annotations

import time

import psutil

from bench.record import store
from bench.served import served_demo
from fullpipe.client import Client


def main() -> None:
    started = time.perf_counter()
    with served_demo() as (server, _):
        ready = time.perf_counter()
        Client(server.url).generate("a red circle on a white background", seed=7)
        first = time.perf_counter()
        root = psutil.Process(server.pid)
        memory = [process.memory_full_info() for process in [root, *root.children(recursive=True)]]
    store(
        "startup",
        {
            "assemble_and_start_seconds": round(ready - started, 2),
            "first_picture_seconds": round(first - ready, 2),
            "processes": len(memory),
            "proportional_set_size_mb": round(sum(m.pss for m in memory) / 1e6),
            "sum_of_resident_sizes_mb": round(sum(m.rss for m in memory) / 1e6),
        },
    )


if __name__ == "__main__":
    main()
