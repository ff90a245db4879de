"""Compiled packages kept for the next checkpoint of the same architecture.

A package holds kernels, not weights, so every fine-tune of one architecture can use the same one:
the first assembly on a machine compiles for minutes, all others take a copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from fullpipe.engines import memory_order
from fullpipe.engines.ahead_of_time import OPTIONS
from fullpipe.engines.loading import gpu_architecture
from fullpipe.triton_files import cache_folder


class PackageCache:
    """The packages that one network's architecture has on this machine."""

    def __init__(self, config: Path, device: str, precision: str):
        """
        Args:
            config: the network's `config.json`, which says all of its architecture.
            device: torch device that the packages are for.
            precision: of the weights.
        """
        architecture = json.loads(config.read_text(encoding="utf-8"))
        self._facts = {
            "architecture": {k: v for k, v in architecture.items() if not k.startswith("_")},
            "gpu": gpu_architecture(device),
            "precision": precision,
            "options": OPTIONS,
            "operations": memory_order.digest(),
            "libraries": {name: metadata.version(name) for name in ("torch", "diffusers")},
        }
        self._folder = cache_folder() / "compiled"

    def take(self, shapes: Mapping[str, Any], target: Path) -> bool:
        """Put a kept package at `target`; False where there is none."""
        try:
            shutil.copyfile(self._path(shapes), target)
        except FileNotFoundError:
            return False
        return True

    def keep(self, shapes: Mapping[str, Any], package: Path) -> None:
        """Remember a package; where the cache cannot be written it is compiled again next time."""
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            unfinished = self._folder / f".{os.getpid()}-{package.name}"
            shutil.copyfile(package, unfinished)
            unfinished.replace(self._path(shapes))

    def _path(self, shapes: Mapping[str, Any]) -> Path:
        text = json.dumps({**self._facts, "shapes": dict(shapes)}, sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.pt2"
