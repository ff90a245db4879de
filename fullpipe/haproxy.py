"""A running HAProxy: its admin socket, and the process itself."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from fullpipe.errors import SetupError

BACKENDS = ("triton", "triton_grpc")
_TIMEOUT_S = 5.0


class AdminSocket:
    """Changes a running gateway without a reload: no request is dropped by any of this."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_open(self) -> bool:
        """Whether a HAProxy answers there."""
        try:
            return "Version" in self.ask("show info")
        except SetupError:
            return False

    def ask(self, command: str) -> str:
        """One command of HAProxy's management guide; returns its answer.

        Raises:
            SetupError: nobody answers.
        """
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_TIMEOUT_S)
                connection.connect(str(self.path))
                connection.sendall(command.encode() + b"\n")
                parts = []
                while part := connection.recv(65536):
                    parts.append(part)
        except OSError as error:
            raise SetupError(f"no gateway answers at {self.path}: {error}") from None
        return b"".join(parts).decode("utf-8", "replace").strip()

    def order(self, command: str) -> None:
        """A command that answers nothing when it works; raises SetupError with what it says."""
        if said := self.ask(command):
            raise SetupError(f"the gateway refuses {command.split()[:2]}: {said}")

    def set_map(self, path: Path, entries: Iterable[tuple[str, str]]) -> None:
        """Replace all entries of a map at once."""
        said = self.ask(f"prepare map {path}")
        version = said.rpartition(" ")[2]
        if not version.isdigit():
            raise SetupError(f"the gateway knows no map {path}: {said}")
        for key, value in entries:
            self.order(f"add map @{version} {path} {key} {value}")
        self.order(f"commit map @{version} {path}")

    def set_replica(self, name: str, state: str) -> None:
        """Send a replica no new requests (state "drain") or take it back ("ready")."""
        for backend in BACKENDS:
            self.order(f"set server {backend}/{name} state {state}")

    def replicas(self) -> dict[str, dict[str, str]]:
        """By name: HAProxy's statistics of the replica, such as status and scur (open requests)."""
        lines = self.ask("show stat triton 4 -1").splitlines()
        header = lines[0].removeprefix("# ").split(",")
        rows = [dict(zip(header, line.split(","), strict=False)) for line in lines[1:] if line]
        return {row["svname"]: row for row in rows}

    def drain(self, name: str, timeout_s: float = 330.0) -> None:
        """Send a replica no new requests and wait until its open ones have ended.

        Raises:
            SetupError: there is no such replica, or requests are open after `timeout_s`.
        """
        known = self.replicas()
        if name not in known:
            raise SetupError(f"no replica {name}; there are: {', '.join(known)}")
        self.set_replica(name, "drain")
        limit = time.monotonic() + timeout_s
        while (open_requests := self._open_requests(name)) > 0:
            if time.monotonic() > limit:
                raise SetupError(f"{name} has {open_requests} open requests after {timeout_s:g} s")
            time.sleep(0.1)

    def _open_requests(self, name: str) -> int:
        total = 0
        for backend in BACKENDS:
            lines = self.ask(f"show stat {backend} 4 -1").splitlines()
            header = lines[0].removeprefix("# ").split(",")
            for line in lines[1:]:
                row = dict(zip(header, line.split(","), strict=False))
                if row.get("svname") == name:
                    total += int(row["scur"] or 0) + int(row["qcur"] or 0)
        return total


class HAProxy:
    """One HAProxy process with its workers; a context manager."""

    def __init__(self, config: Path, admin_socket: Path) -> None:
        self.config = config
        self.admin = AdminSocket(admin_socket)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> HAProxy:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self, output: int | None = None, timeout_s: float = 10.0) -> None:
        """Check the configuration, start, and wait until the admin socket answers.

        Args:
            output: a file descriptor for log and messages; None for this process's own stdout.
        Raises:
            SetupError: HAProxy is missing, refuses the configuration, or does not start.
        """
        check_config(self.config)
        self._process = subprocess.Popen(
            [_binary(), "-W", "-f", str(self.config)], stdin=subprocess.DEVNULL, stdout=output
        )
        limit = time.monotonic() + timeout_s
        while not self.admin.is_open():
            if self._process.poll() is not None or time.monotonic() > limit:
                self.stop()
                raise SetupError(f"HAProxy did not start with {self.config}; see its output")
            time.sleep(0.05)

    def reload(self) -> None:
        """Read the configuration anew: a new worker takes the sockets over, the old one finishes.

        Raises:
            SetupError: HAProxy refuses the configuration; the running one goes on with the old.
        """
        check_config(self.config)
        if self._process is None:
            raise SetupError("the gateway is not running")
        self._process.send_signal(signal.SIGUSR2)

    def stop(self, grace_s: float = 0.0) -> None:
        """End it; open requests have `grace_s` to finish."""
        if self._process is None:
            return
        if grace_s:
            self._process.send_signal(signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        self._process.terminate()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def check_config(path: Path) -> None:
    """Let HAProxy check a configuration; raises SetupError with its first complaint."""
    done = subprocess.run(
        [_binary(), "-c", "-f", str(path)], capture_output=True, text=True, timeout=30
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "ALERT" in line]
        raise SetupError(f"HAProxy refuses {path}: {said[0] if said else done.stderr[-300:]}")


def _binary() -> str:
    found = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if not found:
        raise SetupError("haproxy is not installed (Debian, Ubuntu: apt-get install haproxy)")
    return found
