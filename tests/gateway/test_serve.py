"""`fullpipe serve --gateway`: one command gives a guarded pipeline, and one signal ends it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from fullpipe.client import Client
from fullpipe.errors import PipelineError
from fullpipe.gateway_commands import tell_gateway
from fullpipe.keys import KeyFile
from fullpipe.ports import choose_ports
from tests.gateway.doors import PROMPT, SMALL, wait_until

pytestmark = [pytest.mark.gateway, pytest.mark.triton]


def test_serve_with_a_gateway(served_repository, tmp_path):
    ports = choose_ports("127.0.0.1", {"bind": 0, "metrics_bind": 0})
    folder, output = tmp_path / "gateway", tmp_path / "output"
    folder.mkdir()
    settings = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    (folder / "gateway.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "fullpipe.cli", "serve", str(served_repository)]
    command += ["--gateway", str(folder)]
    for service in ("http", "grpc", "metrics"):
        command += [f"--{service}-port", "0"]
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_until(
            lambda: "clients trust:" in output.read_text() or process.poll() is not None,
            180,
            "the gateway does not open",
        )
        assert process.poll() is None, output.read_text()
        keys = KeyFile(folder / "keys.map")
        secret, _ = keys.add("alice")
        assert tell_gateway(folder, keys)
        url, ca_cert = f"https://{settings['bind']}", str(folder / "tls.pem")
        client = Client(url, api_key=secret, ca_cert=ca_cert, timeout_s=60)
        assert [pipeline.name for pipeline in client.pipelines()] == ["full_pipeline"]
        assert client.generate(PROMPT, **SMALL).pixels.shape == (1, 64, 64, 3)
        with pytest.raises(PipelineError, match="is a key missing"):
            Client(url, api_key="", ca_cert=ca_cert).generate(PROMPT, **SMALL)
        with pytest.raises(PipelineError, match="speaks no TLS that this client trusts"):
            Client(url, api_key=secret, ca_cert="").generate(PROMPT, **SMALL)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, output.read_text()
    finally:
        process.kill()
        process.wait()
