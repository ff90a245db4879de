"""The whole pipeline in one Python process, without Triton: for tests, benchmarks and scripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from fullpipe import contract
from fullpipe.config import PipelineConfig
from fullpipe.engines import Engine
from fullpipe.errors import PipelineError
from fullpipe.job import Result
from fullpipe.loop import Observer
from fullpipe.pipeline import Pipeline, Stages

_NUMPY = {"UINT64": np.uint64, "INT32": np.int32, "FP32": np.float32, "UINT8": np.uint8}
_DTYPES = {tensor.name: tensor.dtype for tensor in contract.LOOP_INPUTS}


class Silent:
    """An `Observer` that forgets."""

    def tick(self, slots: int, rows: int, seconds: float) -> None:
        """See `Observer`."""

    def stage(self, name: str, milliseconds: float) -> None:
        """See `Observer`."""

    def outcome(self, code: str) -> None:
        """See `Observer`."""

    def waiting(self, open_jobs: int, queued_images: int, slots: int) -> None:
        """See `Observer`."""


class LocalPipeline:
    """A pipeline whose calls take plain Python values by contract name."""

    def __init__(
        self,
        config: PipelineConfig,
        unets: Sequence[Engine],
        stages: Stages,
        observer: Observer | None = None,
    ):
        self._pipeline = Pipeline(config, unets, stages, observer or Silent())

    @classmethod
    def open(cls, checkpoint: Path, config: PipelineConfig) -> LocalPipeline:
        """All stages of a diffusers folder on `config.loop.devices`."""
        from fullpipe.engines.loading import load_unet, torch_dtype
        from fullpipe.stages import LocalStages

        devices, dtype = config.loop.devices, torch_dtype(config.loop.precision)
        unets = [load_unet(checkpoint / "unet", config, device) for device in devices]
        return cls(config, unets, LocalStages(checkpoint, device=devices[0], dtype=dtype))

    def submit(self, **inputs: Any) -> Future:
        """Start one call; the future yields a Result (a dict for control calls) or raises."""
        future: Future = Future()

        def reply(outcome: Result | dict | PipelineError) -> None:
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        self._pipeline.call(as_tensors(inputs), reply)
        return future

    def generate(self, **inputs: Any) -> Result:
        """One request and its answer; raises what the server would answer."""
        return self.submit(**inputs).result()

    def close(self) -> None:
        """Answer what is open and end all threads."""
        self._pipeline.close()

    def __enter__(self) -> LocalPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_tensors(
    inputs: Mapping[str, Any], dtype_of: Callable[[str], str] = _DTYPES.__getitem__
) -> dict[str, np.ndarray]:
    """Plain values to the arrays that Triton would deliver; None is left out."""
    arrays = {}
    for name, value in inputs.items():
        if value is None:
            continue
        dtype = dtype_of(name)
        if isinstance(value, np.ndarray):
            arrays[name] = value
        elif dtype == "STRING":
            arrays[name] = np.array([str(value).encode()], dtype=object)
        else:
            arrays[name] = np.array([value], dtype=_NUMPY[dtype])
    return arrays
