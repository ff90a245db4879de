"""Where this project meets Triton's Python backend: tensors, errors, BLS calls and metrics.

The only module that imports `triton_python_backend_utils`, which exists inside Triton alone.
Numeric tensors go out through DLPack when they are torch's, which works with every numpy.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from fullpipe.errors import Cancelled, InvalidRequest, PipelineError, Unavailable

log = logging.getLogger(__name__)

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
    """All inputs of a request as numpy arrays; strings are object arrays of bytes."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


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


def is_lost(sender: Any) -> bool:
    """Whether the client of a decoupled request has gone away."""
    return sender.is_cancelled()


def send_event(sender: Any, outputs: Mapping[str, Any]) -> None:
    """One of several responses of a decoupled request."""
    sender.send(response(outputs))


def send_last(sender: Any, outcome: Mapping[str, Any] | Exception) -> None:
    """The last (or only) response of a request."""
    last = error_response(outcome) if isinstance(outcome, Exception) else response(outcome)
    sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def call_model(model: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
    """Call another model of this server and wait for it; from any thread.

    Returns:
        Output name to Triton tensor.
    Raises:
        PipelineError: what the model answered, under the same code.
    """
    answer = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=list(outputs),
        inputs=[tensor(name, value) for name, value in inputs.items()],
    ).exec()
    if answer.has_error():
        message = answer.error().message()
        code = _CODE.match(message)
        kind = _CLASSES.get(code.group(1), PipelineError) if code else PipelineError
        raise kind(_CODE.sub("", message))
    return {output.name(): output for output in answer.output_tensors()}


def first_string(output: Any) -> str:
    """The only element of a STRING tensor."""
    return output.as_numpy().reshape(-1)[0].decode()


def run_stage(
    requests: Sequence[Any], stage: Callable[[dict[str, np.ndarray]], Mapping[str, Any]]
) -> list[Any]:
    """Answer each request of an ordinary model by itself, so one bad request fails alone."""
    responses = []
    for request in requests:
        try:
            responses.append(response(stage(read_inputs(request))))
        except Exception as error:
            responses.append(error_response(error))
    return responses


def abort_loading(error: PipelineError) -> Any:
    """The exception with which `initialize` refuses to load: one line, the remedy in it."""
    return pb_utils.TritonModelException(str(error))


class TritonMetrics:
    """The loop's `Observer`: Prometheus metrics on Triton's own /metrics page."""

    def __init__(self, pipeline: str):
        self._labels = {"pipeline": pipeline}
        self._families: list[Any] = []
        self._by_label: dict[tuple[str, str], Any] = {}
        self._ticks = self._counter("fullpipe_ticks_total", "Ticks of the denoising loop")
        self._rows = self._counter("fullpipe_tick_rows_total", "UNet rows evaluated, all ticks")
        self._steps = self._counter("fullpipe_image_steps_total", "Table rows advanced, all images")
        self._seconds = self._counter("fullpipe_tick_seconds_total", "Seconds spent in ticks")
        self._open = self._gauge("fullpipe_open_jobs", "Requests that are not answered yet")
        self._queue = self._gauge("fullpipe_queued_images", "Images that wait for a slot")
        self._slots = self._gauge("fullpipe_slots_in_use", "Images in the denoising loop")
        self._outcomes = self._family(
            "fullpipe_requests_total", "Requests answered, by outcome", "COUNTER"
        )
        self._stage_ms = self._family(
            "fullpipe_stage_milliseconds_total", "Milliseconds spent, by stage", "COUNTER"
        )
        self._stage_count = self._family(
            "fullpipe_stage_count_total", "Requests that passed a stage", "COUNTER"
        )

    def tick(self, slots: int, rows: int, seconds: float) -> None:
        """See `Observer`."""
        self._ticks.increment(1)
        self._rows.increment(rows)
        self._steps.increment(slots)
        self._seconds.increment(seconds)

    def stage(self, name: str, milliseconds: float) -> None:
        """See `Observer`."""
        self._labelled(self._stage_ms, "stage_ms", "stage", name).increment(milliseconds)
        self._labelled(self._stage_count, "stage_count", "stage", name).increment(1)

    def outcome(self, code: str) -> None:
        """See `Observer`."""
        self._labelled(self._outcomes, "outcome", "outcome", code).increment(1)

    def waiting(self, open_jobs: int, queued_images: int, slots: int) -> None:
        """See `Observer`; negative numbers leave a gauge as it is."""
        for gauge, value in (
            (self._open, open_jobs),
            (self._queue, queued_images),
            (self._slots, slots),
        ):
            if value >= 0:
                gauge.set(value)

    def _family(self, name: str, description: str, kind: str) -> Any:
        family = pb_utils.MetricFamily(
            name=name, description=description, kind=getattr(pb_utils.MetricFamily, kind)
        )
        self._families.append(family)
        return family

    def _counter(self, name: str, description: str) -> Any:
        return self._family(name, description, "COUNTER").Metric(labels=self._labels)

    def _gauge(self, name: str, description: str) -> Any:
        return self._family(name, description, "GAUGE").Metric(labels=self._labels)

    def _labelled(self, family: Any, kind: str, label: str, value: str) -> Any:
        key = (kind, value)
        if key not in self._by_label:
            self._by_label[key] = family.Metric(labels={**self._labels, label: value})
        return self._by_label[key]


def parameters(args: Mapping[str, str]) -> dict[str, str]:
    """The string parameters of the model's config.pbtxt."""
    config = json.loads(args["model_config"])
    return {key: value["string_value"] for key, value in config.get("parameters", {}).items()}


def use_torch_threads(count: int) -> None:
    """Limit torch's threads in this process; 0 keeps torch's own choice."""
    if count:
        sys.modules["torch"].set_num_threads(count)
