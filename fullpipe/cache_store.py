"""Tensors in Redis, for the caches: never wrong, never late, and never in the way.

Whatever Redis does, a look-up ends within a fixed time and gives exactly what was stored under that
key, or nothing. Values carry a checksum over key and content, so rubbish is a miss.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import queue
import struct
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

MAGIC = b"fullpipe1"
DTYPES = ("float32", "uint8")
_DIGEST_BYTES = 16


class Breaker:
    """Stops asking somebody who does not answer: after some failures in a row nobody asks for a
    while, then one asks, and the pause doubles as long as that fails."""

    def __init__(
        self,
        failures: int = 3,
        pause_s: float = 1.0,
        longest_pause_s: float = 30.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._allowed = failures
        self._first_pause_s = pause_s
        self._longest_pause_s = longest_pause_s
        self._now = now
        self._failures = 0
        self._pause_s = pause_s
        self._quiet_until = 0.0
        self._guard = threading.Lock()

    def may_ask(self) -> bool:
        """Whether to ask now; at most one caller hears yes while the other side is failing."""
        with self._guard:
            if self._failures < self._allowed:
                return True
            if self._now() < self._quiet_until:
                return False
            self._quiet_until = self._now() + self._pause_s
            return True

    def succeeded(self) -> None:
        """The other side answered."""
        with self._guard:
            self._failures = 0
            self._pause_s = self._first_pause_s

    def failed(self) -> bool:
        """It did not; returns whether this is when the pauses begin."""
        with self._guard:
            self._failures += 1
            if self._failures < self._allowed:
                return False
            if self._failures > self._allowed:
                self._pause_s = min(self._pause_s * 2, self._longest_pause_s)
            self._quiet_until = self._now() + self._pause_s
            return self._failures == self._allowed


class RedisStore:
    """Named tensors and a note under a key, in a Redis that others share.

    Redis bounds the size (`maxmemory` with an LRU policy), this class the size of one value and its
    age. Reading happens on threads whose caller waits `timeout_s` at the longest; writing on a
    thread that nobody waits for, which drops what it cannot keep up with.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str,
        ttl_s: int = 7 * 86400,
        timeout_s: float = 0.05,
        max_bytes: int = 4 << 20,
        breaker: Breaker | None = None,
    ) -> None:
        """
        Args:
            url: redis://[:PASSWORD@]HOST:PORT/DB, rediss:// for TLS.
            prefix: of all keys; different for values of different meaning.
            ttl_s: age at which Redis forgets a value.
            timeout_s: longest wait for a look-up.
            max_bytes: larger values are not stored.
            breaker: decides when Redis is not asked at all.
        """
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        def connect() -> Any:
            return redis.Redis.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                health_check_interval=0,
            )

        # Two of them, as a reader that gives up closes its connections under whoever uses them.
        self._reading, self._writing = connect(), connect()
        self._refused = redis.exceptions.ResponseError
        self._prefix = prefix
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._breaker = breaker or Breaker()
        self._readers = ThreadPoolExecutor(4, "cache-read")
        self._unwritten: queue.Queue[tuple[str, bytes] | None] = queue.Queue(64)
        self._writer = threading.Thread(target=self._write, name="cache-write", daemon=True)
        self._writer.start()

    def get(self, key: str) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
        """Look a key up.

        Returns:
            How it went, and with a hit the tensors and the note: hit, miss, corrupt (not what was
            stored), error (no answer in time) or skipped (not asked, as Redis has been failing).
        """
        if not self._breaker.may_ask():
            return "skipped", {}, {}
        future: Future[Any] = self._readers.submit(self._reading.get, self._prefix + key)
        try:
            value = future.result(self._timeout_s)
        except Exception as error:  # whatever a client library says, it is a miss
            future.cancel()
            self._fail(error)
            return "error", {}, {}
        self._breaker.succeeded()
        if value is None:
            return "miss", {}, {}
        unpacked = unpack(key, value)
        return ("corrupt", {}, {}) if unpacked is None else ("hit", *unpacked)

    def put(
        self, key: str, tensors: Mapping[str, np.ndarray], note: Mapping[str, Any] | None = None
    ) -> None:
        """Store soon, or not at all. Never waits."""
        if sum(array.nbytes for array in tensors.values()) > self._max_bytes:
            return
        with contextlib.suppress(queue.Full):
            self._unwritten.put_nowait((key, pack(key, tensors, note or {})))

    def close(self) -> None:
        """Write what is waiting, if Redis takes it, and end the threads."""
        with contextlib.suppress(queue.Full):
            self._unwritten.put(None, timeout=1.0)
        self._writer.join(5.0)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._reading.close()
        self._writing.close()

    def wait_until_written(self) -> None:
        """Wait until everything that was put has been answered by Redis, or dropped."""
        self._unwritten.join()

    def _write(self) -> None:
        while (item := self._unwritten.get()) is not None:
            self._write_one(*item)
            self._unwritten.task_done()
        self._unwritten.task_done()

    def _write_one(self, key: str, value: bytes) -> None:
        if not self._breaker.may_ask():
            return
        try:
            self._writing.set(self._prefix + key, value, ex=self._ttl_s)
            self._breaker.succeeded()
        except self._refused:  # full or read-only: it answers, and reading goes on
            self._breaker.succeeded()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        # A late answer must not be taken for the next one's: nobody uses these connections again.
        self._reading.connection_pool.disconnect()
        if self._breaker.failed():
            log.warning("the cache does not answer and is left alone for a while: %r", error)


def pack(key: str, tensors: Mapping[str, np.ndarray], note: Mapping[str, Any]) -> bytes:
    """A value: magic, checksum, length of the head, the head as JSON, the tensors' bytes.

    Args:
        key: part of the checksum, so that a value under another key is rubbish too.
        tensors: float32 or uint8 arrays.
        note: JSON.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    head = json.dumps(
        {
            "tensors": [[name, a.dtype.name, list(a.shape)] for name, a in arrays.items()],
            "note": note,
        }
    ).encode()
    content = struct.pack("<I", len(head)) + head + b"".join(a.tobytes() for a in arrays.values())
    return MAGIC + _checksum(key, content) + content


def unpack(key: str, value: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """What `pack` packed under this key, or None for anything else."""
    start = len(MAGIC) + _DIGEST_BYTES
    content = value[start:]
    if value[: len(MAGIC)] != MAGIC or value[len(MAGIC) : start] != _checksum(key, content):
        return None
    try:
        (length,) = struct.unpack_from("<I", content)
        head = json.loads(content[4 : 4 + length])
        at, tensors = 4 + length, {}
        for name, dtype, shape in head["tensors"]:
            if dtype not in DTYPES:
                return None
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            array = np.frombuffer(content[at : at + size], dtype).reshape(shape)
            tensors[name], at = array.copy(), at + size
        return (tensors, head["note"]) if at == len(content) else None
    except (struct.error, ValueError, KeyError, TypeError):
        return None


def _checksum(key: str, content: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    digest.update(key.encode())
    digest.update(content)
    return digest.digest()
