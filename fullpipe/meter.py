"""How far a long step is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_BAR_CHARS = 30
_BAR_EVERY_S = 0.1
_LINE_EVERY_S = 5.0


class Meter:
    """Shows bytes done of bytes in all; a step that takes under a second shows nothing."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._what = ""
        self._next = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Step `what` has done this many bytes; equal numbers end it."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._next = what, now + 1.0
        if done >= total:
            self.clear()
        elif now >= self._next:
            text = f"{what} {done / 1e9:.1f} of {total / 1e9:.1f} GB"
            if self._is_terminal:
                filled = _BAR_CHARS * done // total
                bar = "█" * filled + "░" * (_BAR_CHARS - filled)
                self._stream.write(f"\r\x1b[K{bar} {text}")
            else:
                self._stream.write(f"{text}\n")
            self._stream.flush()
            self._next = now + (_BAR_EVERY_S if self._is_terminal else _LINE_EVERY_S)

    def clear(self) -> None:
        """Take the bar away."""
        if self._is_terminal and self._what:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        self._what = ""
