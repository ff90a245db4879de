"""Where this project meets Triton's Python backend: tensors, errors, BLS calls and metrics.

The only module that imports `triton_python_backend_utils`, which exists inside Triton alone.
Numeric tensors go out through DLPack when they are torch's, which works with every numpy.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from fullpipe.errors import Cancelled, InvalidRequest, PipelineError, Unavailable
from fullpipe.seal import check_seal, seal_parameters

log = logging.getLogger(__name__)

PUBLISH_EVERY_S = 0.2
METRICS = {
    "fullpipe_ticks_total": ("COUNTER", "Ticks of the denoising loop"),
    "fullpipe_tick_rows_total": ("COUNTER", "UNet rows evaluated, all ticks"),
    "fullpipe_image_steps_total": ("COUNTER", "Table rows advanced, all images"),
    "fullpipe_tick_seconds_total": ("COUNTER", "Seconds spent in ticks"),
    "fullpipe_requests_total": ("COUNTER", "Requests answered, by outcome"),
    "fullpipe_stage_milliseconds_total": ("COUNTER", "Milliseconds spent, by stage"),
    "fullpipe_stage_count_total": ("COUNTER", "Requests that passed a stage"),
    "fullpipe_result_cache_total": ("COUNTER", "Look-ups of whole results, by result"),
    "fullpipe_open_jobs": ("GAUGE", "Requests that are not answered yet"),
    "fullpipe_queued_images": ("GAUGE", "Images that wait for a slot"),
    "fullpipe_slots_in_use": ("GAUGE", "Images in the denoising loop"),
}
_Key = tuple[str, str, str]

# A BLS caller is told INTERNAL whatever the model answered, and /generate answers 400 to
# everything, so the code travels at the head of the message too.
_CODE = re.compile(r"^(?:in ensemble '[^']*', )?([A-Z_]+): ")
_CLASSES = {kind.code: kind for kind in (InvalidRequest, Unavailable, Cancelled)}


def version_folder(args: Mapping[str, str]) -> Path:
    """The version folder of the model that `initialize(args)` is called for."""
    return Path(args["model_repository"]) / args["model_version"]


def log_to_triton(model_name: str) -> None:
    """Send this process's log records to Triton's log, each with the model's name.

    The stub's own streams are ASCII, and printing a prompt to them would raise.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            write = pb_utils.Logger.log_error
            if record.levelno < logging.WARNING:
                write = pb_utils.Logger.log_info
            elif record.levelno < logging.ERROR:
                write = pb_utils.Logger.log_warn
            write(f"{model_name}: {self.format(record)}")

    logger = logging.getLogger("fullpipe")
    logger.handlers = [Handler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def read_inputs(request: Any) -> dict[str, np.ndarray]:
    """All inputs of a request as numpy arrays of their own; strings are object arrays of bytes.

    Copies, because a request that is answered after `execute` has returned outlives Triton's
    shared memory under its inputs.
    """
    return {tensor.name(): tensor.as_numpy().copy() for tensor in request.inputs()}


def trace_context(request: Any) -> str | None:
    """The trace that a request belongs to, as JSON with a traceparent; None without one."""
    trace = request.trace()
    return trace.get_context() if trace is not None else None


def add_job_id(request: Any, inputs: dict[str, np.ndarray]) -> None:
    """Name a job after the request's X-Request-Id where it has no name of its own.

    So the gateway's log and the loop's know it by one name. Triton hands the header over when it is
    started with `--http-header-forward-pattern`.
    """
    if "job_id" in inputs or "op" in inputs:
        return
    for name, value in json.loads(request.parameters() or "{}").items():
        if name.lower() == "x-request-id" and isinstance(value, str) and value:
            inputs["job_id"] = np.array([value.encode()], dtype=object)


def tensor(name: str, value: Any) -> Any:
    """A Triton tensor of a str, a list of str, a numpy array or a torch tensor."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        return pb_utils.Tensor(name, np.array([text.encode() for text in value], dtype=object))
    if isinstance(value, np.ndarray):
        return pb_utils.Tensor(name, np.ascontiguousarray(value))
    return pb_utils.Tensor.from_dlpack(name, value.contiguous())


def response(outputs: Mapping[str, Any]) -> Any:
    """A response with these outputs."""
    return pb_utils.InferenceResponse([tensor(name, value) for name, value in outputs.items()])


def error_response(error: Exception) -> Any:
    """The response for a failure; what is not expected is logged and answered generically."""
    if not isinstance(error, PipelineError):
        log.error("a request failed", exc_info=error)
        error = PipelineError("the server failed on this request; its log has the cause")
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(
            f"{error.code}: {error}", getattr(pb_utils.TritonError, error.code)
        )
    )


class Sender:
    """Where the answers of one request go; from any thread, after `execute` has returned."""

    def __init__(self, request: Any):
        self._sender = request.get_response_sender()
        self._wanted = set(request.requested_output_names())

    def is_lost(self) -> bool:
        """Whether the client of a decoupled request has gone away."""
        return self._sender.is_cancelled()

    def event(self, outputs: Mapping[str, Any]) -> None:
        """One of several responses of a decoupled request."""
        self._sender.send(self._response(outputs))

    def last(self, outcome: Mapping[str, Any] | Exception) -> None:
        """The last (or only) response of a request."""
        if isinstance(outcome, Exception):
            answer = error_response(outcome)
        else:
            answer = self._response(outcome)
        self._sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _response(self, outputs: Mapping[str, Any]) -> Any:
        # The stub drops what nobody asked for, but without the GIL (ResponseSender::Send), and to
        # free a Python object without it ends the process from Python 3.12 on.
        return response({name: outputs[name] for name in outputs if name in self._wanted})


def call_model(model: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
    """Call another model of this server and wait for it; from any thread.

    Tensors travel in the CPU's memory both ways. Triton 2.51 would copy inputs there all the same,
    and does not end by itself any more once a model has got GPU tensors from another one.

    Args:
        inputs: numpy arrays, torch tensors on the CPU and strings by name.
    Returns:
        Output name to Triton tensor, on the CPU.
    Raises:
        PipelineError: what the model answered, under the same code.
    """
    answer = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=list(outputs),
        inputs=[tensor(name, value) for name, value in inputs.items()],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        parameters=seal_parameters(),
    ).exec()
    if answer.has_error():
        message = answer.error().message()
        code = _CODE.match(message)
        kind = _CLASSES.get(code.group(1), PipelineError) if code else PipelineError
        raise kind(_CODE.sub("", message))
    return {output.name(): output for output in answer.output_tensors()}


def text(name: str, array: np.ndarray | None) -> str:
    """The only element of a STRING input, "" where it was left out.

    Raises:
        InvalidRequest: it is not UTF-8.
    """
    if array is None:
        return ""
    try:
        return array.reshape(-1)[0].decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name} is not UTF-8: {error.reason}") from None


def first_string(output: Any) -> str:
    """The only element of a STRING tensor."""
    return output.as_numpy().reshape(-1)[0].decode()


def run_stage(
    requests: Sequence[Any],
    stage: Callable[[dict[str, np.ndarray]], Mapping[str, Any]],
    is_open: bool = False,
) -> list[Any]:
    """Answer each request of an ordinary model by itself, so one bad request fails alone.

    Args:
        is_open: take calls from anybody, also on a sealed server; see `fullpipe.seal`.
    """
    responses = []
    for request in requests:
        try:
            if not is_open:
                check_seal(request.parameters())
            responses.append(response(stage(read_inputs(request))))
        except Exception as error:
            responses.append(error_response(error))
    return responses


def abort_loading(error: PipelineError) -> Any:
    """The exception with which `initialize` refuses to load: one line, the remedy in it."""
    return pb_utils.TritonModelException(str(error))


class TritonMetrics:
    """The loop's `Observer`: Prometheus metrics on Triton's own /metrics page.

    Events are summed up here and published by one thread a few times a second: every update is a
    round trip to the server, which the loop must not wait for, and Triton 2.51 crashes when two
    threads update at once.
    """

    def __init__(self, pipeline: str):
        self._pipeline = pipeline
        self._families = {
            name: pb_utils.MetricFamily(
                name=name, description=description, kind=getattr(pb_utils.MetricFamily, kind)
            )
            for name, (kind, description) in METRICS.items()
        }
        self._metrics: dict[_Key, Any] = {}
        self._added: dict[_Key, float] = {}
        self._set: dict[_Key, float] = {}
        self._guard = threading.Lock()
        self._has_news = threading.Event()
        self._is_closing = False
        for name, (kind, _) in METRICS.items():
            if kind == "GAUGE":
                self._set[name, "", ""] = 0.0
        self._thread = threading.Thread(target=self._publish, name="metrics", daemon=True)
        self._thread.start()

    def tick(self, slots: int, rows: int, seconds: float) -> None:
        """See `Observer`."""
        self._add("fullpipe_ticks_total", 1)
        self._add("fullpipe_tick_rows_total", rows)
        self._add("fullpipe_image_steps_total", slots)
        self._add("fullpipe_tick_seconds_total", seconds)

    def stage(self, name: str, milliseconds: float) -> None:
        """See `Observer`."""
        self._add("fullpipe_stage_milliseconds_total", milliseconds, "stage", name)
        self._add("fullpipe_stage_count_total", 1, "stage", name)

    def outcome(self, code: str) -> None:
        """See `Observer`."""
        self._add("fullpipe_requests_total", 1, "outcome", code)

    def result_cache(self, result: str) -> None:
        """One look-up of a whole result; see `fullpipe.cache_store.RedisStore.get`."""
        self._add("fullpipe_result_cache_total", 1, "result", result)

    def waiting(self, open_jobs: int, queued_images: int, slots: int) -> None:
        """See `Observer`; negative numbers leave a gauge as it is."""
        with self._guard:
            for name, value in (
                ("fullpipe_open_jobs", open_jobs),
                ("fullpipe_queued_images", queued_images),
                ("fullpipe_slots_in_use", slots),
            ):
                if value >= 0:
                    self._set[name, "", ""] = value
        self._has_news.set()

    def close(self) -> None:
        """Publish what is left and end the thread."""
        self._is_closing = True
        self._has_news.set()
        self._thread.join()

    def _add(self, name: str, value: float, label: str = "", label_value: str = "") -> None:
        key = (name, label, label_value)
        with self._guard:
            self._added[key] = self._added.get(key, 0.0) + value
        self._has_news.set()

    def _publish(self) -> None:
        while not self._is_closing:
            self._has_news.wait()
            self._has_news.clear()
            with self._guard:
                added, self._added = self._added, {}
                changed, self._set = self._set, {}
            try:
                for key, value in added.items():
                    self._metric(key).increment(value)
                for key, value in changed.items():
                    self._metric(key).set(value)
            except Exception:
                log.exception("metrics could not be published")
            time.sleep(PUBLISH_EVERY_S)

    def _metric(self, key: _Key) -> Any:
        if key not in self._metrics:
            name, label, label_value = key
            labels = {"pipeline": self._pipeline, **({label: label_value} if label else {})}
            self._metrics[key] = self._families[name].Metric(labels=labels)
        return self._metrics[key]


def counter(name: str, description: str, label: str, **labels: str) -> Callable[[str], None]:
    """A counter of a stage, by one label's value; for the thread of `execute` alone."""
    family = pb_utils.MetricFamily(
        name=name, description=description, kind=pb_utils.MetricFamily.COUNTER
    )
    metrics: dict[str, Any] = {}

    def count(value: str) -> None:
        if value not in metrics:
            metrics[value] = family.Metric(labels={**labels, label: value})
        metrics[value].increment(1)

    return count


def parameters(args: Mapping[str, str]) -> dict[str, str]:
    """The string parameters of the model's config.pbtxt."""
    config = json.loads(args["model_config"])
    return {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
