"""The client: pictures from a pipeline over HTTP, in one call or as a stream of events.

Needs numpy and `tritonclient[http]`, which writes and reads the binary tensor protocol. The
connections are `fullpipe.endpoint`'s, because tritonclient's belong to one thread, may send one
request twice when a connection breaks, and do not stream.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import json
import re
import secrets
import socket
from collections.abc import Generator, Iterable, Iterator, Mapping
from email.message import Message
from typing import Any
from urllib.parse import quote

import numpy as np

from fullpipe import contract
from fullpipe.connection import DEFAULT_URL as DEFAULT_URL
from fullpipe.connection import Connection
from fullpipe.contract import Tensor
from fullpipe.endpoint import Endpoint
from fullpipe.errors import Cancelled, PipelineError, Unavailable
from fullpipe.wire import build_inputs, json_fields, server_error, sse_data

DEFAULT_PIPELINE = "full_pipeline"
# Above the server's default deadline of 300 s, so that the server's own message arrives first.
DEFAULT_TIMEOUT_S = 330.0
CANCEL_TIMEOUT_S = 2.0
REPEATS = 2
FACTS_PARAMETER = "fullpipe_pipeline"


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A pipeline that a server offers.

    Attributes:
        name: what `Client(pipeline=...)` takes.
        ready: whether it answers requests now.
        facts: samplers, schedulers, defaults, limits, checkpoint, version, step_cache, stream;
            empty while it is not ready.
    """

    name: str
    ready: bool
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """What one request makes.

    Attributes:
        info: seed, size, sampler, job_id, milliseconds per stage, …
        encoded: one file per picture in the `output_format` asked for; empty for raw.
        raw: [N, H, W, 3] uint8 for raw, else None.
    """

    info: dict[str, Any]
    encoded: list[bytes]
    raw: np.ndarray | None = None

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """[N, H, W, 3] uint8. Decodes files with Pillow; raw pictures need no Pillow."""
        if self.raw is not None:
            return self.raw
        from fullpipe.image import decode_image

        unlimited: dict[str, Any] = {"name": "image", "max_bytes": 1 << 40, "max_side_px": 1 << 24}
        texts = [base64.b64encode(file).decode() for file in self.encoded]
        return np.concatenate([decode_image(text, **unlimited) for text in texts])


class Client:
    """Asks one pipeline of one server for pictures. May be shared between threads.

    Every failure is a `fullpipe.errors.PipelineError`: InvalidRequest for what can never succeed,
    Unavailable for what may succeed later (also a server that cannot be reached), Cancelled.
    """

    def __init__(
        self,
        url: str | None = None,
        pipeline: str = DEFAULT_PIPELINE,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        headers: Mapping[str, str] | None = None,
        api_key: str | None = None,
        ca_cert: str | None = None,
    ):
        """
        Args:
            url: address of the server's HTTP endpoint or gateway, with a path if it has one. None
                here and below takes what `fullpipe.connection` finds.
            timeout_s: longest silence of the server before a call is given up.
            headers: sent with every request; they go before the key.
            api_key: a gateway's key or token; "" for none.
            ca_cert: PEM file of the certificates to trust; "" for the system's.
        """
        found = Connection.load()
        key = found.api_key if api_key is None else api_key
        credentials = {"Authorization": f"Bearer {key}"} if key else {}
        if {name.lower() for name in headers or {}} & {"authorization", "x-api-key"}:
            credentials = {}
        self.pipeline = pipeline
        self._timeout_s = timeout_s
        self._endpoint = Endpoint(
            found.url if url is None else url,
            {**credentials, **(headers or {})},
            found.ca_cert if ca_cert is None else ca_cert,
        )

    @property
    def url(self) -> str:
        """The server's address."""
        return self._endpoint.url

    def pipelines(self) -> list[Pipeline]:
        """The pipelines of the server, or only this client's where a gateway hides the index."""
        endpoint, timeout_s = self._endpoint, self._timeout_s
        status, _, body = endpoint.call(timeout_s, "POST", "/v2/repository/index", b"{}")
        states: dict[str, bool] = {}
        if status in (401, 403, 404, 405):
            status, _, body = endpoint.call(timeout_s, "GET", f"{_model(self.pipeline)}/ready")
            if status != 400:  # 400: not ready
                endpoint.check(status, body, f"model {self.pipeline!r}")
            states[self.pipeline] = status == 200
        else:
            endpoint.check(status, body, "the repository index")
            for entry in endpoint.parse_json(body):
                is_ready = entry.get("state") == "READY"
                states[entry["name"]] = states.get(entry["name"], False) or is_ready
        found = []
        for name, is_ready in sorted(states.items()):
            status, _, body = endpoint.call(timeout_s, "GET", f"{_model(name)}/config")
            facts = _facts(endpoint.parse_json(body)) if status == 200 else None
            if facts is not None or name == self.pipeline:
                found.append(Pipeline(name, is_ready, facts or {}))
        return found

    def generate(self, prompt: str, **inputs: Any) -> Picture:
        """Make pictures, in one call.

        A call that is interrupted or times out cancels its job on the server where it can.

        Args:
            inputs: by the contract's names; None = left out. `init_image` and `mask` are uint8
                arrays, with or without the batch axis. `output_format` is raw unless given.
        """
        values = {"output_format": "raw", "job_id": secrets.token_urlsafe(16)}
        values.update({name: value for name, value in inputs.items() if value is not None})
        arrays = build_inputs({"prompt": prompt, **values}, contract.PICTURE_INPUTS)
        try:
            # Nothing is lost by a repeat: the same picture comes, and nobody has seen the first.
            headers = {**_job_header(values["job_id"]), "Idempotency-Key": '"repeatable"'}
            reply, _ = self._infer(
                self.pipeline, arrays, contract.PICTURE_OUTPUTS, self._timeout_s, headers
            )
        except (Unavailable, KeyboardInterrupt) as error:
            if isinstance(error.__cause__, TimeoutError) or isinstance(error, KeyboardInterrupt):
                with contextlib.suppress(PipelineError):
                    self.cancel(values["job_id"])
            raise
        encoded = [base64.b64decode(text) for text in reply["image"]]
        info = json.loads(reply["info"][0])
        return Picture(info, encoded, reply["images"] if not encoded else None)

    def stream(self, prompt: str, **inputs: Any) -> Stream:
        """Make pictures and hear of every step; png unless `output_format` says otherwise.

        Args:
            inputs: as for `generate`, and `preview`; a start picture or mask must be a single one.
        Returns:
            An iterator of dicts {"step", "steps", "preview": JPEG bytes or None}, and last a
            Picture. Closing it early, from any thread, cancels the job.
        """
        given = {name: value for name, value in inputs.items() if value is not None}
        arrays = build_inputs({"prompt": prompt, **given}, contract.STREAM_INPUTS)
        body = json.dumps(json_fields(arrays)).encode()
        headers = _job_header(str(given.get("job_id", "")))
        return Stream(self._endpoint, f"{self.pipeline}_stream", body, self._timeout_s, headers)

    def cancel(self, job_id: str, scheduler_model: str | None = None) -> dict[str, Any]:
        """Cancel a job by its id; returns the loop's answer, such as {"state": "cancelled"}.

        Args:
            scheduler_model: the pipeline's loop model, if not named as by `fullpipe assemble`.
        """
        is_plain = self.pipeline == DEFAULT_PIPELINE
        loop = scheduler_model or (
            "scheduler_model" if is_plain else f"{self.pipeline}_scheduler_model"
        )
        arrays = build_inputs({"op": "cancel", "job_id": job_id}, contract.LOOP_INPUTS)
        event = tuple(tensor for tensor in contract.LOOP_OUTPUTS if tensor.name == "event")
        timeout_s = min(self._timeout_s, CANCEL_TIMEOUT_S)
        # Behind a gateway one of several replicas has the job, and the others know nothing of it.
        number, count = 1, 1
        while True:
            headers = {**_job_header(job_id), "X-Fullpipe-Replica": str(number)}
            reply, reply_headers = self._infer(loop, arrays, event, timeout_s, headers)
            answer = json.loads(reply["event"][0])
            count = int(reply_headers.get("X-Fullpipe-Replicas") or count)
            if answer["state"] != "unknown" or number >= count:
                return answer
            number += 1

    def _infer(
        self,
        model: str,
        arrays: Mapping[str, np.ndarray],
        outputs: Iterable[Tensor],
        timeout_s: float,
        headers: Mapping[str, str],
    ) -> tuple[dict[str, np.ndarray], Message]:
        from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

        tensors = []
        for name, array in arrays.items():
            datatype = {"O": "BYTES", "f": "FP32"}.get(array.dtype.kind, array.dtype.name.upper())
            tensors.append(InferInput(name, list(array.shape), datatype))
            tensors[-1].set_data_from_numpy(array)
        names = [tensor.name for tensor in outputs]
        body, json_bytes = InferenceServerClient.generate_request_body(
            tensors, outputs=[InferRequestedOutput(name) for name in names]
        )
        headers = {"Content-Type": "application/octet-stream", **headers}
        if json_bytes is not None:
            headers["Inference-Header-Content-Length"] = str(json_bytes)
        # 502 is a gateway's word that a replica died with the request; another one may be there.
        for _ in range(REPEATS + 1 if "Idempotency-Key" in headers else 1):
            status, reply_headers, reply = self._endpoint.call(
                timeout_s, "POST", f"{_model(model)}/infer", body, headers
            )
            if status != 502:
                break
        self._endpoint.check(status, reply, f"model {model!r}")
        reply_json_bytes = reply_headers.get("Inference-Header-Content-Length")
        result = InferenceServerClient.parse_response_body(
            reply, header_length=int(reply_json_bytes) if reply_json_bytes else None
        )
        return {name: result.as_numpy(name) for name in names}, reply_headers


class Stream:
    """The events of one job and last its Picture; made by `Client.stream`. A context manager."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        body: bytes,
        timeout_s: float,
        headers: Mapping[str, str],
    ):
        self._is_closed = False
        self._socket: socket.socket | None = None
        self._events = self._run(endpoint, model, body, timeout_s, headers)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> dict[str, Any] | Picture:
        return next(self._events)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the stream; the server cancels the job. A thread that waits in it gets Cancelled."""
        self._is_closed = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ValueError):  # another thread is in it and leaves by itself
            self._events.close()

    def _run(
        self,
        endpoint: Endpoint,
        model: str,
        body: bytes,
        timeout_s: float,
        headers: Mapping[str, str],
    ) -> Generator[dict[str, Any] | Picture, None, None]:
        try:
            with endpoint.connected(timeout_s) as connection:
                self._socket = connection.sock
                if self._is_closed:
                    raise Unavailable("the stream was closed while it connected")
                path = f"{_model(model)}/generate_stream"
                headers = {"Content-Type": "application/json", **headers}
                response = endpoint.send(connection, "POST", path, body, headers)
                if response.status != 200:
                    endpoint.check(response.status, response.read(), f"model {model!r}")
                yield from _read_events(sse_data(iter(lambda: response.read1(65_536), b"")))
        except Unavailable:
            if self._is_closed:
                raise Cancelled("the stream was closed") from None
            raise
        finally:
            self._socket = None


def _read_events(events: Iterable[str]) -> Iterator[dict[str, Any] | Picture]:
    picture = None
    for data in events:
        try:
            document = json.loads(data)
            if "error" in document:
                raise server_error(document["error"], None)
            event = json.loads(document.get("event") or "{}")
            if "step" in event:
                preview = event.get("preview")
                yield {
                    "step": event["step"],
                    "steps": event["steps"],
                    "preview": base64.b64decode(preview) if preview else None,
                }
            if document.get("info"):
                picture = _streamed_picture(document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PipelineError(f"the stream holds an event of another kind: {error!r}") from None
    if picture is None:
        raise Unavailable("the stream ended without a picture; look at the server's log")
    yield picture


def _streamed_picture(document: dict[str, Any]) -> Picture:
    info, files = json.loads(document["info"]), document["image"]
    files = [files] if isinstance(files, str) else files
    raw = None
    if not files:
        raw = np.array(document["images"], dtype=np.uint8)
        raw = raw.reshape(-1, info["height"], info["width"], 3)
    return Picture(info, [base64.b64decode(text) for text in files], raw)


def _job_header(job_id: str) -> dict[str, str]:
    """The header by which a gateway's log, and its way to a replica, know the job."""
    return {"X-Request-Id": job_id} if re.fullmatch(r"[A-Za-z0-9._~-]{1,128}", job_id) else {}


def _model(name: str) -> str:
    return f"/v2/models/{quote(name, safe='')}"


def _facts(config: dict[str, Any]) -> dict[str, Any] | None:
    parameter = config.get("parameters", {}).get(FACTS_PARAMETER)
    return json.loads(parameter["string_value"]) if parameter else None
