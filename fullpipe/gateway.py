"""The gateway's files: what is served, read from the repository, and HAProxy's configuration.

`docker/gateway/haproxy.cfg` is the template. A gateway's folder has `gateway.json` (settings),
`keys.map` and `tls.pem`, which are the operator's, and what is written from them.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from fullpipe.errors import SetupError
from fullpipe.gateway_paths import GRPC, read_repository
from fullpipe.gateway_rules import CONFIG, render
from fullpipe.gateway_settings import GatewayConfig
from fullpipe.keys import FILE_NAME, KeyFile

ADMIN_SOCKET = "admin.sock"
_ERRORS = {
    400: ("Bad Request", "this is no HTTP request that the gateway understands"),
    408: ("Request Timeout", "UNAVAILABLE: the request did not arrive in time"),
    500: ("Internal Server Error", "the gateway failed on this request"),
    502: ("Bad Gateway", "UNAVAILABLE: the server broke off; the request may be sent again"),
    503: ("Service Unavailable", "UNAVAILABLE: no server can take the request now; try later"),
    504: ("Gateway Timeout", "UNAVAILABLE: the server did not answer in time"),
}


def write_gateway(folder: Path, repository: Path, config: GatewayConfig) -> Path:
    """Write HAProxy's configuration and its maps; keys, certificate and settings are left alone.

    A missing key file is made empty. A missing certificate is made and signed by itself.

    Returns:
        The configuration's path.
    Raises:
        SetupError: the settings do not fit together, or the repository serves no pipeline.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    served = read_repository(repository, config.serve_stages)
    if not served.pipelines:
        raise SetupError(f"{repository} has no pipeline; make one with `fullpipe assemble`")
    paths = dict(served.paths)
    if config.grpc_streams and not served.unsealed:
        paths[f"POST{GRPC}/ModelStreamInfer"] = "grpc-stream|"
    KeyFile(folder / FILE_NAME).make()
    if not (folder / "tls.pem").exists():
        make_certificate(folder / "tls.pem", config.server_names)
    _write_map(folder / "paths.map", paths)
    _write_map(folder / "models.map", served.models)
    index = [{"name": name, "version": "1", "state": "READY"} for name in served.pipelines]
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    for status, (reason, message) in _ERRORS.items():
        (folder / f"{status}.http").write_bytes(_error_page(status, reason, message))
    (folder / CONFIG).write_text(render(folder, config), encoding="utf-8")
    return folder / CONFIG


def _write_map(path: Path, entries: Mapping[str, str]) -> None:
    for key in entries:
        if not re.fullmatch(r"[!-~]+", key) or key.startswith("#"):
            raise SetupError(f"the name in {key!r} cannot be served by a gateway: plain ASCII only")
    lines = [f"{key} {value}" for key, value in entries.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _error_page(status: int, reason: str, message: str) -> bytes:
    body = json.dumps({"error": message})
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\n"
    if status == 503:
        head += "Retry-After: 2\r\n"
    head += f"Content-Length: {len(body)}\r\nCache-Control: no-cache\r\n"
    return f"{head}Connection: close\r\n\r\n{body}".encode()


def make_certificate(path: Path, names: Iterable[str] = ("localhost",)) -> None:
    """A certificate for this machine, signed by itself: for a try, or inside a company.

    Args:
        path: gets key and certificate, readable by its owner only.
        names: DNS names; 127.0.0.1 and ::1 are in it too.
    Raises:
        SetupError: openssl is missing or fails.
    """
    names = list(names)
    alternatives = [f"DNS:{name}" for name in names] + ["IP:127.0.0.1", "IP:::1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "825", "-subj", f"/CN={names[0]}"]
    command += ["-addext", f"subjectAltName={','.join(alternatives)}", "-keyout", "-", "-out", "-"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise SetupError(
            f"{path} is missing and openssl is not installed to make one; put key and certificate"
            " there in one PEM file"
        ) from None
    if done.returncode:
        raise SetupError(f"openssl made no certificate: {done.stderr.strip()[-300:]}")
    path.touch(mode=0o600)
    path.write_text(done.stdout, encoding="ascii")
