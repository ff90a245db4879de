"""TCP ports of this machine: which are free, and who holds the others."""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping

from fullpipe.errors import SetupError

# Below the range from which the system picks ports for outgoing connections.
_CANDIDATES = range(20000, 32000)


def choose_ports(host: str, wanted: Mapping[str, int]) -> dict[str, int]:
    """Check the ports of a server and replace each 0 by a free one.

    Args:
        host: the address to listen on.
        wanted: name -> port.
    Raises:
        SetupError: a port is taken; names who holds it where that can be read.
    """
    chosen: dict[str, int] = {}
    for name, port in wanted.items():
        if port == 0:
            candidates = random.sample(_CANDIDATES, 200)
            free = (p for p in candidates if p not in wanted.values() and is_free(host, p))
            port = next(p for p in free if p not in chosen.values())
        elif not is_free(host, port):
            holder = port_holder(port)
            raise SetupError(f"{name}={port} is in use{holder}; stop that or choose another port")
        chosen[name] = port
    return chosen


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def port_holder(port: int) -> str:
    """` by NAME (pid N)` of the process that listens on a TCP port, or "" when unreadable."""
    import psutil  # here, because `fullpipe check` runs without it and says so

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                name = psutil.Process(connection.pid).name() if connection.pid else ""
                return f" by {name} (pid {connection.pid})" if name else ""
    except psutil.Error:
        pass
    return ""
