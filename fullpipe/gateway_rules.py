"""HAProxy's configuration as text: the template's placeholders, filled in from the settings."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from fullpipe.errors import SetupError
from fullpipe.gateway_settings import ALGORITHMS, GatewayConfig, Jwt, Replica
from fullpipe.source_files import source_root

CONFIG = "haproxy.cfg"


def render(folder: Path, config: GatewayConfig) -> str:
    """HAProxy's configuration as text.

    Raises:
        SetupError: a setting has a value that cannot work.
    """
    _check(config)
    names = [
        f"{replica.name}-{number}" if replica.count > 1 else replica.name
        for replica in config.replicas
        for number in range(1, replica.count + 1)
    ]
    values = {
        "folder": str(folder),
        "jwt_secret": _jwt_secret(config.jwt),
        "jwt": _jwt_rules(folder, config.jwt),
        "addresses": _address_rules(config.allowed_addresses),
        "bind": config.bind,
        "metrics_bind": config.metrics_bind,
        "accept_proxy": " accept-proxy" if config.accept_proxy else "",
        "connect_s": "2",
        "sampled": "01" if config.trace else "00",
        "resolvers": "",
        "resolve": "",
        "replica_count": str(len(names)),
        "use_servers": "\n".join(
            f"    use-server {name} if {{ var(txn.replica) -m int {number} }}"
            for number, name in enumerate(names, 1)
        ),
        "http_servers": "\n".join(_server(r, r.http_port) for r in config.replicas),
        "grpc_servers": "\n".join(
            _server(r, r.grpc_port, f" port {r.http_port} check-proto h1 proto h2")
            for r in config.replicas
        ),
    }
    if any(replica.count > 1 for replica in config.replicas):
        values["resolvers"] = (
            "\nresolvers dns\n    parse-resolv-conf\n    accepted_payload_size 8192\n"
            "    hold valid 2s\n    hold obsolete 5s\n    timeout retry 1s\n"
        )
        values["resolve"] = " resolvers dns init-addr none"
    for field in dataclasses.fields(config):
        values.setdefault(field.name, str(getattr(config, field.name)))
    template = (source_root() / "docker" / "gateway" / CONFIG).read_text(encoding="utf-8")
    return re.sub(r"@([a-z_]+)@", lambda match: values[match[1]], template)


def _check(config: GatewayConfig) -> None:
    place = re.compile(r"[A-Za-z0-9.:*_\[\]-]+")
    for name in ("bind", "metrics_bind"):
        value = getattr(config, name)
        if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.*_-]*):\d+", value):
            raise SetupError(f"{name}={value!r} needs the form ADDRESS:PORT")
    names = [replica.name for replica in config.replicas]
    if not names or len(set(names)) < len(names):
        raise SetupError(f"replicas are {names}, needs at least one, each with its own name")
    for replica in config.replicas:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", replica.name) or not place.fullmatch(replica.host):
            raise SetupError(f"replica {replica.name!r} at {replica.host!r}: plain names only")
    for block in config.allowed_addresses:
        if not re.fullmatch(r"[0-9a-fA-F.:]+(/\d+)?", block):
            raise SetupError(f"allowed_addresses has {block!r}, needs the form 10.0.0.0/8")
    jwt = config.jwt
    if jwt.algorithm:
        if jwt.algorithm not in ALGORITHMS:
            raise SetupError(f"jwt.algorithm={jwt.algorithm!r}, allowed {', '.join(ALGORITHMS)}")
        for name in ("issuer", "audience", "public_key"):
            if not re.fullmatch(r"[!-~]+", getattr(jwt, name)) or re.search(
                r"['\"\\]", getattr(jwt, name)
            ):
                raise SetupError(f"jwt.{name}={getattr(jwt, name)!r} needs plain characters")
    elif jwt.issuer or jwt.audience:
        raise SetupError(f"jwt.algorithm is empty, allowed {', '.join(ALGORITHMS)}")


def _server(replica: Replica, port: int, check: str = "") -> str:
    if replica.count > 1:
        start = f"server-template {replica.name}- 1-{replica.count}"
    else:
        start = f"server {replica.name}"
    return f"    {start} {replica.host}:{port} check{check}"


def _address_rules(blocks: list[str]) -> str:
    if not blocks:
        return ""
    return (
        f"    acl is_allowed_address src {' '.join(blocks)}\n"
        "    http-request return status 403 content-type application/json"
        ' string \'{"error":"this address is not allowed"}\' unless is_allowed_address\n'
    )


def _jwt_secret(jwt: Jwt) -> str:
    if jwt.algorithm != "HS256":
        return ""
    return "    set-var proc.jwt_secret env(FULLPIPE_JWT_SECRET)"


def _jwt_rules(folder: Path, jwt: Jwt) -> str:
    """Rules that set txn.name from a valid token: signature, issuer, audience, times, subject."""
    if not jwt.algorithm:
        return ""
    key = "proc.jwt_secret" if jwt.algorithm == "HS256" else f'"{folder / jwt.public_key}"'
    token = "var(txn.secret)"
    conditions = [
        "is_token",
        f"{{ {token},jwt_header_query('$.alg') -m str {jwt.algorithm} }}",
        f'{{ {token},jwt_verify("{jwt.algorithm}",{key}) 1 }}',
        f"{{ {token},jwt_payload_query('$.iss') -m str {jwt.issuer} }}",
        f"{{ {token},jwt_payload_query('$.aud') -m str {jwt.audience} }}",
        # HAProxy's subtraction takes a negative number for a far future.
        "{ var(txn.expires) -m int gt 0 }",
        "{ var(txn.expires),sub(txn.now) gt 0 }",
        "{ var(txn.begins),sub(txn.now) le 0 }",
        f"{{ {token},jwt_payload_query('$.sub') -m len gt 0 }}",
    ]
    rules = [
        "# Tokens: the algorithm is fixed here, whatever a token says of itself.",
        "acl is_token var(txn.secret) -m beg eyJ",
        "http-request set-var(txn.now) date",
        f"http-request set-var(txn.expires) {token},jwt_payload_query('$.exp','int') if is_token",
        "http-request set-var(txn.begins) int(0)",
        f"http-request set-var(txn.begins) {token},jwt_payload_query('$.nbf','int')"
        f" if is_token {{ {token},jwt_payload_query('$.nbf') -m found }}",
        f"http-request set-var(txn.subject) {token},jwt_payload_query('$.sub') if"
        f" {' '.join(conditions)}",
        'http-request set-var-fmt(txn.name) "jwt:%[var(txn.subject)]"'
        " if { var(txn.subject) -m found }",
        f"http-request set-var(txn.rate) int({jwt.rate}) if {{ var(txn.subject) -m found }}",
        f"http-request set-var(txn.concurrent) int({jwt.concurrent})"
        " if { var(txn.subject) -m found }",
    ]
    return "\n".join(f"    {rule}" for rule in rules) + "\n"
