"""Compiling in processes of their own, several at a time where there are cores for it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from fullpipe.engines.host_compiler import find_host_compiler
from fullpipe.engines.loading import first_line
from fullpipe.errors import SetupError

CORES_PER_BUILD = 4  # Inductor compiles kernels on threads of its own
Job = tuple[Callable[..., None], tuple[Any, ...]]


def build_apart(jobs: Mapping[str, Job], report: Callable[[str], None]) -> Iterator[str]:
    """Run functions of this package, each in a new process, and yield their names as they end.

    Args:
        jobs: by the name of the package that each makes: a function and its arguments.
        report: gets a line at the start and as each package is done.
    Raises:
        SetupError: there is no usable compiler, one of the functions failed or ended its process.
    """
    if not jobs:
        return
    compiler = find_host_compiler()
    cores = len(os.sched_getaffinity(0))
    workers = max(1, min(len(jobs), cores // CORES_PER_BUILD))
    report(f"compiling {len(jobs)} packages, {workers} at a time")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, spawn, initializer=_set_up, initargs=(max(1, cores // workers), compiler)
    ) as pool:
        names = {pool.submit(_timed, *job): name for name, job in jobs.items()}
        try:
            for number, future in enumerate(as_completed(names), start=1):
                name = names[future]
                with _naming(name, compiler):
                    seconds = future.result()
                report(f"{number} of {len(jobs)}: {name}, {seconds:.0f} s")
                yield name
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def _naming(name: str, compiler: str) -> Iterator[None]:
    """Turn what a build raises into a line that says whose it was."""
    try:
        yield
    except SetupError:
        raise
    except BrokenProcessPool as error:
        raise SetupError(
            f"{name}: the process that compiled and tried it with {compiler} ended, as it does"
            " when memory runs out; free memory, or name another compiler with CXX"
        ) from error
    except Exception as error:
        raise SetupError(f"{name} could not be compiled: {first_line(error)}") from error


def _set_up(cores: int, compiler: str) -> None:
    """Inductor would start as many compiling processes as there are cores, for each build."""
    from torch._inductor import config

    config.compile_threads = cores
    config.cpp.cxx = (None, compiler)


def _timed(function: Callable[..., None], arguments: tuple[Any, ...]) -> float:
    started = time.monotonic()
    function(*arguments)
    return time.monotonic() - started
