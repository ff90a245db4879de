"""Which server a node talks to, and that no secret goes where it does not belong."""

from __future__ import annotations

import http.server
import importlib
import json
import shutil
import ssl
import subprocess
import sys
import threading
import types
from contextlib import contextmanager

import pytest
from conftest import NODES
from graphs import Graph, Run, pipeline_inputs, server_inputs

SECRET = "very-secret-4711"


@pytest.fixture(scope="module")
def pack():
    """The pack's modules that need no ComfyUI, without its __init__."""
    package = types.ModuleType("triton_nodes_alone")
    package.__path__ = [str(NODES)]
    sys.modules[package.__name__] = package
    names = ("settings", "endpoint", "errors", "call")
    yield types.SimpleNamespace(
        **{name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
    )
    for name in [name for name in sys.modules if name.startswith(package.__name__)]:
        del sys.modules[name]


@pytest.fixture
def settings(pack, tmp_path, monkeypatch):
    """Settings of a file that the test writes."""
    for name in pack.settings.VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def read(document) -> object:
        path = tmp_path / "servers.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return pack.settings.Settings(path)

    return read


@contextmanager
def listener(context: ssl.SSLContext | None = None):
    """A server that refuses everything and remembers the headers; yields URL and headers."""
    seen: list[dict[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b'{"error": "no such key"}')

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"{'https' if context else 'http'}://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def test_the_environment_overrides_the_default_server(settings, monkeypatch):
    read = settings({"servers": {"default": {"url": "http://one:1", "retries": 7}}})
    monkeypatch.setenv("FULLPIPE_URL", "https://two:2/path/")
    monkeypatch.setenv("FULLPIPE_API_KEY", SECRET)
    server = read.servers()["default"]
    assert (server.url, server.api_key, server.retries) == ("https://two:2/path", SECRET, 7)
    assert SECRET not in repr(server)


def test_an_edited_file_is_read_again(settings):
    read = settings({"servers": {"a": {"url": "http://one:1"}}})
    assert set(read.servers()) == {"default", "a"}
    read._path.write_text(json.dumps({"servers": {"another": {"url": "http://two:2"}}}))
    assert set(read.servers()) == {"default", "another"}


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ("{", "cannot be read"),
        ({"server": {}}, "'server' is unknown"),
        ({"servers": {"a": {"api-key": "x"}}}, "a.api-key is unknown"),
        ({"servers": {"a": {"retries": "3"}}}, "a.retries must be a int"),
        ({"servers": {"a": {"read_timeout_s": 0}}}, "a.read_timeout_s must be a float"),
        ({"servers": {"a": {"url": "ftp://x"}}}, "needs the form"),
        ({"servers": {"a": {"url": "http://me:secret@x"}}}, "user name or password"),
        ({"servers": {"a": {"shared_memory": "yes"}}}, "allowed: auto, off"),
    ],
)
def test_a_mistake_is_named(pack, settings, document, complaint):
    read = settings(document)
    with pytest.raises(pack.errors.Refused, match=complaint):
        read.servers()
    assert read.names() == ["default"], "a broken file must not break the node's combo"


@pytest.mark.parametrize(
    ("address", "has_key"),
    [
        ("", True),
        ("https://gpu:8443", True),
        ("https://gpu:8443/other/path", True),
        ("http://gpu:8443", False),
        ("https://gpu:8444", False),
        ("https://evil:8443", False),
    ],
)
def test_a_key_goes_only_where_it_belongs(pack, settings, address, has_key):
    read = settings({"servers": {"default": {"url": "https://gpu:8443", "api_key": SECRET}}})
    server = read.resolve(pack.settings.Choice("default", address))
    assert bool(server.api_key) == has_key


def test_tls_with_a_certificate_of_our_own(pack, tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("openssl is missing")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with listener(context) as (url, seen):
        trusting = pack.settings.Server(url=url, ca_cert=str(certificate), api_key=SECRET)
        answer = pack.endpoint.Endpoint(trusting).ask("it", "/v2")
        assert answer.status == 401
        assert seen[0]["Authorization"] == f"Bearer {SECRET}"
        with pytest.raises(pack.errors.Refused, match="no TLS that is trusted"):
            pack.endpoint.Endpoint(pack.settings.Server(url=url)).ask("it", "/v2")
        lost = pack.settings.Server(url=url, ca_cert=str(tmp_path / "none.pem"))
        with pytest.raises(pack.errors.Refused, match=r"none\.pem is not there"):
            pack.endpoint.Endpoint(lost).ask("it", "/v2")
    assert len(seen) == 1


@pytest.mark.comfyui
@pytest.mark.triton
def test_a_key_is_sent_and_never_shown(comfy, servers):
    before = servers.read_text()
    with listener() as (url, seen), listener() as (other_url, other_seen):
        document = json.loads(before)
        document["servers"]["keyed"] = {"url": url, "api_key": SECRET}
        servers.write_text(json.dumps(document))
        try:
            for address in ("", other_url):
                graph = Graph()
                choice = graph.add("TritonServer", **server_inputs("keyed", address=address))
                node = graph.add("TritonFullPipeline", **pipeline_inputs(server=[choice, 0]))
                run = Run(comfy, graph.save(node))
                message = run.fail()
                assert "no such key; set FULLPIPE_API_KEY" in message
                assert SECRET not in json.dumps(run.events)
                assert SECRET not in json.dumps(comfy.call(f"/history/{run.prompt_id}"))
        finally:
            servers.write_text(before)
    keys = [headers.get("Authorization") for headers in seen]
    assert keys and set(keys) == {f"Bearer {SECRET}"}
    assert other_seen and not any("Authorization" in headers for headers in other_seen)
    assert SECRET not in (comfy.base / "log.txt").read_text()
