"""Safetensors files, read in place and written a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import torch

from fullpipe.errors import SetupError

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}
_CHUNK_BYTES = 16 << 20


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a file; the tensors lie in the mapped file.

    Raises:
        SetupError: it is missing, truncated, or no safetensors file.
    """
    if path.suffix != ".safetensors":
        raise SetupError(
            f"{path} is no .safetensors file; other formats can run code when they are read:"
            " convert it first"
        )
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except FileNotFoundError:
        raise SetupError(f"{path} is missing: check the path") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise SetupError(
            f"{path} ({size} bytes) is truncated or damaged ({error}): download it again"
        ) from None


def write_weights(
    path: Path, tensors: Mapping[str, torch.Tensor], wrote: Callable[[int], None]
) -> None:
    """Write a safetensors file (the format's header, then the tensors in order) in pieces.

    Args:
        path: of the new file.
        tensors: on the CPU; in any memory layout, written contiguous; types of `_NAMES`.
        wrote: is told the number of bytes after each piece.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            for first in range(0, len(content), _CHUNK_BYTES):
                piece = content[first : first + _CHUNK_BYTES]
                file.write(piece.data)
                wrote(len(piece))
