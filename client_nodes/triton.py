"""Requests to Triton models: binary tensors in and out, and streams of events.

tritonclient[http] writes and reads the binary tensor format; `endpoint.py` carries it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from .call import Call
from .endpoint import Answer, Endpoint, Session
from .errors import Lost, TritonError
from .shared_memory import Region

Value = Any  # str, int, float or numpy array; see `_array`

# Scalars of the contract; Python's own types do not say which one is meant.
_TYPES = {
    "seed": np.uint64,
    "steps": np.int32,
    "cfg": np.float32,
    "denoise": np.float32,
    "width": np.int32,
    "height": np.int32,
    "batch_size": np.int32,
    "clip_skip": np.int32,
    "since": np.int32,
    "wait_ms": np.int32,
}


def model_path(name: str) -> str:
    """URL path of a model."""
    return f"/v2/models/{quote(name, safe='')}"


@dataclasses.dataclass
class Replica:
    """Which of a gateway's replicas is asked, from 1, and how many there are."""

    number: int = 1
    count: int = 1


def infer(
    endpoint: Endpoint,
    model: str,
    inputs: Mapping[str, Value],
    outputs: Sequence[str],
    *,
    call: Call | None = None,
    session: Session | None = None,
    timeout_s: float | None = None,
    region: Region | None = None,
    replica: Replica | None = None,
) -> dict[str, np.ndarray]:
    """Ask a model once.

    Args:
        inputs: by name; None values are left out.
        outputs: the wanted ones.
        session: a connection to use and keep; only for requests that may be repeated at will.
        region: shared memory that carries the large tensors.
        replica: the one to ask behind a gateway, which tells how many there are.
    Returns:
        Output name to array; strings as object arrays of bytes.
    Raises:
        TritonError: see `endpoint.Endpoint`.
    """
    import tritonclient.http as http

    what = f"model {model!r}"
    tensors = []
    for name, value in inputs.items():
        if value is not None:
            tensors.append(_tensor(http, name, _array(name, value), region))
    wanted = [http.InferRequestedOutput(name) for name in outputs]
    for output in wanted:
        if region is not None:
            region.place_output(output)
    body, head_bytes = http.InferenceServerClient.generate_request_body(tensors, outputs=wanted)
    headers = {"Content-Type": "application/octet-stream"}
    if head_bytes is not None:
        headers["Inference-Header-Content-Length"] = str(head_bytes)
    if replica is not None:
        headers["X-Fullpipe-Replica"] = str(replica.number)
    path = f"{model_path(model)}/infer"
    if session is not None:
        answer = session.ask(what, path, body, headers)
    else:
        answer = endpoint.ask(what, path, body, headers, call=call, timeout_s=timeout_s)
    endpoint.check(answer, what)
    if replica is not None:
        replica.count = int(answer.headers.get("X-Fullpipe-Replicas") or replica.count)
    answer_head_bytes = answer.headers.get("Inference-Header-Content-Length")
    try:
        result = http.InferenceServerClient.parse_response_body(
            answer.body, header_length=int(answer_head_bytes) if answer_head_bytes else None
        )
        return {name: _read_output(result, name, region) for name in outputs}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TritonError(
            f"{endpoint.server.url}, {what} answers what is no tensor: {error!r}"
        ) from None


def _read_output(result: Any, name: str, region: Region | None) -> np.ndarray:
    described = result.get_output(name)
    if described is None:
        raise KeyError(name)
    if region is not None and region.holds(name):
        return region.read_output(described)
    return result.as_numpy(name)


def _tensor(http: Any, name: str, array: np.ndarray, region: Region | None) -> Any:
    from tritonclient.utils import np_to_triton_dtype

    tensor = http.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    if region is None or not region.place_input(tensor, array):
        tensor.set_data_from_numpy(array)
    return tensor


def _array(name: str, value: Value) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value)
    if isinstance(value, str):
        return np.array([value.encode()], dtype=object)
    return np.array([value], dtype=_TYPES[name])


def control(
    endpoint: Endpoint,
    loop_model: str,
    op: str,
    job_id: str,
    *,
    timeout_s: float,
    session: Session | None = None,
    **inputs: Value,
) -> dict[str, Any]:
    """op=progress or op=cancel of a loop model; returns its event.

    Behind a gateway one of several replicas has the job, and the others know nothing of it.
    """
    given = {"op": op, "job_id": job_id, **inputs}
    replica = Replica()
    while True:
        outputs = infer(
            endpoint,
            loop_model,
            given,
            ["event"],
            session=session,
            timeout_s=timeout_s,
            replica=replica,
        )
        event = json.loads(outputs["event"][0])
        if event.get("state") != "unknown" or replica.number >= replica.count:
            return event
        replica.number += 1


def is_alive(endpoint: Endpoint, timeout_s: float) -> bool:
    """Whether anything answers at the server's address, be it only with a refusal."""
    try:
        endpoint.ask("health", "/v2/health/live", timeout_s=timeout_s)
    except TritonError:
        return False
    return True


def stream(
    endpoint: Endpoint, model: str, fields: Mapping[str, Value], call: Call
) -> Iterator[dict[str, Any]]:
    """Ask a decoupled model; yields the document of each server-sent event.

    Closing the generator ends the connection, and the server cancels the job.

    Args:
        fields: JSON values by name; None values are left out.
    """
    what = f"model {model!r}"
    body = json.dumps({key: value for key, value in fields.items() if value is not None}).encode()
    headers = {"Content-Type": "application/json"}
    with endpoint.opened(what, call) as connection:
        path = f"{model_path(model)}/generate_stream"
        response = endpoint.send(connection, what, path, body, headers)
        read_s = endpoint.server.read_timeout_s
        if response.status != 200:
            with endpoint.reading(what, read_s):
                text = response.read()
            endpoint.check(Answer(response.status, response.headers, text), what)
        rest = b""
        while True:
            with endpoint.reading(what, read_s):
                chunk = response.read1(1 << 16)
            call.heard = time.monotonic()
            if not chunk:
                break
            *events, rest = (rest + chunk).split(b"\n\n") if b"\n\n" in chunk else [rest + chunk]
            for event in events:
                document = _event(event, endpoint, what)
                if "error" in document:
                    raise endpoint.failure(document["error"], None, what)
                yield document
        if rest.strip():
            raise Lost(f"{endpoint.server.url}, {what} broke off in the middle of an event")


def _event(event: bytes, endpoint: Endpoint, what: str) -> dict[str, Any]:
    data = b"\n".join(
        line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")
    )
    try:
        document = json.loads(data)
        assert isinstance(document, dict)
    except (ValueError, AssertionError):
        raise TritonError(f"{endpoint.server.url}, {what} sends what is no event") from None
    return document
