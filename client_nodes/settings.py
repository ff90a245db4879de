"""Which servers there are, and how to reach them: a file and the environment, never a widget.

Every widget's value lands in the metadata of saved pictures and in error reports. So addresses may
be widgets, and keys, tokens and certificates live here: in `triton_full_pipeline.json` in ComfyUI's
user folder (not in `user/default`, which ComfyUI serves over HTTP), or in environment variables.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import Refused

FILE_NAME = "triton_full_pipeline.json"
FILE_VARIABLE = "FULLPIPE_COMFYUI_CONFIG"
VARIABLES = {"FULLPIPE_URL": "url", "FULLPIPE_API_KEY": "api_key", "FULLPIPE_CA_CERT": "ca_cert"}
DEFAULT = "default"
SHARED_MEMORY = ("auto", "off")


@dataclasses.dataclass(frozen=True)
class Server:
    """One server and how to speak to it.

    Attributes:
        name: as in the configuration file; what nodes and messages call it.
        url: http://HOST:PORT or https://…, with a path if a gateway has one.
        api_key: API key or JWT, sent as `Authorization: Bearer …`.
        ca_cert: file of the certificate authority to trust instead of the system's.
        connect_timeout_s: to open a connection, and to get an answer that takes no work.
        read_timeout_s: longest silence of a server that is otherwise alive; above the server's own
            deadline of 300 s, so that its own message arrives first.
        retries: repeats of a request that certainly was not carried out.
        recover_s: how long a server that vanished in the middle of a job may take to come back.
        probe_s: seconds of silence between two looks whether the server still lives.
        shared_memory: auto uses it where client and server share a machine; off never.
        pipelines: names to offer where a gateway hides the server's list.
    """

    name: str = DEFAULT
    url: str = "http://127.0.0.1:8000"
    api_key: str = dataclasses.field(default="", repr=False)
    ca_cert: str = ""
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 330.0
    retries: int = 3
    recover_s: float = 30.0
    probe_s: float = 2.0
    shared_memory: str = "auto"
    pipelines: tuple[str, ...] = ("full_pipeline",)

    @property
    def origin(self) -> tuple[str, str, int | None]:
        """Scheme, host and port: what a key is good for."""
        parts = _split(self.url)
        return parts.scheme, parts.hostname or "", parts.port

    @property
    def is_local(self) -> bool:
        """Whether the address is this machine's own."""
        host = self.origin[1]
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the node Triton Server hands on. It holds no secret, as others may print it.

    Attributes:
        name: of a configured server.
        address: instead of its address; its key goes along only if it is the same origin.
        changes: time-outs and retries that differ from the configured ones.
    """

    name: str = DEFAULT
    address: str = ""
    changes: tuple[tuple[str, Any], ...] = ()


class Settings:
    """The configuration file and the environment; an edited file is read again by itself."""

    def __init__(self, path: Path | None):
        """
        Args:
            path: the file, which may be missing; None: environment variables only.
        """
        self._path = path
        self._guard = threading.Lock()
        self._stamp: tuple[Any, ...] | None = None
        self._servers: dict[str, Server] = {}

    def servers(self) -> dict[str, Server]:
        """All configured servers by name; there is always one called `default`.

        Raises:
            Refused: the file cannot be read or says something unknown; the message names it.
        """
        environment = {
            key: os.environ[name] for name, key in VARIABLES.items() if os.environ.get(name)
        }
        with self._guard:
            stamp = (self._stat(), tuple(environment.items()))
            if stamp != self._stamp:
                self._servers = _read(self._path, environment)
                self._stamp = stamp
            return dict(self._servers)

    def names(self) -> list[str]:
        """Names for a combo; a broken file must not keep a node from being shown."""
        try:
            return list(self.servers())
        except Refused:
            return [DEFAULT]

    def resolve(self, choice: Choice | None) -> Server:
        """The server that a node talks to.

        Raises:
            Refused: it is not configured, or an address is none.
        """
        choice = choice or Choice()
        servers = self.servers()
        if choice.name not in servers:
            raise Refused(
                f"server {choice.name!r} is not in {self._path}; known: {', '.join(servers)}"
            )
        server = servers[choice.name]
        if choice.address.strip():
            asked = Server(name=choice.address.strip(), url=_url(choice.address.strip()))
            same = [known for known in servers.values() if known.origin == asked.origin]
            server = dataclasses.replace(same[0] if same else asked, url=asked.url)
        return dataclasses.replace(server, **dict(choice.changes))

    def _stat(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat() if self._path else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size) if found else None


def default_path() -> Path:
    """Where the file is looked for: $FULLPIPE_COMFYUI_CONFIG, or ComfyUI's user folder."""
    if os.environ.get(FILE_VARIABLE):
        return Path(os.environ[FILE_VARIABLE])
    import folder_paths

    return Path(folder_paths.get_user_directory()) / FILE_NAME


def _read(path: Path | None, environment: dict[str, str]) -> dict[str, Server]:
    document: dict[str, Any] = {}
    if path and path.is_file():
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Refused(f"{path} cannot be read: {error}") from None
        unknown = sorted(set(document) - {"servers"}) if isinstance(document, dict) else ["list"]
        if unknown:
            raise Refused(f"{path}: {unknown[0]!r} is unknown, allowed: servers")
    entries = document.get("servers") or {}
    entries = {DEFAULT: {}, **entries}
    entries[DEFAULT] = {**entries[DEFAULT], **environment}
    return {name: _server(name, entry, path) for name, entry in entries.items()}


def _server(name: str, entry: Any, path: Path | None) -> Server:
    fields = {field.name: field for field in dataclasses.fields(Server) if field.name != "name"}
    if not isinstance(entry, dict):
        raise Refused(f"{path}: server {name!r} must be an object")
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in fields:
            raise Refused(f"{path}: {name}.{key} is unknown, allowed: {', '.join(fields)}")
        default = fields[key].default
        if key == "pipelines":
            is_fine = isinstance(value, list) and all(isinstance(item, str) for item in value)
        elif isinstance(default, float):
            is_fine = type(value) in (int, float) and value > 0
        elif isinstance(default, int):
            is_fine = type(value) is int and value >= 0
        else:
            is_fine = isinstance(value, str)
        if not is_fine:
            kind = "list of strings" if key == "pipelines" else type(default).__name__
            raise Refused(f"{path}: {name}.{key} must be a {kind}")
        values[key] = tuple(value) if key == "pipelines" else value
    server = Server(name=name, **values)
    if server.shared_memory not in SHARED_MEMORY:
        raise Refused(
            f"{path}: {name}.shared_memory={server.shared_memory!r} is unknown, allowed:"
            f" {', '.join(SHARED_MEMORY)}"
        )
    return dataclasses.replace(server, url=_url(server.url))


def _url(text: str) -> str:
    url = (text if "://" in text else f"http://{text}").rstrip("/")
    parts = _split(url)
    if parts.username or parts.password:
        raise Refused(
            "the server's address holds a user name or password, which would be saved with every"
            f" picture; put a key into {FILE_NAME} or FULLPIPE_API_KEY instead"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Refused(f"server address {text[:80]!r} needs the form http://HOST:PORT")
    return url


def _split(url: str) -> Any:
    try:
        parts = urlsplit(url)
        assert parts.port is None or parts.port > 0
    except (ValueError, AssertionError):
        raise Refused(f"server address {url[:80]!r} needs the form http://HOST:PORT") from None
    return parts
