"""Find a tritonserver and lay out what it needs: a backend directory and an environment.

Two kinds of tritonserver serve the same repository. The embedded one is NVIDIA's own build inside
the wheel `nvidia-pytriton`; its Python backend comes apart into a library and one stub per Python
version, so a backend directory has to be put together. An installed one (NVIDIA's container has it
under /opt/tritonserver) is taken as it is, with this project's backends beside its own.
"""

from __future__ import annotations

import ctypes.util
import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fullpipe.errors import SetupError
from fullpipe.source_files import source_root

INSTALL_SERVER = "pip install '.[server]' in a clone of this project"


@dataclass(frozen=True)
class TritonFiles:
    """One tritonserver on this machine.

    Attributes:
        binary: the executable.
        backends: folders, one per backend (name -> folder holding the backend's files).
        python_stub: the stub for the running Python, or None when the Python backend has its own.
        caches: folder of the response cache implementations.
        libraries: folders that the stub needs on LD_LIBRARY_PATH.
    """

    binary: Path
    backends: Mapping[str, Path]
    python_stub: Path | None
    caches: Path
    libraries: tuple[Path, ...]

    def lay_out(self, extra: Path) -> Path:
        """A folder of links that serves as Triton's --backend-directory.

        It lies in the user's cache and is named after its contents, so servers may share it; it
        appears complete or not at all.

        Args:
            extra: a folder of Python-based backends, each a folder with a model.py.
        Raises:
            SetupError: the cache cannot be written.
        """
        links: dict[str, Path] = {}
        for name, source in {**self.backends, **python_based_backends(extra)}.items():
            if name == "python" and self.python_stub:
                files = [*sorted(source.iterdir()), self.python_stub]
                links.update({f"{name}/{file.name}": file for file in files if file.is_file()})
            else:
                links[name] = source
        digest = hashlib.sha256(repr(sorted(links.items())).encode()).hexdigest()[:16]
        folder = cache_folder() / f"layout-{digest}"
        if not folder.is_dir():
            _make_links(folder, links)
        return folder

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The environment for tritonserver and its stubs.

        The stub takes the packages of the first `python3` on PATH and ignores PYTHONPATH.
        """
        env = dict(base)
        # Waiting threads of one stub must not spin on the cores that another one needs.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{base.get('PATH', os.defpath)}"
        libraries = [*map(str, self.libraries), *filter(None, [base.get("LD_LIBRARY_PATH")])]
        if libraries:
            env["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
        return env


def cache_folder() -> Path:
    """Where this project keeps what it can make again: $XDG_CACHE_HOME/fullpipe."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fullpipe"


def _make_links(folder: Path, links: Mapping[str, Path]) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            layout = Path(unfinished) / "layout"
            for name, target in links.items():
                (layout / name).parent.mkdir(parents=True, exist_ok=True)
                if target.is_file():
                    # A copy: Triton refuses a library that is linked from outside of the
                    # backend directory when a Python-based backend needs it.
                    shutil.copy2(target, layout / name)
                else:
                    (layout / name).symlink_to(target)
            layout.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another server was faster
            raise SetupError(
                f"{folder.parent} cannot be written ({error.strerror}): "
                "set XDG_CACHE_HOME to a writable folder"
            ) from error


def find_triton(installed: Path | None = None) -> TritonFiles:
    """Find the tritonserver to run.

    Args:
        installed: an installed tritonserver, its binary or its root folder (/opt/tritonserver);
            None takes the embedded one.
    Raises:
        SetupError: it is not there or does not fit the running Python; says how to get it.
    """
    return embedded_triton() if installed is None else installed_triton(installed)


def installed_triton(path: Path) -> TritonFiles:
    """An installed tritonserver with the backends beside it; see `find_triton`."""
    binary = path / "bin" / "tritonserver" if path.is_dir() else path
    if not os.access(binary, os.X_OK) or not binary.is_file():
        raise SetupError(f"no tritonserver at {binary}; give its binary or its root folder")
    root = binary.resolve().parent.parent
    backends = {child.name: child for child in sorted((root / "backends").glob("*/"))}
    if "python" not in backends:
        raise SetupError(f"tritonserver {binary} has no Python backend in {root / 'backends'}")
    return TritonFiles(binary, backends, None, root / "caches", ())


def embedded_triton() -> TritonFiles:
    """The tritonserver of the wheel nvidia-pytriton; see `find_triton`."""
    try:
        wheel = metadata.distribution("nvidia-pytriton")
    except metadata.PackageNotFoundError:
        raise SetupError(f"the package nvidia-pytriton is missing; {INSTALL_SERVER}") from None
    root = Path(str(wheel.locate_file("pytriton/tritonserver")))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        have = ", ".join(sorted(p.name for p in stub.parent.parent.glob("*"))) or "none"
        raise SetupError(f"{wheel.name} has no stub for Python {version}; it has: {have}")
    backends = {"python": root / "backends" / "python"}
    libraries = (find_libpython(), Path(str(wheel.locate_file("nvidia_pytriton.libs"))))
    return TritonFiles(root / "bin" / "tritonserver", backends, stub, root / "caches", libraries)


def find_libpython() -> Path:
    """The folder of the running Python's shared library, which the embedded stub links to.

    Raises:
        SetupError: this Python was built without one and the system has none of its version.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = f"libpython{version}.so.1.0"
    for folder in _libpython_folders(version):
        if (folder / name).is_file():
            return folder
    raise SetupError(
        f"{name} not found for {sys.executable}: install it (Debian, Ubuntu: apt-get install "
        f"libpython{version}) or use a Python built with --enable-shared"
    )


def _libpython_folders(version: str) -> Iterator[Path]:
    libdir = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    yield from (libdir, Path(sys.base_prefix) / "lib", libdir / multiarch)
    if ctypes.util.find_library(f"python{version}"):
        for root in ("/usr/lib", "/lib", "/usr/local/lib", "/usr/lib64", "/lib64"):
            yield from (Path(root), Path(root) / multiarch, Path(root) / f"{os.uname().machine}")


def python_based_backends(folder: Path) -> dict[str, Path]:
    """The Python-based backends of a folder: name -> the folder with its model.py."""
    return {path.parent.name: path.parent.resolve() for path in sorted(folder.glob("*/model.py"))}


def default_backends() -> Path:
    """This project's own backends."""
    return source_root() / "backends"
