"""The compiled packages of a pipeline: taken from the cache, or compiled, those of all networks
at the same time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fullpipe.engines.build_pool import build_apart
from fullpipe.engines.loading import naming_memory
from fullpipe.engines.package_cache import PackageCache


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A package that a network needs.

    Attributes:
        path: where it goes, in the folder of its network; no other of the pipeline has its name.
        device: that it is compiled for and on.
        cache: of its network.
        facts: what `cache` knows it by.
        build: a function of this project that leaves the package at `path`.
        arguments: of `build`, which is called in a process of its own.
    """

    path: Path
    device: str
    cache: PackageCache
    facts: Mapping[str, Any]
    build: Callable[..., None]
    arguments: tuple[Any, ...]


def make_packages(wanted: Sequence[Wanted], report: Callable[[str], None]) -> None:
    """Put every package in its place; several are compiled at a time where there are cores for it.

    Args:
        wanted: those that take longest first.
        report: gets a line at the start and as each package is done.
    Raises:
        SetupError: a compiler is missing or failed, or memory ran out.
    """
    missing = {one.path.name: one for one in wanted if not one.cache.take(one.facts, one.path)}
    if len(missing) < len(wanted):
        report(f"{len(wanted) - len(missing)} packages were compiled before")
    for name in build_apart({name: (_build, (one,)) for name, one in missing.items()}, report):
        missing[name].cache.keep(missing[name].facts, missing[name].path)


def _build(wanted: Wanted) -> None:
    with naming_memory(wanted.path.parent, wanted.device):
        wanted.build(*wanted.arguments)
