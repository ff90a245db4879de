"""A real Redis for tests, which can be killed, frozen and filled."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import redis

from fullpipe.ports import choose_ports
from tests.gateway.doors import wait_until


class RedisServer:
    """One redis-server on a free port that keeps its port when it is started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = choose_ports("127.0.0.1", {"redis": 0})["redis"]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.admin = redis.Redis(port=self.port, socket_timeout=5)
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def start(self) -> None:
        self._process = subprocess.Popen(
            f"exec redis-server --port {self.port} --bind 127.0.0.1 --save '' --daemonize no"
            f" --dir {self._folder} {' '.join(self._options)}",
            shell=True,
            stdout=subprocess.DEVNULL,
        )
        wait_until(self.answers, 20, "redis-server does not start")

    def answers(self) -> bool:
        try:
            return bool(self.admin.ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def fill_with_rubbish(self) -> int:
        """Replace every value, each by another kind of rubbish; returns how many."""
        keys = sorted(self.admin.keys())
        for number, key in enumerate(keys):
            value = self.admin.get(key)
            kinds = (
                b"",
                b"rubbish",
                value[:-1],
                value + b"\0",
                value[:200] + bytes([value[200] ^ 1]) + value[201:],
                b"\0" * len(value),
                self.admin.get(keys[number - 1]) if len(keys) > 1 else b"x",
                b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.",  # what unpickling would run
            )
            self.admin.set(key, kinds[number % len(kinds)])
        return len(keys)
