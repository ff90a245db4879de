"""One request on its way, seen from both sides: a thread that waits, a node that may stop it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable

from .errors import Stopped


@dataclasses.dataclass(frozen=True)
class News:
    """What a user may see of a running request.

    Attributes:
        step, steps: of the denoising loop; 0 steps: no news of these.
        preview: JPEG file of the picture as the step guesses it.
        text: one line to show at the node.
    """

    step: int = 0
    steps: int = 0
    preview: bytes | None = None
    text: str = ""


class Call:
    """Shared by the thread that carries out a request and whoever may stop it."""

    def __init__(self, notify: Callable[[], None] = lambda: None):
        """
        Args:
            notify: called from any thread when there is news.
        """
        self.heard = time.monotonic()  # when the server last sent a byte of the answer
        self._notify = notify
        self._news: collections.deque[News] = collections.deque()
        self._stopped = threading.Event()
        self._guard = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._on_stop: list[Callable[[], None]] = []

    @property
    def is_stopped(self) -> bool:
        """Whether somebody asked to stop."""
        return self._stopped.is_set()

    def report(self, news: News) -> None:
        """Let the user see something; from any thread."""
        self._news.append(news)
        self._notify()

    def take(self) -> list[News]:
        """All news since the last time."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def wait(self, seconds: float) -> None:
        """Sleep, unless stopped; raises Stopped then."""
        if self._stopped.wait(seconds):
            raise Stopped("interrupted")

    def stop(self) -> None:
        """End the request: what waits on its connections wakes up. Never blocks."""
        with self._guard:
            if self._stopped.is_set():
                return
            self._stopped.set()
            actions, self._on_stop = self._on_stop, []
        for action in actions:
            threading.Thread(target=action, daemon=True).start()
        self.hang_up()

    def hang_up(self) -> None:
        """Break every open connection; what waits on one wakes up with an error."""
        with self._guard:
            for open_socket in self._sockets:
                with contextlib.suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def when_stopped(self, action: Callable[[], None]):
        """While entered, a stop runs `action` on a thread of its own.

        Raises:
            Stopped: it is too late.
        """
        with self._guard:
            if self._stopped.is_set():
                raise Stopped("interrupted")
            self._on_stop.append(action)
        try:
            yield
        finally:
            with self._guard, contextlib.suppress(ValueError):
                self._on_stop.remove(action)

    @contextlib.contextmanager
    def using(self, open_socket: socket.socket):
        """While entered, a stop breaks this connection."""
        with self._guard:
            if self._stopped.is_set():
                raise Stopped("interrupted")
            self._sockets.add(open_socket)
        try:
            yield
        finally:
            with self._guard:
                self._sockets.discard(open_socket)
