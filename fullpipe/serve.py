"""`fullpipe serve`: start a server, show what it serves and how to ask it, stop it cleanly."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from fullpipe.client import Client, Pipeline
from fullpipe.errors import PipelineError
from fullpipe.gateway import ADMIN_SOCKET, write_gateway
from fullpipe.gateway_commands import local_config
from fullpipe.haproxy import HAProxy
from fullpipe.server import ServerConfig, TritonServer

_PROMPT = "a red circle on a white background"
_WRITE_PNG = (
    "import sys,json,base64; r=json.load(sys.stdin); i=r.get('image') or sys.exit(r['error']); "
    "open('out.png','wb').write(base64.b64decode(i))"
)


def serve(config: ServerConfig, ready_timeout_s: float = 600.0, gateway: Path | None = None) -> int:
    """Serve until SIGINT or SIGTERM; call it from the main thread.

    A first signal lets open requests finish (for at most `config.stop_timeout_s`), a second one
    ends them.

    Args:
        config: what to run and where.
        ready_timeout_s: how long the models may take to load.
        gateway: folder of a gateway to start before this server.
    Returns:
        The exit code: 0 after a stop, 1 when the server could not start or was given up.
    """
    started = time.monotonic()
    server = TritonServer(config)
    door: HAProxy | None = None

    def stop(now: bool) -> None:
        # The way in closes first, and requests that are inside already come to their end.
        if door:
            door.stop(grace_s=0.0 if now else float(config.stop_timeout_s))
        server.stop(now)

    with _StopSignals(stop, config.stop_timeout_s) as signals:
        try:
            print(f"starting Triton Inference Server with {config.repository}", flush=True)
            server.start()
            server.wait_ready(ready_timeout_s)
            if not signals.count:
                seconds = time.monotonic() - started
                print(f"ready after {seconds:.1f} s\n{describe(server)}", flush=True)
            if gateway and not signals.count:
                door = _open_gateway(gateway, server)
            server.wait()
            server.wait_ready()
        except PipelineError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
        finally:
            stop(now=True)
    return 0


def _open_gateway(folder: Path, server: TritonServer) -> HAProxy:
    config = server.config
    settings = local_config(folder, config.host, config.http_port, config.grpc_port)
    door = HAProxy(
        write_gateway(folder, config.repository, settings), folder.resolve() / ADMIN_SOCKET
    )
    door.start()
    print(
        f"gateway https://{settings.bind}   metrics http://{settings.metrics_bind}/metrics\n"
        f"make a key with: fullpipe keys add NAME --gateway {folder}\n"
        f"clients trust: FULLPIPE_CA_CERT={folder.resolve() / 'tls.pem'}",
        flush=True,
    )
    return door


class _StopSignals:
    """While it is entered, SIGINT and SIGTERM stop a server; the second one at once."""

    def __init__(self, stop: Callable[[bool], None], limit_s: int) -> None:
        self.count = 0
        self._stop = stop
        self._limit_s = limit_s
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
            print(
                f"stopping: open requests have {self._limit_s} s; again to stop at once", flush=True
            )
        # stop() waits for the supervisor, and a signal handler must not wait for anybody.
        threading.Thread(target=self._stop, args=(now,), daemon=True).start()


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
