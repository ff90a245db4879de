"""What the way of the pixels costs: JSON, HTTP, gRPC, and system shared memory.

The number matters because a client on the same machine may hand over pixels in shared memory, and
because everybody starts with curl, whose JSON carries pictures as text. One step only, so that the
transport is not lost in the denoising; the ways take turns within one run. Shared memory needs a
region that the client registers, and a server that allows it: never offer that to strangers.

    python -m bench.transports [--count 10] [--sizes 256 512]
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import urllib.request
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import tritonclient.grpc
import tritonclient.http

from bench.record import spread, store
from bench.served import prompts, served_demo
from fullpipe.client import DEFAULT_PIPELINE
from fullpipe.server import TritonServer

_NUMPY = {"BYTES": object, "UINT64": np.uint64, "INT32": np.int32}
REGION = "bench_pixels"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="pixels")
    arguments = parser.parse_args()

    captions, seeds = prompts(), itertools.count()
    by_size = {}
    with served_demo() as (server, _):
        for size in arguments.sizes:
            seconds: dict[str, list[float]] = {}
            with Ways(server, size) as ways:
                for turn in range(arguments.count + 2):
                    for name, way in ways.all.items():
                        request = {
                            "prompt": next(captions),
                            "seed": next(seeds),
                            "steps": arguments.steps,
                            "width": size,
                            "height": size,
                        }
                        started = time.perf_counter()
                        way(request)
                        if turn >= 2:  # the first ones warm up
                            passed = time.perf_counter() - started
                            seconds.setdefault(name, []).append(passed)
            spreads = {name: spread(values) for name, values in seconds.items()}
            base = spreads["http_raw"]["p50_ms"]
            by_size[f"{size}x{size}"] = {
                name: {"over_http_raw": round(values["p50_ms"] / base, 3), **values}
                for name, values in spreads.items()
            }
    store("transports", {"request": f"{arguments.steps} step, one at a time", "by_size": by_size})


class Ways:
    """The same request by every way, each of which returns when the picture is there."""

    def __init__(self, server: TritonServer, size: int):
        self._url = f"{server.url}/v2/models/{DEFAULT_PIPELINE}/generate"
        self._http = tritonclient.http.InferenceServerClient(server.url.removeprefix("http://"))
        self._grpc = tritonclient.grpc.InferenceServerClient(server.grpc_address)
        self._size = size
        self._bytes = size * size * 3
        self._region = SharedMemory(create=True, size=self._bytes)
        self._grpc.register_system_shared_memory(REGION, f"/{self._region.name}", self._bytes)
        self.all: dict[str, Callable[[dict], object]] = {
            "generate_json_png": self._generate,
            "http_png": lambda request: self._infer(self._http, tritonclient.http, request, "png"),
            "http_raw": lambda request: self._infer(self._http, tritonclient.http, request, "raw"),
            "grpc_raw": lambda request: self._infer(self._grpc, tritonclient.grpc, request, "raw"),
            "grpc_shared_memory_raw": self._shared,
        }

    def __enter__(self) -> Ways:
        return self

    def __exit__(self, *_: object) -> None:
        self._grpc.unregister_system_shared_memory(REGION)
        self._region.close()
        self._region.unlink()
        self._http.close()
        self._grpc.close()

    def _generate(self, request: dict) -> None:
        call = urllib.request.Request(self._url, json.dumps(request).encode())
        with urllib.request.urlopen(call, timeout=60) as answer:
            assert len(json.load(answer)["image"]) > 100

    def _infer(self, client, library, request: dict, output_format: str) -> None:
        answer = client.infer(
            DEFAULT_PIPELINE, _inputs(library, {**request, "output_format": output_format})
        )
        if output_format == "raw":
            assert answer.as_numpy("images").shape == (1, self._size, self._size, 3)
        else:
            assert len(answer.as_numpy("image")[0]) > 100

    def _shared(self, request: dict) -> None:
        library = tritonclient.grpc
        images = library.InferRequestedOutput("images")
        images.set_shared_memory(REGION, self._bytes)
        self._grpc.infer(
            DEFAULT_PIPELINE,
            _inputs(library, {**request, "output_format": "raw"}),
            outputs=[images],
        )
        pixels = np.frombuffer(self._region.buf, np.uint8, self._bytes)
        assert pixels.std() > 0


def _inputs(library, request: dict) -> list:
    """Named tensors of either library of tritonclient."""
    made = []
    for name, value in request.items():
        dtype = "BYTES" if isinstance(value, str) else "UINT64" if name == "seed" else "INT32"
        value = value.encode() if isinstance(value, str) else value
        made.append(library.InferInput(name, [1], dtype))
        made[-1].set_data_from_numpy(np.array([value], dtype=_NUMPY[dtype]))
    return made


if __name__ == "__main__":
    main()
