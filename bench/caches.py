"""What the caches are worth when people repeat themselves.

The number matters because a cache is another part that can fail: it has to earn its place. Of all
requests 60 % repeat a prompt that was asked before; half of these repeat the seed too, as somebody
does who asks for the same picture again. The same list of requests goes to three servers, in small
turns: without any cache, with embeddings kept, with embeddings and whole results kept.

    python -m bench.caches [--count 60] [--size 128] [--steps 20]
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.record import store
from bench.served import CHECKPOINT, prompts
from fullpipe.assemble import assemble
from fullpipe.client import Client
from fullpipe.errors import SetupError
from fullpipe.ports import choose_ports, is_free
from fullpipe.server import ServerConfig, TritonServer

REPEATED = 0.6
TURN = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60, help="requests to each server")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    requests = workload(arguments.count)
    shape = {"width": arguments.size, "height": arguments.size, "steps": arguments.steps}
    times: dict[str, list[float]] = {"none": [], "embeddings": [], "embeddings_and_results": []}
    text_ms: dict[str, list[float]] = {kind: [] for kind in times}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        assemble(CHECKPOINT, folder / "repository")
        url = stack.enter_context(redis_server(folder))
        environments = {
            "none": {},
            "embeddings": {"FULLPIPE_CACHE_URL": f"{url}/0"},
            "embeddings_and_results": {
                "FULLPIPE_CACHE_URL": f"{url}/1",
                "FULLPIPE_RESULT_CACHE": "1",
            },
        }
        clients = {
            kind: Client(stack.enter_context(server(folder, kind == "none", env)).url)
            for kind, env in environments.items()
        }
        for client in clients.values():
            client.generate("a warm start", seed=1, **shape)
        for start in range(0, len(requests), TURN):
            for kind, client in clients.items():
                for prompt, seed in requests[start : start + TURN]:
                    started = time.perf_counter()
                    picture = client.generate(prompt, seed=seed, **shape)
                    times[kind].append(time.perf_counter() - started)
                    text_ms[kind].append(picture.info["milliseconds"].get("text", 0.0))
    mean = {kind: statistics.fmean(values) for kind, values in times.items()}
    store(
        "caches",
        {
            "request": f"{arguments.size}x{arguments.size}, {arguments.steps} steps, one at a time",
            "workload": f"{len(requests)} requests, {repeats(requests):.0%} repeated prompts,"
            f" {exact(requests):.0%} exact repeats",
            "mean_ms": {kind: round(seconds * 1e3, 1) for kind, seconds in mean.items()},
            "over_no_cache": {kind: round(s / mean["none"], 3) for kind, s in mean.items()},
            "mean_text_ms": {k: round(statistics.fmean(v), 2) for k, v in text_ms.items()},
        },
    )


def workload(count: int) -> list[tuple[str, int]]:
    """Prompts and seeds: 60 % with a prompt that was there before, half of these with its seed."""
    draw, captions = random.Random(0), prompts()
    made: list[tuple[str, int]] = []
    for number in range(count):
        # Every 10 requests have 6 repeats, after the first of all.
        if made and number % 10 >= round(10 * (1 - REPEATED)):
            prompt, seed = draw.choice(made)
            made.append((prompt, seed if draw.random() < 0.5 else 1000 + number))
        else:
            made.append((next(captions), number))
    return made


def repeats(requests: list[tuple[str, int]]) -> float:
    """Share of requests whose prompt was asked before."""
    return 1 - len({prompt for prompt, _ in requests}) / len(requests)


def exact(requests: list[tuple[str, int]]) -> float:
    """Share of requests that were asked before just so."""
    return 1 - len(set(requests)) / len(requests)


def server(folder: Path, has_no_cache: bool, env: dict[str, str]) -> TritonServer:
    """The demo pipeline; without caches, Triton's own is off too."""
    return TritonServer(
        ServerConfig(
            folder / "repository",
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            log_level="error",
            cache_bytes=0 if has_no_cache else 64 << 20,
            env=env,
        )
    )


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """A redis-server on a free port; its address without the database's number."""
    if not shutil.which("redis-server"):
        raise SetupError("redis-server is not installed (Debian: apt-get install redis-server)")
    port = choose_ports("127.0.0.1", {"redis": 0})["redis"]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    process = subprocess.Popen([*command, "--dir", str(folder)], stdout=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 20
        while is_free("127.0.0.1", port):
            if time.monotonic() > limit or process.poll() is not None:
                raise SetupError("redis-server does not start")
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
