"""Spans of the denoising loop, under the trace that a request came with.

Triton exports the spans of its models by itself (`--trace-config mode=opentelemetry`). What happens
inside the loop only the loop knows, so it sends spans of its own, as OTLP over HTTP in JSON
(https://opentelemetry.io/docs/specs/otlp/#otlphttp), from a thread that nobody waits for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import queue
import re
import secrets
import threading
import time
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fullpipe.server import ServerConfig

log = logging.getLogger(__name__)

VARIABLE = "FULLPIPE_TRACES_URL"
_PARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_TIMEOUT_S = 2.0


def traced(config: ServerConfig, url: str) -> ServerConfig:
    """The same server, sending every request's spans to an OTLP collector.

    Args:
        url: of the collector, http://HOST:4318/v1/traces.
    """
    settings = ("mode=opentelemetry", "rate=1", "level=TIMESTAMPS", f"opentelemetry,url={url}")
    return dataclasses.replace(
        config,
        env={**config.env, VARIABLE: url},
        flags=(*config.flags, *(f"--trace-config={setting}" for setting in settings)),
    )


class LoopTraces:
    """Sends a span for each stage of a finished job."""

    def __init__(self, url: str, pipeline: str) -> None:
        self._url = url
        self._resource = {"attributes": _attributes({"service.name": f"fullpipe {pipeline}"})}
        self._waiting: queue.Queue[list[dict] | None] = queue.Queue(256)
        self._thread = threading.Thread(target=self._send, name="traces", daemon=True)
        self._thread.start()

    @classmethod
    def from_environment(cls, pipeline: str) -> LoopTraces | None:
        """Traces to FULLPIPE_TRACES_URL, or None where it is not set."""
        url = os.environ.get(VARIABLE)
        return cls(url, pipeline) if url else None

    def finished(self, context: str | None, info: Mapping[str, Any]) -> None:
        """Send the spans of a job that ends now.

        Args:
            context: `pb_utils.InferenceRequest.trace().get_context()`, JSON with a traceparent.
            info: of the job's result; `milliseconds` has its stages in their order.
        """
        parent = _PARENT.search(context or "")
        if parent is None:
            return
        stages = {name: ms for name, ms in info["milliseconds"].items() if name != "total"}
        at = time.time_ns() - int(sum(stages.values()) * 1e6)
        told = {
            "job_id": info["job_id"],
            "steps": info["steps"],
            "sampler": info["sampler_name"],
            "mean_batch_rows": info["mean_batch_rows"],
        }
        spans = []
        for name, ms in stages.items():
            end = at + int(ms * 1e6)
            spans.append(
                {
                    "traceId": parent[1],
                    "parentSpanId": parent[2],
                    "spanId": secrets.token_hex(8),
                    "name": name,
                    "kind": 1,
                    "startTimeUnixNano": str(at),
                    "endTimeUnixNano": str(end),
                    "attributes": _attributes(told),
                }
            )
            at = end
        with contextlib.suppress(queue.Full):  # a collector that does not keep up misses some
            self._waiting.put_nowait(spans)

    def close(self) -> None:
        """Send what waits and end the thread."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=1.0)
        self._thread.join(3.0)

    def _send(self) -> None:
        is_quiet = False
        while (spans := self._waiting.get()) is not None:
            scope = {"scope": {"name": "fullpipe.loop"}, "spans": spans}
            body = {"resourceSpans": [{"resource": self._resource, "scopeSpans": [scope]}]}
            request = urllib.request.Request(
                self._url, json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            try:
                urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
                is_quiet = False
            except (OSError, ValueError) as error:
                if not is_quiet:
                    log.warning("traces are lost: %s says %r", self._url, error)
                is_quiet = True


def _attributes(values: Mapping[str, Any]) -> list[dict]:
    return [{"key": key, "value": {"stringValue": str(value)}} for key, value in values.items()]
