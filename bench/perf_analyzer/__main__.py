"""perf_analyzer's sweep: latency against throughput over HTTP and gRPC, with NVIDIA's own tool.

The numbers matter because operators compare servers with this tool and trust no other; it has to
run against a pipeline as it comes, and to agree with this project's own load generator. Every
request has a prompt and a seed of its own, so no cache flatters; a last round repeats one request
to show what caches are worth. Rows per tick say how well requests share the UNet.

    python -m bench.perf_analyzer                                    # the demo pipeline
    python -m bench.perf_analyzer --server HOST:8000 --pipeline NAME # any other
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.perf_analyzer import data, tool
from bench.record import spread, store
from bench.served import load, read_metrics, served_demo
from fullpipe.client import DEFAULT_PIPELINE, Client

# With request rates the tool may have one or two more on their way when it has enough.
SPARE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", help="HOST:PORT of its HTTP service; default: serve the demo")
    parser.add_argument("--grpc", help="HOST:PORT of its gRPC service; default: port 8001")
    parser.add_argument("--metrics", help="URL of its metrics; default: port 8002; '' for none")
    parser.add_argument("--header", action="append", default=[], help="Name:value, HTTP only")
    parser.add_argument("--pipeline", default=DEFAULT_PIPELINE)
    parser.add_argument("--protocols", nargs="+", default=["http", "grpc"])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.5, 0.7, 0.9], help="parts of the best rate"
    )
    parser.add_argument("--count", type=int, default=32, help="requests of a measurement")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--size", type=int, help="pixels; default: 128 for the demo, else the pipeline's own"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="of the comparison of load generators"
    )
    arguments = parser.parse_args()
    with _served(arguments) as sweep, tempfile.TemporaryDirectory() as folder:
        name = f"perf_analyzer_{arguments.pipeline}" if arguments.server else "perf_analyzer"
        store(name, sweep.run(Path(folder)), benchmark="perf_analyzer")


@contextlib.contextmanager
def _served(arguments: argparse.Namespace) -> Iterator[Sweep]:
    """The server that is named, or the demo pipeline on a server of this benchmark's own."""
    if arguments.server:
        server = re.sub("^https?://", "", arguments.server).rstrip("/")
        host = server.partition(":")[0]
        metrics = f"http://{host}:8002/metrics" if arguments.metrics is None else arguments.metrics
        addresses = {"http": server, "grpc": arguments.grpc or f"{host}:8001"}
        yield Sweep(arguments, addresses, metrics)
    else:
        arguments.size = arguments.size or 128
        with served_demo() as (server, _):
            addresses = {
                "http": server.url.removeprefix("http://"),
                "grpc": server.grpc_address,
            }
            yield Sweep(arguments, addresses, server.metrics_url)


class Sweep:
    """One run of the benchmark against one server."""

    def __init__(self, arguments: argparse.Namespace, addresses: dict[str, str], metrics: str):
        self._arguments = arguments
        self._addresses = addresses
        self._metrics = metrics
        size = {"width": arguments.size, "height": arguments.size} if arguments.size else {}
        self._requests = data.varied({"steps": arguments.steps, **size})
        headers = dict(header.split(":", 1) for header in arguments.header)
        self._client = Client(f"http://{addresses['http']}", arguments.pipeline, headers=headers)

    def run(self, folder: Path) -> dict:
        """All measurements; `folder` takes the input files."""
        arguments = self._arguments
        warm = max(arguments.concurrency)
        load(lambda _: self._ask(next(self._requests)), warm, warm)
        points = [
            self._measure(folder, protocol, concurrency=concurrency)
            for protocol in arguments.protocols
            for concurrency in arguments.concurrency
        ]
        best = max(p["images_per_second"] for p in points if p["protocol"] == "http")
        points += [
            self._measure(folder, protocol, rate=round(part * best, 3))
            for protocol in arguments.protocols
            for part in arguments.rates
        ]
        size = f"{arguments.size}x{arguments.size}" if arguments.size else "the pipeline's size"
        return {
            "request": f"{size}, {arguments.steps} steps, png; prompt and seed always new",
            "points": points,
            "one_request_repeated": self._measure(folder, "http", concurrency=8, is_repeated=True),
            "agreement": self._compare(folder),
        }

    def _ask(self, request: dict) -> object:
        return self._client.generate(**request, output_format="png")

    def _measure(
        self,
        folder: Path,
        protocol: str,
        *,
        concurrency: int | None = None,
        rate: float | None = None,
        is_repeated: bool = False,
    ) -> dict:
        count = max(self._arguments.count, 2 * (concurrency or 0))
        requests = list(itertools.islice(self._requests, count + SPARE))
        if is_repeated:
            requests = requests[:1]
        before = read_metrics(self._metrics)
        report = tool.measure(
            self._addresses[protocol],
            self._arguments.pipeline,
            data.write(folder / "data.json", requests),
            count,
            protocol=protocol,
            concurrency=concurrency,
            rate=rate,
            headers=tuple(self._arguments.header) if protocol == "http" else (),
        )
        different = len(set(report.pop("seeds")))
        point = {"protocol": protocol, **_load(concurrency, rate), **report}
        point["different_seeds"] = different
        after = read_metrics(self._metrics)
        if before and after:
            point |= _from_metrics(before, after)
        print(point, flush=True)
        return point

    def _compare(self, folder: Path) -> dict:
        """perf_analyzer's throughput over this project's own load generator's, taking turns."""
        concurrency, count = 8, max(2 * self._arguments.count, 16)
        ours, theirs, times = [], [], []
        for _ in range(self._arguments.rounds):
            requests = list(itertools.islice(self._requests, count))
            seconds, each, _ = load(lambda n, todo=requests: self._ask(todo[n]), count, concurrency)
            ours.append(count / seconds)
            times += each
            theirs.append(self._measure(folder, "http", concurrency=concurrency))
        own = statistics.mean(ours)
        rate, reported = (
            statistics.mean(point[name] for point in theirs)
            for name in ("images_per_second", "reported_images_per_second")
        )
        return {
            "concurrency": concurrency,
            "own_images_per_second": round(own, 3),
            "own": spread(times),
            "perf_analyzer_images_per_second": round(rate, 3),
            "perf_analyzer_over_own": round(rate / own, 3),
            "reported_over_own": round(reported / own, 3),
        }


def _load(concurrency: int | None, rate: float | None) -> dict:
    return {"concurrency": concurrency} if rate is None else {"requests_per_second": rate}


def _from_metrics(before: dict[str, float], after: dict[str, float]) -> dict:
    """Rows per tick and hits of Triton's response cache between two readings."""
    passed = {name: after[name] - before.get(name, 0.0) for name in after}
    ticks = passed.get("fullpipe_ticks_total", 0.0)
    rows = passed.get("fullpipe_tick_rows_total", 0.0)
    return {
        "rows_per_tick": round(rows / ticks, 2) if ticks else None,
        "cache_hits": int(passed.get("nv_cache_num_hits_per_model", 0.0)),
    }


if __name__ == "__main__":
    main()
