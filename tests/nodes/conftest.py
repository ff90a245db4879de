"""A real ComfyUI with the node pack, a real Triton, and a network between them that can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "parity")]

from comfy_server import ComfyServer  # noqa: E402

from bench.network import Network  # noqa: E402

NODES = ROOT / "client_nodes"
# Quick to notice and to give up, so that tests of failures are short.
IMPATIENT = {"connect_timeout_s": 1.0, "probe_s": 0.4, "recover_s": 4.0, "retries": 2}


@pytest.fixture(scope="session")
def network(triton_url):
    """The way to the server; passes everything."""
    parts = urlsplit(triton_url)
    with Network(parts.hostname, parts.port) as opened:
        yield opened


@pytest.fixture(autouse=True)
def restored_network(request):
    """Every test begins with a network that works."""
    if "network" in request.fixturenames or "comfy" in request.fixturenames:
        request.getfixturevalue("network").restore()


@pytest.fixture(scope="session")
def servers(network, tmp_path_factory) -> Path:
    """The pack's configuration file."""
    path = tmp_path_factory.mktemp("settings") / "servers.json"
    entry = {"url": network.url, **IMPATIENT}
    streaming = {**entry, "shared_memory": "off"}
    nowhere = {**streaming, "url": "http://127.0.0.1:9"}
    patient = {**streaming, "recover_s": 120.0}
    walled = {**entry, "url": network.url.replace("127.0.0.1", "localhost")}
    servers = {"default": entry, "streaming": streaming, "nowhere": nowhere}
    servers |= {"patient": patient, "walled": walled}
    path.write_text(json.dumps({"servers": servers}))
    return path


@pytest.fixture(scope="session")
def comfy(servers, tmp_path_factory):
    """A ComfyUI whose nodes reach the server over `network`."""
    base = tmp_path_factory.mktemp("comfy")
    try:
        comfy = ComfyServer(
            base,
            {"triton-full-pipeline": NODES},
            {"FULLPIPE_COMFYUI_CONFIG": str(servers), "OMP_NUM_THREADS": "2"},
        )
    except subprocess.CalledProcessError as error:
        pytest.skip(f"ComfyUI could not be downloaded: {error.stderr}")
    with comfy:
        yield comfy
