"""Tensors through memory that ComfyUI and Triton share when they run on one machine.

System shared memory of Triton's HTTP protocol: the client makes a region, tells the server its
name, and requests point into it. One region serves one request. (Protocol: the page
docs/protocol/extension_shared_memory.md of the server's repository.)
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import threading
from collections.abc import Iterator, Mapping
from multiprocessing import shared_memory
from typing import Any

import numpy as np

from .endpoint import Endpoint
from .errors import Stopped, TritonError, Unavailable

# Below this a copy through the socket is cheaper than a region.
MIN_BYTES = 1 << 18
# Longer than any job may last: after so long nothing writes into the region of a lost one.
OUTLIVES_S = 330.0
_ALIGNMENT = 64
_DTYPES = {"UINT8": np.uint8, "FP32": np.float32}

_without: set[str] = set()  # URLs of servers that do not take regions
_guard = threading.Lock()


class Region:
    """One block of shared memory, laid out while a request is put together."""

    def __init__(self, size: int, outputs: Mapping[str, int]):
        """
        Args:
            size: bytes of everything.
            outputs: bytes to keep for each large output, by name.
        """
        self.name = f"fullpipe_{secrets.token_hex(8)}"
        self.size = size
        self._memory = shared_memory.SharedMemory(name=self.name, create=True, size=size)
        self._sizes = dict(outputs)
        self._offsets: dict[str, int] = {}
        self._used = 0

    def place_input(self, tensor: Any, array: np.ndarray) -> bool:
        """Copy an input in and point the tensor at it; False: it is small and goes by itself."""
        if array.dtype.hasobject or array.nbytes < MIN_BYTES:
            return False
        offset = self._take(array.nbytes)
        np.frombuffer(self._memory.buf, array.dtype, array.size, offset)[:] = array.reshape(-1)
        tensor.set_shared_memory(self.name, array.nbytes, offset)
        return True

    def place_output(self, output: Any) -> None:
        """Have the server write an output here, if room was kept for it."""
        size = self._sizes.get(output.name())
        if size:
            self._offsets[output.name()] = self._take(size)
            output.set_shared_memory(self.name, size, self._offsets[output.name()])

    def holds(self, name: str) -> bool:
        """Whether the server writes this output here."""
        return name in self._offsets

    def read_output(self, described: Mapping[str, Any]) -> np.ndarray:
        """A copy of what the server wrote.

        Args:
            described: the output's entry in the answer: name, datatype, shape.
        """
        shape, dtype = described["shape"], _DTYPES[described["datatype"]]
        offset = self._offsets[described["name"]]
        array = np.frombuffer(self._memory.buf, dtype, math.prod(shape), offset)
        return array.reshape(shape).copy()

    def close(self) -> None:
        """Give the memory back; the server's own mapping of it stays valid."""
        with contextlib.suppress(BufferError):
            self._memory.close()
        with contextlib.suppress(FileNotFoundError):
            self._memory.unlink()

    def _take(self, size: int) -> int:
        offset = self._used
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        if self._used > self.size:
            raise ValueError(f"{self._used} bytes do not fit into a region of {self.size}")
        return offset


@contextlib.contextmanager
def region(
    endpoint: Endpoint, inputs: Mapping[str, Any], outputs: Mapping[str, int]
) -> Iterator[Region | None]:
    """A region for one request, or None where it would not help or the server takes none.

    Args:
        outputs: bytes of each large output, by name.
    """
    arrays = [value for value in inputs.values() if isinstance(value, np.ndarray)]
    sizes = [array.nbytes for array in arrays if array.nbytes >= MIN_BYTES]
    outputs = {name: size for name, size in outputs.items() if size >= MIN_BYTES}
    sizes += outputs.values()
    if not sizes or not is_usable(endpoint):
        yield None
        return
    made = Region(sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), outputs)
    try:
        is_known = _register(endpoint, made)
        wait_s = 0.0
        try:
            yield made if is_known else None
        except (Unavailable, Stopped):
            wait_s = OUTLIVES_S  # nobody knows whether the server still writes into it
            raise
        finally:
            if is_known and wait_s:
                timer = threading.Timer(wait_s, _unregister, (endpoint, made))
                timer.daemon = True
                timer.start()
            elif is_known:
                _unregister(endpoint, made)
    finally:
        made.close()


def is_usable(endpoint: Endpoint) -> bool:
    """Whether shared memory is worth a try with this server."""
    server = endpoint.server
    return server.shared_memory == "auto" and server.is_local and server.url not in _without


def _register(endpoint: Endpoint, made: Region) -> bool:
    path = f"/v2/systemsharedmemory/region/{made.name}/register"
    body = json.dumps({"key": f"/{made.name}", "offset": 0, "byte_size": made.size}).encode()
    answer = endpoint.ask("shared memory", path, body, timeout_s=10.0)
    if answer.status != 200:  # other machine, other container, or not allowed: binary tensors then
        with _guard:
            _without.add(endpoint.server.url)
    return answer.status == 200


def _unregister(endpoint: Endpoint, made: Region) -> None:
    path = f"/v2/systemsharedmemory/region/{made.name}/unregister"
    with contextlib.suppress(TritonError):  # a server that is gone has forgotten it
        endpoint.ask("shared memory", path, b"", timeout_s=10.0)
