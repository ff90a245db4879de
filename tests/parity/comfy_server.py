"""A running ComfyUI 0.3.75 on the CPU, driven through its own HTTP interface."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from comfyui import install
from PIL import Image

from fullpipe.ports import choose_ports

# What main.py needs beyond comfy.sample, by distribution.
NEEDS = ("aiohttp", "alembic", "av", "pydantic-settings", "requests", "SQLAlchemy", "yarl")
START_TIMEOUT_S = 180.0
PROMPT_TIMEOUT_S = 300.0
_POLL_S = 0.05


class ComfyServer:
    """ComfyUI in a process of its own; a context manager.

    Attributes:
        base: its folder; put checkpoints into `checkpoints` and pictures into `base / "input"`.
    """

    def __init__(
        self,
        base: Path,
        custom_nodes: Mapping[str, Path] | None = None,
        environment: Mapping[str, str] | None = None,
        front_end: Path | None = None,
    ):
        """Make the folders; downloads what is missing into the user's cache.

        Args:
            custom_nodes: node packs to load, name to folder; without it none is loaded.
            environment: variables of the process, beside this one's.
            front_end: folder of the web page; without it there is none.
        Raises:
            subprocess.CalledProcessError: pip could not download; its output is in the error.
        """
        self.base = base
        self.checkpoints = base / "models" / "checkpoints"
        for folder in (self.checkpoints, base / "input", base / "web"):
            folder.mkdir(parents=True, exist_ok=True)
        (base / "web" / "index.html").touch()
        self._front_end = front_end or base / "web"
        self._environment = dict(environment or {})
        self._has_nodes = custom_nodes is not None
        if custom_nodes is not None:
            (base / "custom_nodes").mkdir(exist_ok=True)
        for name, folder in (custom_nodes or {}).items():
            link = base / "custom_nodes" / name
            if not link.exists():
                link.symlink_to(folder)
        self._comfyui = install()
        self._packages = install_server_packages(self._comfyui.extra_packages.parent)
        self._port = choose_ports("127.0.0.1", {"port": 0})["port"]
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> ComfyServer:
        comfyui = self._comfyui
        command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1"]
        command += ["--port", str(self._port), "--base-directory", str(self.base)]
        command += ["--front-end-root", str(self._front_end), "--disable-api-nodes"]
        command += ["--database-url", "sqlite:///:memory:"]
        if not self._has_nodes:
            command.append("--disable-all-custom-nodes")
        path = [comfyui.torchvision_stub, comfyui.extra_packages, self._packages]
        with (self.base / "log.txt").open("w") as log:
            self._process = subprocess.Popen(
                command,
                cwd=comfyui.tree,
                env={
                    **os.environ,
                    **self._environment,
                    "PYTHONPATH": os.pathsep.join(map(str, path)),
                },
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_started()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def run(self, graph: Mapping[str, Any]) -> np.ndarray:
        """Execute a graph in API format and read the pictures that its SaveImage wrote.

        Returns:
            [N, H, W, 3] uint8.
        Raises:
            RuntimeError: ComfyUI refused the graph, failed on it, or took too long.
        """
        outcome = self.finish(self.start(graph))
        if outcome["status"]["status_str"] != "success":
            raise self._failure(json.dumps(outcome["status"]["messages"])[-2000:])
        saved = [image for node in outcome["outputs"].values() for image in node["images"]]
        files = [self.base / "output" / image["subfolder"] / image["filename"] for image in saved]
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])

    def start(self, graph: Mapping[str, Any], client_id: str | None = None) -> str:
        """Queue a graph in API format; returns its prompt id."""
        client = {"client_id": client_id} if client_id else {}
        return self._call("/prompt", {"prompt": graph, **client})["prompt_id"]

    def finish(self, prompt_id: str) -> dict[str, Any]:
        """Wait for a queued graph, whatever becomes of it; returns its history."""
        deadline = time.monotonic() + PROMPT_TIMEOUT_S
        while not (history := self._call(f"/history/{prompt_id}")):
            if time.monotonic() > deadline:
                raise self._failure(f"no picture after {PROMPT_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)
        return history[prompt_id]

    @property
    def url(self) -> str:
        """Address of its web page."""
        return f"http://127.0.0.1:{self._port}"

    def call(self, path: str, document: Any = None) -> Any:
        """GET a path, or POST a document to it; returns the answer's document, if it has one."""
        return self._call(path, document)

    def _wait_until_started(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self._process is not None
            if self._process.poll() is not None:
                raise self._failure(f"ended with {self._process.returncode}")
            try:
                self._call("/system_stats")
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise self._failure(f"not up after {START_TIMEOUT_S:.0f} s") from None
                time.sleep(_POLL_S)

    def _call(self, path: str, document: Any = None) -> Any:
        body = None if document is None else json.dumps(document).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}{path}", body)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as response:
                text = response.read()
                return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            raise self._failure(error.read().decode(errors="replace")[:2000]) from None

    def _failure(self, what: str) -> RuntimeError:
        return RuntimeError(f"ComfyUI: {what}\n{(self.base / 'log.txt').read_text()[-3000:]}")


def install_server_packages(cache: Path) -> Path:
    """Packages that this Python lacks for main.py, in a folder of the cache; returns the folder."""
    folder = cache / "server_packages-{}.{}".format(*sys.version_info)
    missing = [name for name in NEEDS if not _is_installed(name)]
    if missing and not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), *missing]
        subprocess.run(command, check=True, capture_output=True, text=True)
        (folder / "complete").touch()
    return folder


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
