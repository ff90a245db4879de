"""A C++ compiler for the host's part of compiled packages, found before anything is compiled.

Of a package that links the C++ library statically, torch's first call ends in an error or takes
the process with it; some machines' first `g++` links so. That is known after compiling a few lines,
not only after minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from fullpipe.errors import SetupError

OTHERS = ("g++", "/usr/bin/g++", "c++", "clang++")
_TIMEOUT_S = 60
_PROGRAM = r"""
#include <stdexcept>
#include <string>
extern "C" void fail(const char* what) { throw std::runtime_error(std::string(what)); }
"""
# As the loader's table of needed libraries names it, which is the only place where it is named.
_LIBRARIES = (b"libstdc++.so", b"libc++.so")


def find_host_compiler() -> str:
    """The path of the first of `$CXX` and the usual names that builds libraries torch can load.

    Raises:
        SetupError: there is none; the message says what was tried.
    """
    tried: dict[str, str] = {}
    for name in dict.fromkeys((os.environ.get("CXX") or OTHERS[0], *OTHERS)):
        path = shutil.which(name)
        if path is None:
            tried[name] = "missing"
        elif path not in tried:
            if (fault := _fault(path)) is None:
                return path
            tried[path] = fault
    found = ", ".join(f"{path} ({fault})" for path, fault in tried.items())
    raise SetupError(
        "compiling needs a C++ compiler that links the C++ library as a shared one;"
        f" found: {found}; install g++, or name another with CXX"
    )


def _fault(compiler: str) -> str | None:
    """What is wrong with a compiler, if anything is."""
    with tempfile.TemporaryDirectory(prefix="fullpipe-compiler-") as work:
        source, library = Path(work) / "try.cpp", Path(work) / "try.so"
        source.write_text(_PROGRAM)
        command = [compiler, "-shared", "-fPIC", "-o", str(library), str(source)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            return lines[0] if lines else f"exit status {done.returncode}"
        if not any(name in library.read_bytes() for name in _LIBRARIES):
            return "links the C++ library statically"
    return None
