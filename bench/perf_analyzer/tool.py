"""Find and run NVIDIA's perf_analyzer, and read the report that it writes.

The binary comes with the wheel `tritonclient` 2.51 on x86-64 Linux. Two libraries that it wants,
libb64 and CUDA's runtime (which it loads but does not need without a GPU), are inside the wheel
`nvidia-pytriton`, under names that a loader does not look for: links in a temporary folder give
them their own names. Libraries of the system are taken where they exist.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fullpipe.errors import PipelineError, SetupError

LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
LIMIT_S = 600


def find() -> Path:
    """The binary, of this Python's environment first.

    Raises:
        SetupError: there is none; says how to get it.
    """
    beside = Path(sys.executable).parent / "perf_analyzer"
    installed = importlib.util.find_spec("tritonclient")
    shared = [Path(p).parents[3] / "bin" for p in installed.submodule_search_locations or []]
    for path in (beside, *(folder / "perf_analyzer" for folder in shared)):
        if path.is_file():
            return path
    found = shutil.which("perf_analyzer")
    if found:
        return Path(found)
    raise SetupError(
        "perf_analyzer is not installed; on x86-64 Linux: pip install --force-reinstall --no-deps"
        " tritonclient==2.51.0"
    )


@contextlib.contextmanager
def environment() -> Iterator[dict[str, str]]:
    """Environment variables with which the binary finds its libraries."""
    with tempfile.TemporaryDirectory(prefix="perf-analyzer-") as folder:
        package = importlib.util.find_spec("pytriton")
        for name, pattern in LIBRARIES.items():
            for place in package.submodule_search_locations or [] if package else []:
                for library in Path(place).parent.glob(f"nvidia_pytriton.libs/{pattern}"):
                    (Path(folder) / name).symlink_to(library)
        own = os.environ.get("LD_LIBRARY_PATH")
        # Last, so that libraries of the system go first where somebody named their folder.
        yield {**os.environ, "LD_LIBRARY_PATH": f"{own}:{folder}" if own else folder}


def measure(
    address: str,
    pipeline: str,
    data: Path,
    count: int,
    *,
    protocol: str = "http",
    concurrency: int | None = None,
    rate: float | None = None,
    headers: tuple[str, ...] = (),
) -> dict:
    """Let perf_analyzer send `count` requests, and return its report.

    Args:
        address: HOST:PORT.
        data: its input file; requests take the entries in turn.
        protocol: "http" or "grpc".
        concurrency: requests open at any time; or
        rate: requests per second on average, arriving as a Poisson process.
        headers: "Name:value" each; HTTP only.
    Returns:
        images_per_second from its record of every request, first request to last answer;
        reported_images_per_second and the percentiles from its report, where its clock ends at
        a whole second, so that short runs look slower; and `seeds`, as the answers tell them.
    Raises:
        PipelineError: it ended with an error, or not every request was answered.
    """
    load = ["--concurrency-range", str(concurrency)]
    if rate is not None:
        load = ["--request-rate-range", f"{rate:g}", "--request-distribution", "poisson"]
        load += ["--max-threads", "64"]
    with tempfile.TemporaryDirectory(prefix="perf-analyzer-") as folder, environment() as env:
        report, export = Path(folder) / "report.csv", Path(folder) / "export.json"
        command = [str(find()), "-m", pipeline, "-u", address, "-i", protocol, *load]
        command += ["--input-data", str(data), "--request-count", str(count)]
        command += ["-f", str(report), "--profile-export-file", str(export)]
        for header in headers:
            command += ["-H", header]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S)
        if done.returncode or not report.is_file():
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            wrong = [line for line in lines if "rror" in line or "ailed" in line] or lines[-1:]
            raise PipelineError(f"perf_analyzer ended with {done.returncode}: {' '.join(wrong)}")
        return _read(report, export, count)


def _read(report: Path, export: Path, count: int) -> dict:
    (row,) = csv.DictReader(report.read_text(encoding="utf-8").splitlines())
    (experiment,) = json.loads(export.read_text(encoding="utf-8"))["experiments"]
    answered = [request for request in experiment["requests"] if request["response_timestamps"]]
    if len(answered) < count:
        raise PipelineError(f"perf_analyzer sent {count} requests, {len(answered)} were answered")
    first = min(request["timestamp"] for request in answered)
    last = max(request["response_timestamps"][-1] for request in answered)
    return {
        "images_per_second": round(len(answered) / (last - first) * 1e9, 3),
        "reported_images_per_second": round(float(row["Inferences/Second"]), 3),
        **{f"p{n}_ms": round(float(row[f"p{n} latency"]) / 1e3, 1) for n in (50, 90, 95, 99)},
        "count": len(answered),
        "seeds": [
            json.loads(request["response_outputs"][0]["info"])["seed"] for request in answered
        ],
    }
