"""Input data for perf_analyzer: requests that no cache can flatter, or one and the same."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from bench.served import prompts


def varied(shared: dict) -> Iterator[dict]:
    """Requests without end, each with a prompt and a seed of its own.

    Args:
        shared: inputs that all of them have, by the contract's names.
    """
    for prompt, seed in zip(prompts(), itertools.count(1), strict=False):
        yield {"prompt": prompt, "seed": seed, **shared}


def write(path: Path, requests: list[dict]) -> Path:
    """Write the file that `--input-data` takes."""
    entries = [{name: [value] for name, value in request.items()} for request in requests]
    lines = ",\n".join(map(json.dumps, entries))
    path.write_text(f'{{"data": [\n{lines}\n]}}\n', encoding="utf-8")
    return path
