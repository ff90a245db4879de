"""ONNX Runtime as a `Network`, on a CPU or, where its CUDA provider is installed, on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fullpipe.errors import SetupError

PRECISIONS = ("fp32", "fp16")  # its CPU provider has no bf16 convolution

_TYPES = {torch.float32: np.float32, torch.int64: np.int64, torch.uint8: np.uint8}


class OnnxNetwork:
    """One ONNX file; calls from several threads take turns as ONNX Runtime decides."""

    def __init__(self, path: Path, device: str):
        """Load a file and prepare it for a device.

        Raises:
            SetupError: onnxruntime is not installed, lacks the device, or cannot read the file.
        """
        try:
            import onnxruntime
        except ImportError:
            raise SetupError(
                "engine=onnx needs onnxruntime: pip install 'fullpipe[onnx]'"
            ) from None
        self._device = torch.device(device)
        self._index = self._device.index or 0
        provider = (
            "CUDAExecutionProvider" if self._device.type == "cuda" else "CPUExecutionProvider"
        )
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise SetupError(
                f"device={device} needs ONNX Runtime's {provider}, it has {', '.join(available)};"
                " pip install onnxruntime-gpu in the place of onnxruntime"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that spin while they wait take the cores that the other stages need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # fp32 is fp32 on a GPU too: its default computes such products in TF32, of 10 bits.
        on_gpu = {"device_id": str(self._index), "use_tf32": "0"}
        settings = on_gpu if self._device.type == "cuda" else {}
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=[(provider, settings)]
            )
        except Exception as error:  # its exceptions share no base but Exception
            message = str(error).splitlines()[0][:300]
            raise SetupError(
                f"{path} cannot be loaded by ONNX Runtime ({message}); assemble the pipeline again"
            ) from error
        used = self._session.get_providers()
        if provider not in used:  # it falls back to the CPU with a warning only
            raise SetupError(f"ONNX Runtime does not run {path} on {device}; it chose {used[0]}")

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """See `Network`; the tensors' own memory is bound, nothing is copied."""
        binding = self._session.io_binding()
        for tensors, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name, tensor in tensors.items():
                bind(
                    name,
                    self._device.type,
                    self._index,
                    _TYPES[tensor.dtype],
                    tuple(tensor.shape),
                    tensor.data_ptr(),
                )
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
