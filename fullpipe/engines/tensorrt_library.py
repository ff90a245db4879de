"""Which TensorRT is here: NVIDIA's full library, or TensorRT for RTX from PyPI. One API, two names.

The full one makes plans for the GPU that builds them and is what NVIDIA's containers have. The one
for RTX builds anywhere, even without a GPU, and runs on a fixed list of architectures.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
from types import ModuleType
from typing import Any

from fullpipe.errors import SetupError

log = logging.getLogger(__name__)

_MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
# Compute capabilities that TensorRT for RTX 1.7 deserialises an engine on, and what it needs.
RTX_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))


@dataclasses.dataclass(frozen=True)
class Library:
    """An imported TensorRT.

    Attributes:
        module: with the API of `tensorrt`.
        name: tensorrt or tensorrt_rtx.
    """

    module: ModuleType
    name: str

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT for RTX, whose plans are not made for one GPU."""
        return self.name == "tensorrt_rtx"

    @property
    def versions(self) -> dict[str, str]:
        """What a plan depends on."""
        return {self.name: self.module.__version__}

    def require_gpu(self, device: str) -> None:
        """Refuse a device that this library cannot run on.

        Raises:
            SetupError: it is no NVIDIA GPU, or TensorRT for RTX has nothing for its architecture.
        """
        import torch

        if torch.device(device).type != "cuda" or not torch.cuda.is_available():
            raise SetupError(f"engine=tensorrt needs an NVIDIA GPU, device={device} is none here")
        capability = torch.cuda.get_device_capability(device)
        if self.is_rtx and capability not in RTX_CAPABILITIES:
            allowed = ", ".join(f"{major}.{minor}" for major, minor in RTX_CAPABILITIES)
            raise SetupError(
                f"TensorRT for RTX does not run on compute capability"
                f" {capability[0]}.{capability[1]}, allowed {allowed}; use --engine compiled, or"
                " NVIDIA's container with the full TensorRT"
            )


@functools.cache
def library() -> Library:
    """The TensorRT of this environment.

    Raises:
        SetupError: there is none.
    """
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(module, "Builder"):  # PyPI has packages of that name that are placeholders
            return Library(module, "tensorrt" if name == "tensorrt" else "tensorrt_rtx")
    raise SetupError(
        "engine=tensorrt needs TensorRT: pip install 'fullpipe[tensorrt]' for TensorRT for RTX, or"
        " use NVIDIA's container"
    )


def logger(trt: ModuleType, errors: list[str]) -> Any:
    """A TensorRT logger that collects error lines, and passes warnings on to Python's log."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message.strip().splitlines()[0])
            elif severity == trt.ILogger.WARNING:
                log.info("TensorRT: %s", message)

    return Logger()
