"""TensorRT plans as networks. Written against the API and unrun so far: see docs/engines.md.

A call binds the addresses of the caller's tensors and queues one execution on the current CUDA
stream. Nothing is copied or allocated, so that a CUDA graph can record it, which the loop does.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fullpipe.config import PipelineConfig
from fullpipe.engines.network import NetworkUNet
from fullpipe.engines.tensorrt_library import library, logger
from fullpipe.errors import InvalidRequest, PipelineError, SetupError


class TensorRtNetwork:
    """One plan on one GPU, with an execution context per optimisation profile.

    Contexts share one scratch memory, so calls must be on one stream; a lock keeps the host side
    of a call together.
    """

    def __init__(self, path: Path, device: str):
        """Load a plan.

        Raises:
            SetupError: there is no TensorRT or no GPU that it runs on, the file is damaged or was
                built by another version, or it does not fit into the GPU's memory.
        """
        found = library()
        found.require_gpu(device)
        trt = found.module
        self._device = torch.device(device)
        self._errors: list[str] = []
        self._log = logger(trt, self._errors)
        with torch.cuda.device(self._device):
            self._runtime = trt.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self._engine is None:
                raise SetupError(
                    f"{path} cannot be loaded by {found.name} {trt.__version__}"
                    f" ({self._reason()}); assemble the pipeline again on this machine"
                )
            self._inputs, self._outputs = self._bindings(trt)
            self._ranges = [
                self._profile(index) for index in range(self._engine.num_optimization_profiles)
            ]
            self._contexts = self._make_contexts(trt, path)
        self._guard = threading.Lock()

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """See `Network`; queues the execution on the current stream and does not wait for it."""
        if set(inputs) != set(self._inputs) or set(outputs) != set(self._outputs):
            raise PipelineError(
                f"the plan has {sorted(self._inputs)} → {sorted(self._outputs)}, the call"
                f" {sorted(inputs)} → {sorted(outputs)}"
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        context = self._contexts[choose_profile(self._ranges, shapes)]
        with self._guard:
            for name, shape in shapes.items():
                if not context.set_input_shape(name, shape):
                    raise PipelineError(f"TensorRT refused {name} {shape}: {self._reason()}")
            for name, tensor in (*inputs.items(), *outputs.items()):
                expected = (self._inputs | self._outputs)[name]
                if tensor.dtype != expected or not tensor.is_contiguous():
                    raise PipelineError(f"{name} is {tensor.dtype}, needed contiguous {expected}")
                if not context.set_tensor_address(name, tensor.data_ptr()):
                    raise PipelineError(f"TensorRT refused the memory of {name}: {self._reason()}")
            stream = torch.cuda.current_stream(self._device).cuda_stream
            if not context.execute_async_v3(stream):
                raise PipelineError(f"TensorRT could not execute: {self._reason()}")

    def _bindings(self, trt: Any) -> tuple[dict[str, torch.dtype], dict[str, torch.dtype]]:
        dtypes = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.INT64: torch.int64,
            trt.DataType.UINT8: torch.uint8,
        }
        found: dict[Any, dict[str, torch.dtype]] = {
            trt.TensorIOMode.INPUT: {},
            trt.TensorIOMode.OUTPUT: {},
        }
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            mode = self._engine.get_tensor_mode(name)
            found[mode][name] = dtypes[self._engine.get_tensor_dtype(name)]
        return found[trt.TensorIOMode.INPUT], found[trt.TensorIOMode.OUTPUT]

    def _profile(self, index: int) -> dict[str, tuple[Sequence[int], Sequence[int]]]:
        found: dict[str, tuple[Sequence[int], Sequence[int]]] = {}
        for name in self._inputs:
            low, _, high = self._engine.get_tensor_profile_shape(name, index)
            found[name] = (tuple(low), tuple(high))
        return found

    def _make_contexts(self, trt: Any, path: Path) -> list[Any]:
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        count = self._engine.num_optimization_profiles
        needed = [self._engine.get_device_memory_size_for_profile_v2(i) for i in range(count)]
        try:
            self._scratch = torch.empty(max(needed), dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise SetupError(
                f"{path} needs {max(needed) / 2**30:.1f} GiB to run, more than {self._device} has"
                " free; assemble with fewer --max-rows or smaller --sizes"
            ) from error
        contexts = []
        stream = torch.cuda.current_stream(self._device)
        for index in range(count):
            context = self._engine.create_execution_context(strategy)
            if context is None:
                raise SetupError(f"{path}: no execution context ({self._reason()})")
            if not context.set_optimization_profile_async(index, stream.cuda_stream):
                raise SetupError(f"{path}: profile {index} was refused ({self._reason()})")
            context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
            contexts.append(context)
        stream.synchronize()
        return contexts

    def _reason(self) -> str:
        return self._errors[-1] if self._errors else "it gave no reason"


def choose_profile(
    ranges: Sequence[Mapping[str, tuple[Sequence[int], Sequence[int]]]],
    shapes: Mapping[str, Sequence[int]],
) -> int:
    """The first profile that holds all shapes.

    Args:
        ranges: per profile, tensor name to smallest and largest shape.
        shapes: of a call.
    Raises:
        InvalidRequest: none does; the message names the tensor that fits into none.
    """
    for index, profile in enumerate(ranges):
        if all(_holds(profile[name], shape) for name, shape in shapes.items()):
            return index
    for name, shape in shapes.items():
        if not any(_holds(profile[name], shape) for profile in ranges):
            lows = [min(sizes) for sizes in zip(*(p[name][0] for p in ranges), strict=True)]
            highs = [max(sizes) for sizes in zip(*(p[name][1] for p in ranges), strict=True)]
            raise InvalidRequest(
                f"{name} has shape {list(shape)}, the engine was built for {lows} … {highs}"
            )
    raise InvalidRequest(f"no profile of the engine holds {dict(shapes)}")


def _holds(allowed: tuple[Sequence[int], Sequence[int]], shape: Sequence[int]) -> bool:
    low, high = allowed
    return len(low) == len(shape) and all(
        smallest <= size <= largest
        for smallest, size, largest in zip(low, shape, high, strict=True)
    )


class TensorRtUNet(NetworkUNet):
    """A UNet plan as an engine that a CUDA graph can record."""

    is_capturable = True

    def __init__(self, network: TensorRtNetwork, config: PipelineConfig):
        """Take the rows that `config` was built for."""
        super().__init__(network)
        self._buckets = tuple(config.loop.buckets)

    def row_counts(self, height: int, width: int, tokens: int) -> tuple[int, ...]:
        """See `Engine`; each bucket is the best case of a profile of its own."""
        return self._buckets
