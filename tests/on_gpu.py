"""Everything that only an NVIDIA GPU can show, in one command: promises, errors, speed.

What a machine lacks is said within seconds, before anything is built. Packages compile beside the
tests; what is measured waits until nothing else runs. Each part leaves its log and its results in
the folder, and a line in `summary.txt` as soon as it ends, so that a run which is cut short has
shown something; a part that no time is left for is named there as well.

    python -m tests.on_gpu FOLDER [--minutes 25] [--parts loop engines sdxl]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fullpipe.check import check, format_table
from fullpipe.engines.host_compiler import find_host_compiler
from fullpipe.errors import SetupError

ROOT = Path(__file__).parents[1]
LOOP_TESTS = [f"tests/test_{name}.py" for name in ("loop", "slots", "step_cache", "text_encoder")]


@dataclasses.dataclass(frozen=True)
class Part:
    """A command.

    Attributes:
        command: of Python, without its name; "{work}" is where repositories are kept.
        limit_s: after which it is ended.
        needs: a build that must have ended well.
    """

    command: str
    limit_s: float
    needs: str = ""


_SD1 = "-m bench.gpu --family sd1 --vae loop --count 40"
_SDXL = "-m bench.gpu --family sdxl --vae loop --buckets 2 8 --count 8 --concurrency 8"
_CACHED = f"{_SD1} --buckets 2 --step-cache 3 --count 16 --concurrency 1"
BUILDS = {
    "sd1": f"{_SD1} --buckets 2 16 --phases loop bls --keep {{work}}/sd1 --build-only",
    "sdxl": f"{_SDXL} --phases loop --keep {{work}}/sdxl --build-only",
    "cached": f"{_CACHED} --phases loop --keep {{work}}/cached --build-only",
}
# Tests first, meanwhile packages compile; then what is measured, the shortest first.
PARTS = {
    "loop": Part(f"-m pytest -q {' '.join(LOOP_TESTS)}", 300),
    "loop_again": Part(f"-m pytest -q {' '.join(LOOP_TESTS)}", 300),
    "onnx": Part("-m pytest -q tests/engines/test_onnx.py", 300),
    "engines": Part("-m pytest -q tests/engines/test_gpu.py", 800),
    "profile_sd1": Part("-m bench.unet_profile {work}/sd1/loop --name sd1", 120, "sd1"),
    "profile_sdxl": Part(
        "-m bench.unet_profile {work}/sdxl/loop --name sdxl --rows 2 8", 120, "sdxl"
    ),
    "cudnn": Part(
        f"{_SD1} --buckets 2 16 --phases networks --cudnn-benchmark --keep {{work}}/sd1", 120, "sd1"
    ),
    "sd1": Part(
        f"{_SD1} --buckets 2 16 --phases networks loop bls --keep {{work}}/sd1", 300, "sd1"
    ),
    "sdxl": Part(f"{_SDXL} --phases networks loop --keep {{work}}/sdxl", 300, "sdxl"),
    "cached": Part(f"{_CACHED} --phases networks loop --keep {{work}}/cached", 200, "cached"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for logs and results")
    parser.add_argument("--minutes", type=float, default=25, help="after which nothing is begun")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--work", type=Path, help="where repositories stay; in FOLDER otherwise")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    run = Run(arguments.folder, arguments.work or arguments.folder / "work", arguments.minutes)
    try:
        _look_around()
    except SetupError as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if run.all(arguments.parts) else 1)


def _look_around() -> None:
    findings = check(ports={})
    print(format_table(findings), flush=True)
    missing = [finding.what for finding in findings if not finding.ok]
    if not torch.cuda.is_available():
        missing.append("a GPU that torch sees")
    if missing:
        raise SetupError(f"this machine lacks {', '.join(missing)}")
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    print(f"{', '.join(names)}; packages are made with {find_host_compiler()}", flush=True)


class Run:
    """The parts one after the other, beside the builds."""

    def __init__(self, folder: Path, work: Path, minutes: float):
        """`minutes`: from now on."""
        self._folder, self._work = folder, work
        self._started = time.monotonic()
        self._end = self._started + 60 * minutes
        self._builds: dict[str, subprocess.Popen[bytes]] = {}

    def all(self, names: list[str]) -> bool:
        """Whether every part of these names ended well."""
        faults = 0
        with contextlib.ExitStack() as stack:
            for name in sorted({PARTS[name].needs for name in names} - {""}):
                self._builds[name] = stack.enter_context(self._begun(f"build_{name}", BUILDS[name]))
            for name in names:
                status, what = self._run(name, PARTS[name])
                faults += status != 0
                self._say(f"{name}: {what}")
        return not faults

    def _run(self, name: str, part: Part) -> tuple[int | None, str]:
        """The exit status, if there is one, and what to say of it."""
        if part.needs and (fault := self._wait_for_builds(part.needs)):
            return None, fault
        started = time.monotonic()
        if (left := self._end - started) <= 0:
            return None, "not run: no time left"
        with self._begun(name, part.command) as process:
            try:
                status = process.wait(min(left, part.limit_s))
            except subprocess.TimeoutExpired:
                return None, f"ended after {time.monotonic() - started:.0f} s"
        lines = self._log(name).read_text(errors="replace").strip().splitlines() or [""]
        seconds = time.monotonic() - started
        return status, f"exit status {status}, {seconds:.0f} s: {lines[-1][:200]}"

    def _wait_for_builds(self, needed: str) -> str:
        """Until none of them runs, so that nothing is measured beside one; a fault, if any."""
        for name, process in self._builds.items():
            try:
                process.wait(max(0.0, self._end - time.monotonic()))
            except subprocess.TimeoutExpired:
                return f"not run: no time left after waiting for build_{name}"
        status = self._builds[needed].returncode
        return f"not run: build_{needed} ended with {status}" if status else ""

    @contextlib.contextmanager
    def _begun(self, name: str, command: str) -> Iterator[subprocess.Popen[bytes]]:
        words = [word.replace("{work}", str(self._work.resolve())) for word in shlex.split(command)]
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "FULLPIPE_BENCH_RESULTS": str(self._folder.resolve()),
            "FULLPIPE_TEST_DEVICE": "cuda",
            "PYTHONUNBUFFERED": "1",
        }

    def _say(self, what: str) -> None:
        line = f"{time.monotonic() - self._started:6.0f} s  {what}"
        print(line, flush=True)
        with (self._folder / "summary.txt").open("a", encoding="utf-8") as summary:
            summary.write(line + "\n")


if __name__ == "__main__":
    main()
