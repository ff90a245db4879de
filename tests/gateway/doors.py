"""A gateway for tests: a real HAProxy in a folder of its own, and ways to knock at it."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import ssl
import time
from collections.abc import Mapping
from pathlib import Path

import h2.config
import h2.connection
import h2.events

from fullpipe.client import Client
from fullpipe.gateway import ADMIN_SOCKET, write_gateway
from fullpipe.gateway_settings import GatewayConfig, Replica
from fullpipe.haproxy import HAProxy
from fullpipe.keys import FILE_NAME, KeyFile
from fullpipe.ports import choose_ports
from fullpipe.server import TritonServer

SMALL = {"width": 64, "height": 64, "steps": 2, "cfg": 1.0}
ENDS = (h2.events.StreamEnded, h2.events.StreamReset, h2.events.ConnectionTerminated)
PROMPT = "a red circle on a white background"


class Gateway:
    """One running gateway.

    Attributes:
        url: https://127.0.0.1:PORT.
        keys: its key file; `key` makes one and tells the gateway.
        log_path: what HAProxy wrote to its standard output.
    """

    def __init__(self, folder: Path, repository: Path, servers: list[TritonServer], **settings):
        ports = choose_ports("127.0.0.1", {"bind": 0, "metrics": 0})
        self.folder = folder
        self.port = ports["bind"]
        self.url = f"https://127.0.0.1:{self.port}"
        self.metrics_url = f"http://127.0.0.1:{ports['metrics']}/metrics"
        self.keys = KeyFile(folder / FILE_NAME)
        self.log_path = folder / "output.log"
        replicas = [
            Replica(
                f"r{number}", server.config.host, server.config.http_port, server.config.grpc_port
            )
            for number, server in enumerate(servers, 1)
        ]
        self.config = GatewayConfig(
            bind=f"127.0.0.1:{self.port}",
            metrics_bind=f"127.0.0.1:{ports['metrics']}",
            replicas=replicas,
            **{"stop_s": 30, **settings},
        )
        self.config.save(folder)
        self.repository = repository
        self.haproxy = HAProxy(
            write_gateway(folder, repository, self.config), folder.resolve() / ADMIN_SOCKET
        )
        self.admin = self.haproxy.admin

    def __enter__(self) -> Gateway:
        with self.log_path.open("ab") as output:
            self.haproxy.start(output.fileno())
        wait_until(self.all_up, 15, "the replicas are not up for the gateway")
        return self

    def __exit__(self, *exception: object) -> None:
        self.haproxy.stop()

    def all_up(self) -> bool:
        """Whether HAProxy takes every replica, over both protocols, for healthy."""
        rows = [
            line.split(",")
            for backend in ("triton", "triton_grpc")
            for line in self.admin.ask(f"show stat {backend} 4 -1").splitlines()[1:]
            if line
        ]
        return all(row[17] == "UP" for row in rows)

    def key(self, name: str, **limits: int) -> str:
        """A new key that the running gateway knows."""
        from fullpipe.gateway_commands import tell_gateway

        secret, _ = self.keys.add(name, **{"rate": 100_000, "concurrent": 64, **limits})
        assert tell_gateway(self.folder, self.keys)
        return secret

    def client(self, key: str, **options) -> Client:
        """The project's own client, through the gateway."""
        ca_cert = str(self.folder / "tls.pem")
        return Client(self.url, api_key=key, ca_cert=ca_cert, **{"timeout_s": 60, **options})

    def log(self, **wanted: object) -> list[dict]:
        """The lines of the access log that have these values; waits a little for the first."""
        until = time.monotonic() + 2
        while not (lines := self._logged(wanted)) and time.monotonic() < until:
            time.sleep(0.02)  # HAProxy writes a request's line after its answer
        return lines

    def _logged(self, wanted: Mapping[str, object]) -> list[dict]:
        lines = []
        for line in self.log_path.read_text(encoding="utf-8").splitlines():
            if line.startswith("{"):
                entry = json.loads(line)
                if all(entry.get(key) == value for key, value in wanted.items()):
                    lines.append(entry)
        return lines


@dataclasses.dataclass
class Answer:
    """What came back: the status, headers in lower case, the body; status 0 for none."""

    status: int
    headers: dict[str, str]
    body: bytes


def raw(gateway: Gateway, data: bytes, timeout_s: float = 30.0) -> Answer:
    """Send bytes over TLS and read one HTTP/1.1 answer, whatever the bytes are."""
    with tls(gateway, "http/1.1", timeout_s) as connection:
        connection.sendall(data)
        received = b""
        while b"\r\n\r\n" not in received:
            part = connection.recv(65536)
            if not part:
                return Answer(0, {}, received)
            received += part
        head, _, body = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        expected = 0 if data.startswith(b"HEAD") else int(headers.get("content-length", 0))
        while len(body) < expected:
            part = connection.recv(65536)
            if not part:
                break
            body += part
        return Answer(int(first.split()[1]), headers, body)


def http1(
    gateway: Gateway, method: str, path: str, headers=(), body: bytes | None = None
) -> Answer:
    """One HTTP/1.1 request whose path is sent as it is."""
    lines = [f"{method} {path} HTTP/1.1", "Host: gateway", *(f"{k}: {v}" for k, v in headers)]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return raw(gateway, "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b""))


def http2(
    gateway: Gateway, method: str, path: str, headers=(), body: bytes | None = None
) -> Answer:
    """One HTTP/2 request; nothing of it is checked before it is sent."""
    with tls(gateway, "h2", 30.0) as connection:
        config = h2.config.H2Configuration(
            validate_outbound_headers=False, normalize_outbound_headers=False
        )
        state = h2.connection.H2Connection(config)
        state.initiate_connection()
        fields = [(":method", method), (":path", path), (":scheme", "https")]
        fields += [(":authority", "gateway"), *((k.lower(), v) for k, v in headers)]
        if body is not None:
            fields.append(("content-length", str(len(body))))
        state.send_headers(1, fields, end_stream=body is None)
        if body is not None:
            state.send_data(1, body, end_stream=True)
        connection.sendall(state.data_to_send())
        answer = Answer(0, {}, b"")
        while data := connection.recv(65536):
            for event in state.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    pairs = [(_text(k), _text(v)) for k, v in event.headers]
                    answer.headers = {k: v for k, v in pairs if not k.startswith(":")}
                    answer.status = int(dict(pairs)[":status"])
                elif isinstance(event, h2.events.DataReceived):
                    answer.body += event.data
                    state.acknowledge_received_data(event.flow_controlled_length, 1)
                elif isinstance(event, ENDS):
                    return answer
            connection.sendall(state.data_to_send())
        return answer


def _text(value: bytes | str) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def tls(gateway: Gateway, protocol: str, timeout_s: float) -> ssl.SSLSocket:
    """A TLS connection that speaks one protocol, its certificate checked."""
    context = ssl.create_default_context(cafile=gateway.folder / "tls.pem")
    context.set_alpn_protocols([protocol])
    plain = socket.create_connection(("127.0.0.1", gateway.port), timeout=timeout_s)
    connection = context.wrap_socket(plain, server_hostname="127.0.0.1")
    assert connection.selected_alpn_protocol() == protocol
    return connection


def bearer(secret: str) -> list[tuple[str, str]]:
    """The header that carries a key or a token."""
    return [("Authorization", f"Bearer {secret}")]


def picture_body(**changes: object) -> bytes:
    """The body of a small generate request."""
    return json.dumps({"prompt": PROMPT, "seed": 7, **SMALL, **changes}).encode()


def wait_until(condition, limit_s: float, what: str) -> None:
    """Poll until it holds; fail with `what` after `limit_s`."""
    limit = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process of that id is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
