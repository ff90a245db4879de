"""Run NVIDIA's tritonserver with an assembled repository, and keep it honest.

What tritonserver 2.51 does when something dies, and what this module does about it:

* A model's process (its stub) dies: Triton never starts it again, goes on reporting ready, and
  leaves every open request that needs it without an answer for ever. So `TritonServer` ends the
  whole server at once: clients see a broken connection (gRPC: UNAVAILABLE), and it starts again.
* tritonserver dies: connections break by themselves, but its stubs and their shared memory stay
  behind. `TritonServer` removes them and starts it again.
* SIGTERM: new connections are refused, open requests are answered, then the models are finalized.
  A request longer than `stop_timeout_s` is cut off; nothing is left behind either way. Idle
  HTTP connections, which Triton would wait for, are closed (`fullpipe.idle_connections`).
* A model does not load: with one pipeline in the repository the start fails at once. With several,
  the others are served, and the log has one line about each model that is not.
"""

from __future__ import annotations

import http.client
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from fullpipe.client import FACTS_PARAMETER, Client
from fullpipe.errors import SetupError
from fullpipe.ports import choose_ports
from fullpipe.triton_files import TritonFiles, default_backends, find_triton
from fullpipe.triton_log import LogLine, load_failure
from fullpipe.triton_process import TritonProcess

PORTS = ("http_port", "grpc_port", "metrics_port")
_POLL_S = 0.1
_WATCH_S = 0.25  # also the longest that a stop waits to begin
_GRACE_S = 2.0  # for the log line that says why a stub ended, and for tritonserver's own exit
_LONG_RUN_S = 600.0


@dataclass(frozen=True)
class ServerConfig:
    """What to run and where.

    Attributes:
        repository: the model repository; its configs must be complete.
        host: address to listen on. The embedded build has known holes: keep it on loopback.
        http_port: of the HTTP service; 0 picks a free one, here and in the next two.
        grpc_port: of the gRPC service.
        metrics_port: of the Prometheus metrics.
        cache_bytes: size of the response cache; 0 for none.
        log_level: one of `fullpipe.triton_log.LOG_LEVELS`.
        backends: folder of Python-based backends to add; None for this project's own.
        triton: an installed tritonserver (binary or root folder); None for the embedded one.
        stop_timeout_s: how long a stop waits for open requests.
        max_restarts: how often in a row the server is started again after a crash; a run of ten
            minutes clears the count.
        flags: further flags for tritonserver.
        env: further environment variables for tritonserver and its models.
    """

    repository: Path
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    cache_bytes: int = 64 << 20
    log_level: str = "info"
    backends: Path | None = None
    triton: Path | None = None
    stop_timeout_s: int = 30
    max_restarts: int = 5
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class TritonServer:
    """One supervised tritonserver.

    Use it as a context manager, or call `start`, `wait_ready` and `stop`::

        with TritonServer(ServerConfig(Path("repository"), http_port=0)) as server:
            urllib.request.urlopen(f"{server.url}/v2/health/ready")

    Attributes:
        config: from `start` on, with the chosen ports filled in.
        state: stopped, starting, ready, stopping or failed.
        restarts: how often in a row it was started again after a crash.
        tail: the last lines of its log, unfiltered.
    """

    def __init__(self, config: ServerConfig, log: Callable[[str], None] = _to_stderr) -> None:
        """Prepare a server; nothing runs yet.

        Args:
            config: what to run and where.
            log: receives each line that the log level shows, from any thread.
        """
        self.config = config
        self.state = "stopped"
        self.restarts = 0
        self.tail: deque[str] = deque(maxlen=400)
        self._log = log
        self._changed = threading.Condition()
        self._failure = ""
        self._load_failure: str | None = None
        self._serves_rest = False
        self._stopping = threading.Event()
        self._process: TritonProcess | None = None
        self._supervisor: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where the HTTP service answers."""
        return f"http://{self.config.host}:{self.config.http_port}"

    @property
    def grpc_address(self) -> str:
        """HOST:PORT of the gRPC service."""
        return f"{self.config.host}:{self.config.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """Where the Prometheus metrics are."""
        return f"http://{self.config.host}:{self.config.metrics_port}/metrics"

    @property
    def pid(self) -> int | None:
        """The process id of tritonserver while it runs."""
        process = self._process
        return process.pid if process else None

    def __enter__(self) -> TritonServer:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop(now=True)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start tritonserver; returns before it is ready.

        Raises:
            SetupError: something is missing on this machine, or a port is taken.
        """
        if self._supervisor:
            raise SetupError("this server has been started before; make a new TritonServer")
        if not self.config.repository.is_dir():
            raise SetupError(f"no model repository at {self.config.repository}; fullpipe assemble")
        files = find_triton(self.config.triton)
        backends = files.lay_out(self.config.backends or default_backends())
        ports = choose_ports(self.config.host, {name: getattr(self.config, name) for name in PORTS})
        self.config = replace(
            self.config,
            http_port=ports["http_port"],
            grpc_port=ports["grpc_port"],
            metrics_port=ports["metrics_port"],
        )
        self._serves_rest = _count_pipelines(self.config.repository) > 1
        self._set_state("starting")
        self._supervisor = threading.Thread(
            target=self._supervise, args=(files, backends), name="triton-supervisor", daemon=True
        )
        self._supervisor.start()

    def wait_ready(self, timeout_s: float = 600.0) -> None:
        """Wait until every model is ready.

        Raises:
            SetupError: a model failed to load, tritonserver ended, or the time is over. One line.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: self.state != "starting", timeout_s)
            if self.state == "failed":
                raise SetupError(self._failure)
        if not done:
            raise SetupError(f"not ready after {timeout_s:.0f} s; {self._last_words()}")

    def wait(self, timeout_s: float | None = None) -> str:
        """Wait until the server has stopped or failed for good.

        Returns:
            The state: stopped, failed, or another one after `timeout_s`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.state in ("stopped", "failed"), timeout_s)
            return self.state

    def stop(self, now: bool = False) -> None:
        """Stop: open requests are answered, for at most `stop_timeout_s`. Safe to call again.

        Args:
            now: cut open requests off instead.
        """
        self._stopping.set()
        process = self._process
        if now and process:
            process.kill()
        if self._supervisor:
            self._supervisor.join()

    # --- the supervisor's thread -----------------------------------------------------------

    def _supervise(self, files: TritonFiles, backends: Path) -> None:
        try:
            while (reason := self._run(files, backends)) is not None:
                self.restarts += 1
                delay_s = min(2.0 ** (self.restarts - 1), 30.0) - 1.0
                attempt = f"restart {self.restarts} of {self.config.max_restarts}"
                self._log(f"error: {reason}; {attempt} in {delay_s:.0f} s")
                if self._stopping.wait(delay_s):
                    break
            self._set_state("stopped")
        except SetupError as error:
            self._set_state("failed", str(error))
        except Exception as error:
            self._set_state("failed", f"{type(error).__name__}: {error}")
            raise

    def _run(self, files: TritonFiles, backends: Path) -> str | None:
        """One run of tritonserver. Returns why it has to be started again, or None to stop.

        Raises:
            SetupError: starting it again is of no use, or was tried often enough.
        """
        self._load_failure = None
        self._set_state("starting")
        env = {**files.environment(os.environ), **self.config.env}
        started = time.monotonic()
        process = TritonProcess(self._command(files, backends), env, self._on_line)
        self._process = process
        try:
            reason = self._await_ready(process)
            was_ready = self.state == "ready"
            while was_ready and reason is None and not self._stopping.is_set():
                reason = process.wait(_WATCH_S)
            if self._stopping.is_set():
                self._set_state("stopping")
                if was_ready:
                    self._end_gracefully(process)
                return None
            self._set_state("starting")
        finally:
            process.kill()
            self._process = None
            process.end()
        if was_ready and time.monotonic() - started > _LONG_RUN_S:
            self.restarts = 0
        if not was_ready and self.restarts == 0:
            raise SetupError(self._load_failure or f"{reason}; {self._last_words()}")
        if self.restarts >= self.config.max_restarts:
            raise SetupError(f"{reason}; given up after {self.restarts} restarts")
        return reason

    def _await_ready(self, process: TritonProcess) -> str | None:
        """Wait until ready (None), or until something says that this will never be."""
        while not self._stopping.is_set():
            if not self._serves_rest:  # else the end of a broken model's stub is no crash
                process.watch_stubs()
            reason = process.wait(_POLL_S)
            if reason:
                deadline = time.monotonic() + _GRACE_S
                while not self._load_failure and time.monotonic() < deadline:
                    time.sleep(_POLL_S)
            if reason or (self._load_failure and not self._serves_rest):
                return self._load_failure or f"{reason} while loading"
            if is_ready(self.config.host, self.config.http_port):
                if self._load_failure and not any(p.ready for p in Client(self.url).pipelines()):
                    return self._load_failure
                process.watch_stubs()
                self._set_state("ready")
                return None
        return None

    def _end_gracefully(self, process: TritonProcess) -> None:
        process.terminate()
        deadline = time.monotonic() + self.config.stop_timeout_s + _GRACE_S
        while not process.has_ended() and time.monotonic() < deadline:
            process.close_idle_connections(self.config.http_port)
            time.sleep(_WATCH_S)

    def _command(self, files: TritonFiles, backends: Path) -> list[str]:
        config = self.config
        command = [
            str(files.binary),
            f"--model-repository={config.repository.resolve()}",
            f"--backend-directory={backends}",
            f"--cache-directory={files.caches}",
            f"--http-address={config.host}",
            f"--http-port={config.http_port}",
            f"--grpc-address={config.host}",
            f"--grpc-port={config.grpc_port}",
            f"--metrics-address={config.host}",
            f"--metrics-port={config.metrics_port}",
            f"--exit-timeout-secs={config.stop_timeout_s}",
            # Configs are complete; without this every model's process would be started twice.
            "--disable-auto-complete-config",
            "--model-load-thread-count=8",
        ]
        if self._serves_rest:
            command += ["--exit-on-error=false", "--strict-readiness=false"]
        if config.cache_bytes:
            command.append(f"--cache-config=local,size={config.cache_bytes}")
        if config.log_level == "verbose":
            command.append("--log-verbose=1")
        return [*command, *config.flags]

    def _on_line(self, text: str) -> None:
        self.tail.append(text)
        line = LogLine.parse(text)
        failure = load_failure(line)
        self._load_failure = self._load_failure or failure
        if failure and self._serves_rest:
            self._log(f"error: {failure}")
        if line.is_wanted(self.config.log_level):
            self._log(str(line))

    def _last_words(self) -> str:
        errors = [line for line in map(LogLine.parse, self.tail) if line.level == "error"]
        return f"last error in the log: {errors[-1].message}" if errors else "no error in the log"

    def _set_state(self, state: str, failure: str = "") -> None:
        with self._changed:
            self.state, self._failure = state, failure
            self._changed.notify_all()


def _count_pipelines(repository: Path) -> int:
    """How many ensembles in a repository are pipelines of this project."""
    configs = repository.glob("*/config.pbtxt")
    return sum(f'"{FACTS_PARAMETER}"' in path.read_text(encoding="utf-8") for path in configs)


def is_ready(host: str, port: int) -> bool:
    """Whether the server there says that all its models are ready. Uses no proxy."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
