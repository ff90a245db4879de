"""API keys: made here, known to the gateway by their hashes alone.

The file is a HAProxy map, a line for each key: the sha256 of the key, then name, requests a
minute, requests at once and the day it was made. A key has 256 random bits, so its plain hash tells
nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fullpipe.errors import InvalidRequest, SetupError

PREFIX = "fp_"
FILE_NAME = "keys.map"
RATE = 60
CONCURRENT = 8
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_LINE = re.compile(r"([0-9a-f]{64}) ([^|\s]+)\|(\d+)\|(\d+)\|(\d{4}-\d\d-\d\d)")


@dataclasses.dataclass(frozen=True)
class Key:
    """One key without its secret.

    Attributes:
        digest: sha256 of the key, hexadecimal.
        name: whose it is; in the gateway's log.
        rate: requests a minute.
        concurrent: requests at once.
        created: ISO date.
    """

    digest: str
    name: str
    rate: int = RATE
    concurrent: int = CONCURRENT
    created: str = ""

    @property
    def entry(self) -> str:
        """The value of the map for `digest`."""
        return f"{self.name}|{self.rate}|{self.concurrent}|{self.created}"


class KeyFile:
    """The keys of a gateway, in one file that only its owner can read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Key]:
        """All keys, in the order in which they were made.

        Raises:
            SetupError: a line is not one that `add` writes.
        """
        try:
            lines = self.path.read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise SetupError(f"{self.path} cannot be read: {error}") from None
        keys = []
        for number, line in enumerate(lines, 1):
            if line.startswith("#") or not line.strip():
                continue
            match = _LINE.fullmatch(line.strip())
            if not match:
                raise SetupError(
                    f"{self.path}:{number} is no key; needed is HASH NAME|RATE|CONCURRENT|DATE"
                )
            digest, name, rate, concurrent, created = match.groups()
            keys.append(Key(digest, name, int(rate), int(concurrent), created))
        return keys

    def add(self, name: str, rate: int = RATE, concurrent: int = CONCURRENT) -> tuple[str, Key]:
        """Make a key.

        Args:
            name: whose it is; letters, digits and ``._@-``, at most 64.
            rate: requests a minute, at least 1.
            concurrent: requests at once, at least 1.
        Returns:
            The key itself, which is stored nowhere, and what is stored of it.
        Raises:
            InvalidRequest: a name that is taken or has another form, or a limit below 1.
        """
        if not _NAME.fullmatch(name):
            raise InvalidRequest(f"name={name[:80]!r} may have letters, digits and ._@-, 1 to 64")
        for limit, value in (("rate", rate), ("concurrent", concurrent)):
            if not 1 <= value <= 1_000_000:
                raise InvalidRequest(f"{limit}={value} must be in [1, 1000000]")
        secret = PREFIX + secrets.token_urlsafe(32)
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        key = Key(digest_of(secret), name, rate, concurrent, today)
        with self._locked():
            keys = self.read()
            if any(other.name == name for other in keys):
                raise InvalidRequest(f"name={name} has a key already; revoke it first")
            self._write([*keys, key])
        return secret, key

    def revoke(self, name: str) -> Key:
        """Remove the key of that name; raises InvalidRequest when there is none."""
        with self._locked():
            keys = self.read()
            gone = [key for key in keys if key.name == name]
            if not gone:
                known = ", ".join(key.name for key in keys) or "none"
                raise InvalidRequest(f"name={name[:80]} has no key; there are: {known}")
            self._write([key for key in keys if key.name != name])
        return gone[0]

    def make(self) -> None:
        """Write an empty file where there is none yet."""
        if not self.path.exists():
            with self._locked():
                self._write(self.read())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise SetupError(f"{self.path} cannot be written: {error}") from None

    def _write(self, keys: list[Key]) -> None:
        lines = ["# sha256 of the key, name|requests a minute|requests at once|made"]
        lines += [f"{key.digest} {key.entry}" for key in keys]
        with tempfile.NamedTemporaryFile(
            "w", dir=self.path.parent, prefix=".keys-", delete=False, encoding="ascii"
        ) as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(self.path)  # the temporary file is 0600


def digest_of(secret: str) -> str:
    """What the gateway knows a key by: its sha256, 64 hexadecimal digits."""
    return hashlib.sha256(secret.encode()).hexdigest()
