"""One run of tritonserver: its process group, its stubs and its shared memory.

Whatever the end of a run, `end` leaves no process and no shared memory of it behind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from fullpipe.idle_connections import QUIET_S, close_idle_connections

SHARED_MEMORY = Path("/dev/shm")

# Ends tritonserver (SIGTERM) when the thread that launched it is gone without having ended it.
_DIE_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)
_REAP_S = 5.0


class TritonProcess:
    """A running tritonserver with the stubs that it started.

    The thread that makes it has to outlive it; see `_DIE_WITH_PARENT`.

    Attributes:
        pid: of tritonserver, which leads the process group of its stubs.
        shm_prefix: begins the name of each of its shared memory regions.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], on_line: Callable[[str], None]
    ) -> None:
        """Start it.

        Args:
            command: the binary and its flags.
            env: the complete environment.
            on_line: receives each line that it or a stub writes, on a thread of its own.
        """
        self.shm_prefix = f"fullpipe_{os.getpid()}_{secrets.token_hex(4)}_"
        region = f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}"
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, *command, region],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env),
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._stubs: dict[int, tuple[str, int]] = {}  # pid -> instance name, pid descriptor
        self._descriptor = os.pidfd_open(self.pid)
        self._killing = threading.Lock()
        self._is_reaped = False
        self._reader = threading.Thread(
            target=self._read, args=(on_line,), name="triton-log", daemon=True
        )
        self._reader.start()

    def _read(self, on_line: Callable[[str], None]) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            on_line(line.rstrip("\n"))

    def watch_stubs(self) -> None:
        """Take the stubs that have been started by now under watch."""
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            for child in psutil.Process(self.pid).children():
                command = child.cmdline()
                if child.pid not in self._stubs and "python_backend_stub" in "".join(command[:1]):
                    descriptor = os.pidfd_open(child.pid)
                    self._stubs[child.pid] = (command[-2], descriptor)

    def wait(self, timeout_s: float) -> str | None:
        """Wait until tritonserver or one of its stubs ends.

        Returns:
            One line saying what ended, or None after `timeout_s`.
        """
        poll = select.poll()
        names = {self._descriptor: ""}
        names.update({descriptor: name for name, descriptor in self._stubs.values()})
        for descriptor in names:
            poll.register(descriptor, select.POLLIN)
        ended = [names[descriptor] for descriptor, _ in poll.poll(timeout_s * 1000)]
        if not ended:
            return None
        if "" not in ended:
            return f"the process of model instance {ended[0]} died"
        result = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert result
        if result.si_code == os.CLD_EXITED:
            return f"tritonserver ended with exit code {result.si_status}"
        return f"tritonserver was ended by {signal.Signals(result.si_status).name}"

    def has_ended(self) -> bool:
        """Whether tritonserver itself is gone; its stubs may still be there."""
        flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
        return os.waitid(os.P_PID, self.pid, flags) is not None

    def terminate(self) -> None:
        """Ask tritonserver to answer what is open and end; returns at once."""
        # Not Popen's terminate(), which may reap; see kill().
        signal.pidfd_send_signal(self._descriptor, signal.SIGTERM)

    def close_idle_connections(self, port: int) -> None:
        """While it stops: let it not wait for connections to this port that nobody uses."""
        # Where this is not allowed (ENOSYS, EPERM in some sandboxes), the stop takes its full time.
        with contextlib.suppress(OSError):
            close_idle_connections(self._descriptor, self.pid, port, QUIET_S)

    def kill(self) -> None:
        """End the whole group at once: every connection to it breaks."""
        # The unreaped leader keeps the group's number from being given to anybody else.
        with self._killing, contextlib.suppress(ProcessLookupError):
            if not self._is_reaped:
                os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> int:
        """Make sure that nothing of this run is left. Call it once, last.

        Returns:
            tritonserver's exit status as `subprocess` has it: negative for a signal.
        """
        self.kill()
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with self._killing:
            status = self._process.wait()
            self._is_reaped = True
        deadline = time.monotonic() + _REAP_S
        for _, descriptor in self._stubs.values():
            left_ms = max(0.0, deadline - time.monotonic()) * 1000
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll(left_ms)
            os.close(descriptor)
        # As a container's first process, or a subreaper, we inherit the stubs.
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-self.pid, os.WNOHANG)[0]:
                pass
        os.close(self._descriptor)
        self._reader.join(_REAP_S)
        for region in SHARED_MEMORY.glob(f"{self.shm_prefix}*"):
            region.unlink(missing_ok=True)
        return status
