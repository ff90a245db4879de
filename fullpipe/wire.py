"""What travels between a client and the server: inputs, server-sent events, errors."""

from __future__ import annotations

import base64
import contextlib
import json
import operator
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fullpipe.contract import Tensor, shorten
from fullpipe.errors import Cancelled, InvalidRequest, PipelineError, Unavailable


def build_inputs(values: Mapping[str, Any], table: Iterable[Tensor]) -> dict[str, np.ndarray]:
    """Turn Python values into the arrays of a table's tensors.

    Args:
        values: by name; strings, numbers, and for UINT8 tensors arrays with or without batch axis.
        table: one of the contract's.
    Returns:
        Arrays as Triton takes them; strings as object arrays of UTF-8 bytes.
    Raises:
        InvalidRequest: a name that the table does not have, or a value of a wrong type or range.
    """
    tensors = {tensor.name: tensor for tensor in table}
    unknown = sorted(set(values) - set(tensors))
    if unknown:
        raise InvalidRequest(f"{unknown[0]} is no input, allowed: {', '.join(tensors)}")
    return {name: _to_array(tensors[name], value) for name, value in values.items()}


def _to_array(tensor: Tensor, value: Any) -> np.ndarray:
    if tensor.dtype == "STRING":
        if not isinstance(value, str):
            raise InvalidRequest(f"{tensor.name} is {type(value).__name__}, needs a string")
        return np.array([value.encode("utf-8", "replace")], dtype=object)
    if tensor.dims != (1,):
        array = np.asarray(value)
        needed = np.dtype({"FP32": "float32"}.get(tensor.dtype, tensor.dtype.lower()))
        if array.ndim == len(tensor.dims) - 1:
            array = array[None]
        fits = array.ndim == len(tensor.dims) and all(
            size in (-1, got) for size, got in zip(tensor.dims, array.shape, strict=True)
        )
        if array.dtype != needed or not fits:
            raise InvalidRequest(
                f"{tensor.name} is {array.dtype} {list(array.shape)}, needs {needed}"
                f" {list(tensor.dims)}"
            )
        return array
    try:
        if tensor.dtype == "FP32":
            return np.array([float(value)], dtype=np.float32)
        limits = np.iinfo(tensor.dtype.lower())
        number = operator.index(value)
    except (TypeError, ValueError):
        kind = "a number" if tensor.dtype == "FP32" else "a whole number"
        raise InvalidRequest(f"{tensor.name}={shorten(value)} must be {kind}") from None
    if not limits.min <= number <= limits.max:
        raise InvalidRequest(f"{tensor.name}={number} must be in [{limits.min}, {limits.max}]")
    return np.array([number], dtype=limits.dtype)


def json_fields(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The body of a generate request; pictures travel as base64 PNG."""
    fields: dict[str, Any] = {}
    for name, array in arrays.items():
        if array.ndim > 1:
            if len(array) != 1:
                raise InvalidRequest(f"{name} holds {len(array)} pictures, a stream takes one")
            if f"{name}_b64" in arrays:
                raise InvalidRequest(f"{name} and {name}_b64 are both given")
            fields[f"{name}_b64"] = base64.b64encode(encode_png(array[0])).decode()
        else:
            value = array.item()
            fields[name] = value.decode() if isinstance(value, bytes) else value
    return fields


def encode_png(pixels: np.ndarray) -> bytes:
    """[H, W] or [H, W, 3] uint8 as a PNG file; here, so that a client does without Pillow."""
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels[0].size), dtype=np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)
    colour_type = 2 if pixels.ndim == 3 else 0
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes(), 1)),
        (b"IEND", b""),
    ):
        file += struct.pack(">I", len(data)) + kind + data
        file += struct.pack(">I", zlib.crc32(kind + data))
    return file


def sse_data(chunks: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event, whatever the chunks' borders.

    Lines end in LF, CRLF or CR; several data lines of an event are joined by LF; comments and
    other fields are passed over, and so is an event that is not finished by an empty line
    (https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation).
    """
    lines: list[str] = []
    for line in _lines(chunks):
        if line:
            field, _, value = line.decode("utf-8", "replace").partition(":")
            if field == "data":
                lines.append(value.removeprefix(" "))
        elif lines:
            yield "\n".join(lines)
            lines = []


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []
    has_cr = False
    for chunk in chunks:
        first, *others = re.split(rb"\r\n|\n|\r", chunk[has_cr and chunk[:1] == b"\n" :])
        has_cr = chunk.endswith(b"\r")
        parts.append(first)
        for other in others:
            yield b"".join(parts)
            parts = [other]


_ERRORS = {kind.code: kind for kind in (PipelineError, InvalidRequest, Unavailable, Cancelled)}
_WRAPPING = re.compile(rf"(?:in ensemble '[^']*', |({'|'.join(_ERRORS)}): )*")
_STATUS_ERRORS = {
    400: InvalidRequest,
    413: InvalidRequest,
    429: Unavailable,
    499: Cancelled,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


def server_error(message: str, status: int | None) -> PipelineError:
    """What a server's error message means.

    The HTTP status alone does not say: a generate request answers 400 to every error, a stream
    has none once it runs. So a code in front of the message counts first.
    """
    wrapping = _WRAPPING.match(message)
    assert wrapping is not None
    kind = _ERRORS.get(wrapping[1] or "") or _STATUS_ERRORS.get(status or 0, PipelineError)
    return kind(" ".join(message[wrapping.end() :].split()) or f"HTTP {status}")


def error_text(body: bytes) -> str:
    """The message of an error's body: JSON, a server-sent event, or a gateway's page."""
    text = body.decode("utf-8", "replace").strip()
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(text.removeprefix("data:"))["error"])
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())[:200]
