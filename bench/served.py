"""A served demo pipeline for the benchmarks, and a load of so many requests at once."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fullpipe.assemble import Choices, assemble
from fullpipe.config import PipelineConfig
from fullpipe.errors import Unavailable
from fullpipe.server import ServerConfig, TritonServer

CHECKPOINT = Path(__file__).parents[1] / "demo" / "checkpoint"
COLOURS = ("red", "green", "blue", "yellow", "orange", "brown", "pink", "white")
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond")
BACKGROUNDS = ("white", "black", "cyan")


@contextlib.contextmanager
def served_demo(
    choices: Choices | None = None, *more: Choices
) -> Iterator[tuple[TritonServer, PipelineConfig]]:
    """The demo pipeline on a real Triton Inference Server on free ports, quiet but for errors.

    `more` are further pipelines of it, each by the name in its choices.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        repository = Path(folder) / "repository"
        config = assemble(CHECKPOINT, repository, choices)
        for further in more:
            assemble(CHECKPOINT, repository, further)
        settings = ServerConfig(
            repository, http_port=0, grpc_port=0, metrics_port=0, log_level="error"
        )
        with TritonServer(settings) as server:
            yield server, config


def prompts() -> Iterator[str]:
    """Captions without end, each another one for as long as there are any, then with a number."""
    for turn in itertools.count():
        for background, shape, colour in itertools.product(BACKGROUNDS, SHAPES, COLOURS):
            if colour == background:
                continue
            caption = f"a {colour} {shape} on a {background} background"
            yield caption if not turn else f"{caption}, number {turn}"


def load(
    make: Callable[[int], object], count: int, concurrency: int
) -> tuple[float, list[float], list[object]]:
    """Call `make(n)` for n in 0 … count - 1 with so many calls open at any time.

    Returns:
        Seconds in all, seconds of each call, results of each call.
    """
    seconds = [0.0] * count
    lock = threading.Lock()
    numbers = iter(range(count))
    results: list[object] = [None] * count

    def worker() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            started = time.perf_counter()
            results[number] = make(number)
            seconds[number] = time.perf_counter() - started

    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        for future in [pool.submit(worker) for _ in range(concurrency)]:
            future.result()
    return time.perf_counter() - started, seconds, results


def read_metrics(url: str, label: str = "") -> dict[str, float]:
    """Prometheus metrics, summed over their labels; none where `url` is empty.

    Args:
        label: count only those that have it, for example `pipeline="full_pipeline"`.

    Raises:
        Unavailable: nobody answers there.
    """
    if not url:
        return {}
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
    except OSError as error:
        raise Unavailable(f"no metrics at {url}: {error}") from None
    sums: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#") and label in line:
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums
