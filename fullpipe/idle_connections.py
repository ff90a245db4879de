"""Close a stopping server's idle HTTP connections, which it would otherwise wait for.

tritonserver 2.51 counts every open HTTP connection as a request when it stops. Clients and
gateways keep connections open for their next request, so a stop would always take until its
limit. The kernel knows better: it tells when each connection last received and last sent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

# An answer may be a stream of events; one that was silent this long is taken for finished.
QUIET_S = 5.0
_PIDFD_GETFD = 438  # the same number on every architecture
_ESTABLISHED = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def close_idle_connections(process: int, pid: int, port: int, quiet_s: float) -> None:
    """Shut down the connections to a port whose last request has been answered.

    Args:
        process: a pid descriptor of the server, a child of this process.
        pid: its process id.
        port: the server's TCP port.
        quiet_s: how long a connection must have been silent.
    Raises:
        PermissionError: this process may not look into the other one; nothing was done.
    """
    for connection in _connections(process, pid, port):
        with connection, contextlib.suppress(OSError):  # its peer may go at any time
            if is_idle(connection, quiet_s):
                connection.shutdown(socket.SHUT_RDWR)


def is_idle(connection: socket.socket, quiet_s: float) -> bool:
    """Whether the server end of a connection is silent and owes no answer.

    Where the last bytes came in and went out within one tick of the kernel's clock it cannot be
    told whether a request is open, and the answer is False.
    """
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    if info[0] != _ESTABLISHED:
        return False
    (sent_ago_ms,), (received_ago_ms,) = (struct.unpack_from("I", info, at) for at in (44, 52))
    (received_bytes,) = struct.unpack_from("Q", info, 128)
    is_answered = not received_bytes or sent_ago_ms < received_ago_ms
    return is_answered and min(sent_ago_ms, received_ago_ms) >= quiet_s * 1000


def _connections(process: int, pid: int, port: int) -> Iterator[socket.socket]:
    folder = Path(f"/proc/{pid}/fd")
    for link in list(folder.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            if not str(link.readlink()).startswith("socket:"):
                continue
            descriptor = _LIBC.syscall(_PIDFD_GETFD, process, int(link.name), 0)
            if descriptor < 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            copy = socket.socket(fileno=descriptor)
            is_inet = copy.family in (socket.AF_INET, socket.AF_INET6)
            if is_inet and copy.type == socket.SOCK_STREAM and copy.getsockname()[1] == port:
                yield copy
            else:
                copy.close()
