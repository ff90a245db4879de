"""`gateway.json`: a gateway's settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from fullpipe.config import load_dataclass
from fullpipe.keys import CONCURRENT, RATE

SETTINGS = "gateway.json"
ALGORITHMS = ("RS256", "ES256", "HS256")


@dataclasses.dataclass(frozen=True)
class Replica:
    """One tritonserver, or several under one DNS name.

    Attributes:
        name: in the log and for `fullpipe gateway drain`.
        host: address or DNS name.
        http_port: of its HTTP service.
        grpc_port: of its gRPC service.
        count: above 1, how many addresses the DNS name may have; they are looked up all the time.
    """

    name: str
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Jwt:
    """Which JSON Web Tokens are taken besides keys.

    Attributes:
        algorithm: RS256, ES256 or HS256; "" for none. Tokens with any other are refused.
        issuer: what `iss` must be.
        audience: what `aud` must be, a single string.
        public_key: PEM file in the gateway's folder, for RS256 and ES256. HS256 takes its secret
            from the environment variable FULLPIPE_JWT_SECRET of HAProxy.
        rate: requests a minute of each subject (`sub`).
        concurrent: requests at once of each subject.
    """

    algorithm: str = ""
    issuer: str = ""
    audience: str = ""
    public_key: str = "jwt.pem"
    rate: int = RATE
    concurrent: int = CONCURRENT


@dataclasses.dataclass(frozen=True)
class GatewayConfig:
    """`gateway.json`.

    Attributes:
        bind: address and port for clients.
        metrics_bind: address and port for Prometheus; no key is asked there.
        replicas: the servers behind.
        server_names: DNS names in a certificate that is made here; see `make_certificate`.
        allowed_addresses: CIDR blocks of clients; empty allows all.
        jwt: tokens, if any.
        max_body_bytes: of one request; two pictures of 16 MiB in base64 fit the default.
        answer_s: longest silence of a server; above the pipelines' own deadline.
        queue_s: longest wait for a free replica.
        replica_requests: requests at once for each replica; more of them queue.
        max_connections: connections of all clients.
        address_connections: connections of one client address.
        stop_s: how long open requests may go on after a reload or a stop.
        serve_stages: let the one-shot stages through too (text_encoder, vae_decoder, …).
        grpc_streams: let ModelStreamInfer through. The gateway cannot see which model a message of
            a stream asks for; servers run with --sealed refuse their inner models themselves.
        accept_proxy: clients come through a balancer that speaks the PROXY protocol.
        trace: ask for a trace of requests that bring no trace context.
    """

    bind: str = "127.0.0.1:8443"
    metrics_bind: str = "127.0.0.1:8404"
    replicas: list[Replica] = dataclasses.field(default_factory=list)
    server_names: list[str] = dataclasses.field(default_factory=lambda: ["localhost"])
    allowed_addresses: list[str] = dataclasses.field(default_factory=list)
    jwt: Jwt = dataclasses.field(default_factory=Jwt)
    max_body_bytes: int = 48 << 20
    answer_s: int = 330
    queue_s: int = 30
    replica_requests: int = 128
    max_connections: int = 4096
    address_connections: int = 256
    stop_s: int = 330
    serve_stages: bool = False
    grpc_streams: bool = True
    accept_proxy: bool = False
    trace: bool = False

    @classmethod
    def load(cls, folder: Path) -> GatewayConfig:
        """The settings of a gateway's folder; the defaults where it has none.

        Raises:
            SetupError: an unknown or ill-typed key.
        """
        path = folder / SETTINGS
        return load_dataclass(cls, path) if path.exists() else cls()

    def save(self, folder: Path) -> None:
        """Write the file that `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        (folder / SETTINGS).write_text(text, encoding="utf-8")
