"""`fullpipe serve`: start a server, show what it serves and how to ask it, stop it cleanly."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from fullpipe.client import Client, Pipeline
from fullpipe.errors import PipelineError
from fullpipe.server import ServerConfig, TritonServer

_PROMPT = "a red circle on a white background"
_WRITE_PNG = (
    "import sys,json,base64; r=json.load(sys.stdin); i=r.get('image') or sys.exit(r['error']); "
    "open('out.png','wb').write(base64.b64decode(i))"
)


def serve(config: ServerConfig, ready_timeout_s: float = 600.0) -> int:
    """Serve until SIGINT or SIGTERM; call it from the main thread.

    A first signal lets open requests finish (for at most `config.stop_timeout_s`), a second one
    ends them.

    Args:
        config: what to run and where.
        ready_timeout_s: how long the models may take to load.
    Returns:
        The exit code: 0 after a stop, 1 when the server could not start or was given up.
    """
    started = time.monotonic()
    server = TritonServer(config)
    with _StopSignals(server) as signals:
        try:
            print(f"starting Triton Inference Server with {config.repository}", flush=True)
            server.start()
            server.wait_ready(ready_timeout_s)
            if not signals.count:
                seconds = time.monotonic() - started
                print(f"ready after {seconds:.1f} s\n{describe(server)}", flush=True)
            server.wait()
            server.wait_ready()
        except PipelineError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
        finally:
            server.stop(now=True)
    return 0


class _StopSignals:
    """While it is entered, SIGINT and SIGTERM stop a server; the second one at once."""

    def __init__(self, server: TritonServer) -> None:
        self.count = 0
        self._server = server
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        now = self.count > 1
        if now:
            print("stopping at once", flush=True)
        else:
            limit_s = self._server.config.stop_timeout_s
            print(f"stopping: open requests have {limit_s} s; again to stop at once", flush=True)
        # stop() waits for the supervisor, and a signal handler must not wait for anybody.
        threading.Thread(target=self._server.stop, args=(now,), daemon=True).start()


def describe(server: TritonServer) -> str:
    """What a ready server serves and the line to try, as text for a terminal."""
    pipelines = [pipeline for pipeline in Client(server.url).pipelines() if pipeline.facts]
    lines = [
        f"HTTP {server.url}   gRPC {server.grpc_address}   metrics {server.metrics_url}",
        *map(_describe_pipeline, pipelines),
    ]
    if pipelines:
        lines += ["", "try it:", curl_line(server.url, pipelines[0].name), ""]
    else:
        lines.append("no pipeline in this repository; make one with fullpipe assemble")
    return "\n".join(lines)


def _describe_pipeline(pipeline: Pipeline) -> str:
    facts = pipeline.facts
    known = [str(facts[key]) for key in ("checkpoint", "version") if facts.get(key)]
    return f"pipeline {pipeline.name}" + (f" ({', '.join(known)})" if known else "")


def curl_line(url: str, pipeline: str, prompt: str = _PROMPT) -> str:
    """A command that asks for one picture and writes out.png, or prints the server's error."""
    return (
        f"""curl -s -m 60 {url}/v2/models/{pipeline}/generate -d '{{"prompt":"{prompt}"}}' """
        f'| python3 -c "{_WRITE_PNG}"'
    )
