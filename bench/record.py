"""What every benchmark shares: percentiles, and a result stored with where it came from.

`FULLPIPE_BENCH_RESULTS` names another folder for results than bench/results/.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path

import numpy as np

RESULTS = Path(os.environ.get("FULLPIPE_BENCH_RESULTS") or Path(__file__).parent / "results")
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "nvidia-pytriton", "tritonclient")


def store(name: str, result: dict, benchmark: str = "") -> None:
    """Write RESULTS/NAME.json and print it as the last line of the benchmark.

    Args:
        benchmark: whose result it is, if its name is another: `python -m bench.BENCHMARK`.
    """
    document = {
        "benchmark": name,
        "command": shlex.join(["python", "-m", f"bench.{benchmark or name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "result": result,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


def machine() -> dict:
    """Processor, cores and operating system."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    return {"processor": processor, "cores": os.cpu_count(), "system": platform.platform()}


def versions() -> dict:
    """Python's and the versions of the packages that speed depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def spread(seconds: list[float]) -> dict:
    """Median, 99th percentile and extremes, in milliseconds."""
    values = np.asarray(seconds) * 1e3
    return {
        "p50_ms": round(float(np.percentile(values, 50)), 1),
        "p99_ms": round(float(np.percentile(values, 99)), 1),
        "min_ms": round(float(values.min()), 1),
        "max_ms": round(float(values.max()), 1),
        "count": len(values),
    }
