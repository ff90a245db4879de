"""`fullpipe check`: what a machine lacks to serve, and how to get it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fullpipe.errors import SetupError
from fullpipe.ports import is_free, port_holder
from fullpipe.triton_files import (
    INSTALL_SERVER,
    TritonFiles,
    cache_folder,
    find_libpython,
    find_triton,
)

# Torch, two CLIPs, a VAE and tritonserver: the demo pipeline with room for its pictures.
MEMORY_BYTES = 3 << 30
# Each model's process takes 1 MiB and more as its tensors need; Docker's default of 64 MiB ends
# with a killed process as soon as a few large pictures are under way.
SHARED_MEMORY_BYTES = 256 << 20
GLIBC = (2, 35)
PACKAGES = (
    "fullpipe",
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "PIL",
    "scipy",
    "tritonclient.grpc",
)
DEFAULT_PORTS = {"http_port": 8000, "grpc_port": 8001, "metrics_port": 8002}

# Imports as a model's process will: no PYTHONPATH, no user packages, no current folder.
_IMPORT = """
import importlib, json, sys
told = {}
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        told[name] = [True, str(getattr(module, "__version__", "yes"))]
    except Exception as error:
        told[name] = [False, f"{type(error).__name__}: {error}".splitlines()[0]]
print(json.dumps(told))
"""


@dataclass(frozen=True)
class Finding:
    """One thing that serving needs.

    Attributes:
        ok: whether it is there.
        what: its name.
        got: what this machine has.
        needed: what is needed; only for a problem.
        remedy: how to get it; only for a problem.
    """

    ok: bool
    what: str
    got: str
    needed: str = ""
    remedy: str = ""


def check(
    repository: Path | None = None,
    host: str = "127.0.0.1",
    ports: Mapping[str, int] = DEFAULT_PORTS,
    triton: Path | None = None,
) -> list[Finding]:
    """Look at everything that `fullpipe serve` needs on this machine.

    Args:
        repository: the model repository to serve; None leaves it out.
        host: the address to listen on.
        ports: name -> port; 0 means any free one.
        triton: an installed tritonserver (binary or root folder); None for the embedded one.
    Returns:
        All findings, the good ones too.
    """
    findings = [_python(is_embedded=triton is None)]
    if triton is None:
        findings += [_libpython(), _glibc()]
    findings += _triton(triton)
    findings += _packages(is_embedded=triton is None)
    findings += [_port(name, host, port) for name, port in ports.items() if port]
    findings += [_shared_memory(), _cache(cache_folder()), _memory()]
    if repository is not None:
        findings.append(_repository(repository))
    return findings


def check_main(
    repository: Path | None = None,
    host: str = "127.0.0.1",
    ports: Mapping[str, int] = DEFAULT_PORTS,
    triton: Path | None = None,
) -> int:
    """Print the findings of `check` as a table.

    Returns:
        The exit code: 1 when there is a problem.
    """
    findings = check(repository, host, ports, triton)
    print(format_table(findings))
    return 0 if all(finding.ok for finding in findings) else 1


def format_table(findings: list[Finding]) -> str:
    """The findings as text for a terminal; problems have two lines more."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        mark = "ok     " if finding.ok else "PROBLEM"
        lines.append(f"{mark}  {finding.what:<{width}}  {finding.got}")
        if not finding.ok:
            lines.append(f"{'':9}{'':{width}}  needed: {finding.needed}")
            lines.append(f"{'':9}{'':{width}}  get it: {finding.remedy}")
    problems = sum(not finding.ok for finding in findings)
    lines.append("ready to serve" if not problems else f"{problems} to mend")
    return "\n".join(lines)


def _python(is_embedded: bool) -> Finding:
    version = platform.python_version()
    # numpy < 2, which the embedded build needs, has no wheel for 3.13.
    newest = 12 if is_embedded else 13
    return Finding(
        (3, 10) <= sys.version_info[:2] <= (3, newest),
        "Python",
        f"{version} ({sys.executable})",
        f"3.10 to 3.{newest}",
        "make a virtual environment with such a Python and install fullpipe there",
    )


def _libpython() -> Finding:
    try:
        return Finding(True, "libpython", str(find_libpython()))
    except SetupError as error:
        missing, _, remedy = str(error).partition(": ")
        return Finding(False, "libpython", missing, "this Python's shared library", remedy)


def _glibc() -> Finding:
    name, version = platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return Finding(
        name == "glibc" and numbers >= GLIBC,
        "C library",
        f"{name} {version}".strip() or "unknown",
        "glibc 2.35 or newer",
        "use Debian 12, Ubuntu 22.04 or newer, or NVIDIA's container",
    )


def _triton(triton: Path | None) -> Iterator[Finding]:
    needed = "NVIDIA's tritonserver"
    try:
        files = find_triton(triton)
    except SetupError as error:
        remedy = INSTALL_SERVER if triton is None else "take NVIDIA's container, or leave it out"
        yield Finding(False, "tritonserver", str(error), needed, remedy)
        return
    missing = _missing_libraries(files)
    yield Finding(
        not missing,
        "tritonserver",
        f"cannot be loaded: {'; '.join(missing)}" if missing else str(files.binary),
        needed + " with its libraries",
        "install the libraries named, or take NVIDIA's container",
    )


def _missing_libraries(files: TritonFiles) -> list[str]:
    """What the dynamic linker does not find for tritonserver and its stub, one line each."""
    env = {**files.environment(os.environ), "LD_TRACE_LOADED_OBJECTS": "1"}
    stub = files.python_stub or files.backends["python"] / "triton_python_backend_stub"
    missing: list[str] = []
    for program in (files.binary, stub):
        listed = subprocess.run([str(program)], env=env, capture_output=True, text=True, timeout=60)
        lines = (listed.stdout + listed.stderr).splitlines()
        missing += [" ".join(line.split()) for line in lines if "not found" in line]
    return sorted(set(missing))


def _packages(is_embedded: bool) -> Iterator[Finding]:
    python = Path(sys.executable).parent / "python3"
    needed = f"importable by {python} -I, as the models' processes import"
    names = [*PACKAGES, "numpy", *(["psutil"] if is_embedded else [])]
    try:
        listed = subprocess.run(
            [str(python), "-I", "-c", _IMPORT, *names],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        told = json.loads(listed.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding(False, "python3", str(error), f"{python} runs", "use a virtual environment")
        return
    for name, (ok, got) in told.items():
        if name == "numpy" and is_embedded and ok:
            yield _numpy(got)
        else:
            yield Finding(ok, name, got, needed, INSTALL_SERVER)


def _numpy(version: str) -> Finding:
    return Finding(
        int(version.split(".")[0]) < 2,
        "numpy",
        version,
        "numpy 1.x: with 2.x this build of Triton loses the contents of tensors",
        "pip install 'numpy<2'",
    )


def _port(name: str, host: str, port: int) -> Finding:
    is_ok = is_free(host, port)
    return Finding(
        is_ok,
        f"port {port}",
        "free" if is_ok else f"in use{port_holder(port)}",
        f"a free port on {host}",
        f"stop what holds it, or serve with --{name.replace('_', '-')} N",
    )


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        return Finding(
            False, "shared memory", f"{folder} is not writable", "a writable /dev/shm", _SHM_REMEDY
        )
    free = shutil.disk_usage(folder).free
    return Finding(
        free >= SHARED_MEMORY_BYTES,
        "shared memory",
        f"{_megabytes(free)} free in {folder}",
        f"{_megabytes(SHARED_MEMORY_BYTES)}",
        _SHM_REMEDY,
    )


_SHM_REMEDY = "docker run --shm-size=1g; elsewhere: mount -o remount,size=1g /dev/shm"


def _cache(folder: Path) -> Finding:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Finding(True, "cache folder", str(folder))
    except OSError as error:
        got = f"{folder}: {error.strerror}"
        remedy = "set XDG_CACHE_HOME to a folder that can be written"
        return Finding(False, "cache folder", got, "a writable folder", remedy)


def _memory() -> Finding:
    free = _available_bytes()
    return Finding(
        free >= MEMORY_BYTES,
        "free memory",
        _megabytes(free),
        f"{_megabytes(MEMORY_BYTES)} for the demo pipeline",
        "end other programs, or raise the container's memory limit",
    )


def _available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path | None = None) -> int:
    """What the machine has left, or the container if that is less (cgroup v2)."""
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) << 10
    group = cgroup or Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int((group / "memory.current").read_text()))
    return free


def _megabytes(count: int) -> str:
    return f"{count >> 20} MiB"


def _repository(folder: Path) -> Finding:
    needed = "an assembled model repository with a pipeline in it"
    remedy = f"fullpipe assemble CHECKPOINT --out {folder}"
    if not folder.is_dir():
        parent = next(path for path in folder.resolve().parents if path.is_dir())
        got = f"no folder {folder}"
        if not os.access(parent, os.W_OK):
            got, remedy = f"{got}, and {parent} is read-only", f"choose another place: {remedy}"
        return Finding(False, "repository", got, needed, remedy)
    models = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    incomplete = [path.name for path in models if not (path / "config.pbtxt").is_file()]
    versionless = [path.name for path in models if not list(path.glob("[1-9]*/"))]
    for fault, names in (("no config.pbtxt", incomplete), ("no version folder", versionless)):
        if names:
            got = f"{folder}: {fault} in {', '.join(names)}"
            return Finding(False, "repository", got, needed, remedy)
    configs = [path / "config.pbtxt" for path in models]
    count = sum("fullpipe_pipeline" in config.read_text("utf-8") for config in configs)
    got = f"{folder}: {count} pipeline{'' if count == 1 else 's'}, {len(models)} models"
    return Finding(count > 0, "repository", got, needed, remedy)
