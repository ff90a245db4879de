"""Two real, sealed Triton servers, and gateways before them."""

from __future__ import annotations

import contextlib

import pytest

from tests.gateway.doors import Gateway


@pytest.fixture(scope="session")
def served_repository(checkpoint, tmp_path_factory):
    """The demo pipeline alone."""
    from fullpipe.assemble import assemble

    out = tmp_path_factory.mktemp("behind") / "repository"
    assemble(checkpoint, out)
    return out


@pytest.fixture(scope="session")
def replicas(served_repository):
    """Two servers of the demo pipeline; every line of their logs is in `server.lines`."""
    from fullpipe.seal import sealed
    from fullpipe.server import ServerConfig, TritonServer

    with contextlib.ExitStack() as stack:
        servers = []
        for _ in range(2):
            lines: list[str] = []
            settings = sealed(
                ServerConfig(served_repository, http_port=0, grpc_port=0, metrics_port=0)
            )
            server = TritonServer(settings, log=lines.append)
            server.lines = lines
            server.start()
            stack.callback(server.stop, now=True)
            servers.append(server)
        for server in servers:
            server.wait_ready()
        yield servers


@pytest.fixture(scope="session")
def open_gateway(replicas, served_repository, tmp_path_factory):
    """Opens gateways with changed settings before both replicas; they end with the session."""
    with contextlib.ExitStack() as stack:

        def open_one(servers=replicas, **settings) -> Gateway:
            folder = tmp_path_factory.mktemp("gateway")
            return stack.enter_context(Gateway(folder, served_repository, servers, **settings))

        yield open_one


@pytest.fixture(scope="session")
def gateway(open_gateway):
    """A gateway with the settings of a fresh folder."""
    return open_gateway()


@pytest.fixture(scope="session")
def key(gateway) -> str:
    """A key of `gateway` without limits that a test could meet."""
    return gateway.key("tester")


@pytest.fixture(scope="session")
def revoked_key(gateway) -> str:
    """A key that was taken back."""
    from fullpipe.gateway_commands import tell_gateway

    secret = gateway.key("former")
    gateway.keys.revoke("former")
    assert tell_gateway(gateway.folder, gateway.keys)
    return secret
