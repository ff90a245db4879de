"""A real tritonserver under `TritonServer`: start, stop, and everything that can die under it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from fullpipe.errors import SetupError
from fullpipe.serve import curl_line
from fullpipe.server import ServerConfig, TritonServer
from fullpipe.triton_files import embedded_triton, installed_triton
from fullpipe.triton_log import LogLine, load_failure

triton = pytest.mark.triton

# Answers each request `delay` seconds later from a thread; "stream" tells of every 0.1 s.
LATER = """
import threading, time
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        self.is_stream = args["model_name"] == "stream"

    def execute(self, requests):
        for request in requests:
            delay = pb.get_input_tensor_by_name(request, "delay").as_numpy()
            sender = request.get_response_sender()
            threading.Thread(target=self.answer, args=(sender, delay)).start()

    def answer(self, sender, delay):
        end = time.monotonic() + float(delay[0])
        while time.monotonic() < end:
            time.sleep(0.1)
            if self.is_stream and not sender.is_cancelled():
                sender.send(pb.InferenceResponse([pb.Tensor("out", -delay)]))
        sender.send(
            pb.InferenceResponse([pb.Tensor("out", delay)]),
            flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
        )

    def finalize(self):
        print("finalized", flush=True)
"""
TENSORS = """
max_batch_size: 0
input [{ name: "delay" data_type: TYPE_FP32 dims: [1] }]
output [{ name: "out" data_type: TYPE_FP32 dims: [1] }]
"""
PYTHON = 'backend: "python" instance_group [{ count: 1 kind: KIND_CPU }]'
ENSEMBLE = """platform: "ensemble"
ensemble_scheduling { step [{ model_name: "later" model_version: -1
  input_map { key: "delay" value: "delay" } output_map { key: "out" value: "out" } }] }
parameters { key: "fullpipe_pipeline" value { string_value: "{\\"checkpoint\\": \\"toy\\"}" } }
"""


def add_model(repository: Path, name: str, config: str, source: str = "") -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(f'name: "{name}" {config} {TENSORS}')
    if source:
        (repository / name / "1" / "model.py").write_text(source)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    add_model(folder, "later", PYTHON, LATER)
    add_model(folder, "stream", f"{PYTHON} model_transaction_policy {{ decoupled: true }}", LATER)
    add_model(folder, "pipeline", ENSEMBLE)
    return folder


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def no_backends(tmp_path) -> Path:
    folder = tmp_path / "backends"
    folder.mkdir()
    return folder


@pytest.fixture
def make_server(repository, no_backends):
    """Makes servers on free ports whose log lines are in `server.lines`; stops them afterwards."""
    servers = []

    def make(folder: Path = repository, **choices) -> TritonServer:
        lines: list[str] = []
        ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
        config = ServerConfig(folder, backends=no_backends, **{**ports, **choices})
        server = TritonServer(config, log=lines.append)
        server.lines = lines
        servers.append(server)
        return server

    before = set(Path("/dev/shm").iterdir())
    others = set(psutil.Process().children(recursive=True))  # a server that the session shares
    yield make
    for server in servers:
        server.stop(now=True)
    assert not [p for p in Path("/dev/shm").glob(f"fullpipe_{os.getpid()}_*") if p not in before]
    assert not set(psutil.Process().children(recursive=True)) - others


def ask(url: str, model: str, delay: float, kind: str = "generate", timeout_s: float = 20) -> str:
    """The answer to one request as text, or how the connection broke."""
    request = urllib.request.Request(
        f"{url}/v2/models/{model}/{kind}",
        data=json.dumps({"delay": delay}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        return urllib.request.urlopen(request, timeout=timeout_s).read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()
    except TimeoutError:
        return "HANG"
    except (OSError, http.client.HTTPException) as error:
        return f"broken: {error!r}"


def ask_grpc(address: str, delay: float, timeout_s: float = 20) -> str:
    import numpy as np
    from tritonclient import grpc

    tensor = grpc.InferInput("delay", [1], "FP32")
    tensor.set_data_from_numpy(np.array([delay], np.float32))
    try:
        with grpc.InferenceServerClient(address) as client:
            result = client.infer("pipeline", [tensor], client_timeout=timeout_s)
            return str(float(result.as_numpy("out")[0]))
    except grpc.InferenceServerException as error:
        return "HANG" if "DEADLINE" in str(error.status()) else f"broken: {error.status()}"


class Open:
    """Requests of every kind, open at the same time."""

    def __init__(self, server: TritonServer, delay: float) -> None:
        url = server.url
        jobs = {
            "model": lambda: ask(url, "later", delay),
            "ensemble": lambda: ask(url, "pipeline", delay),
            "stream": lambda: ask(url, "stream", delay, "generate_stream"),
            "grpc": lambda: ask_grpc(server.grpc_address, delay),
        }
        self.answers: dict[str, str] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(name, job)) for name, job in jobs.items()
        ]
        for thread in self._threads:
            thread.start()
        time.sleep(0.7)
        assert not self.answers

    def _run(self, name, job) -> None:
        self.answers[name] = job()

    def wait(self) -> dict[str, str]:
        for thread in self._threads:
            thread.join(30)
        return self.answers


def stub_of(server: TritonServer, model: str) -> psutil.Process:
    for child in psutil.Process(server.pid).children():
        if f"/{model}/1/model.py" in " ".join(child.cmdline()):
            return child
    raise AssertionError(f"{model} has no process")


@triton
def test_a_stop_answers_what_is_open_and_leaves_nothing(make_server):
    server = make_server()
    server.start()
    server.wait_ready(60)
    regions = list(Path("/dev/shm").glob(f"fullpipe_{os.getpid()}_*"))
    assert regions, "the shared memory has this server's own prefix"
    requests = Open(server, 2.0)
    server.stop()
    answers = requests.wait()
    assert json.loads(answers["model"])["out"] == json.loads(answers["ensemble"])["out"] == 2.0
    assert answers["stream"].rstrip().endswith('"out":2.0}')
    assert answers["grpc"] == "2.0"
    assert server.state == "stopped"
    assert server.lines.count("finalized") == 2, "models were finalized, not killed"
    shown = "\n".join(server.lines)
    assert "loaded 'pipeline'" in shown
    assert not any(noise in shown for noise in ("+--", "CUDA", "NVML", "I1"))
    assert any("+--" in line for line in server.tail)


@triton
def test_a_stop_does_not_wait_for_idle_connections(make_server, monkeypatch):
    """They were answered (or never asked) a while ago; one that waits for an answer is not idle."""
    monkeypatch.setattr("fullpipe.triton_process.QUIET_S", 1.0)
    with make_server() as server:
        host, port = server.config.host, server.config.http_port
        answered, is_open = (http.client.HTTPConnection(host, port, timeout=20) for _ in range(2))
        answered.request("POST", "/v2/models/pipeline/generate", '{"delay": 0.2}')
        assert answered.getresponse().read()
        unused = socket.create_connection((host, port))
        time.sleep(1.0)
        is_open.request("POST", "/v2/models/pipeline/generate", '{"delay": 4.0}')
        time.sleep(0.5)
        started = time.monotonic()
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        time.sleep(1.5)
        assert answered.sock.recv(1) == unused.recv(1) == b"", "closed at once"
        assert json.loads(is_open.getresponse().read())["out"] == 4.0
        stopping.join()
        assert time.monotonic() - started < 15
        assert server.lines.count("finalized") == 2, "a clean end"
        for connection in (answered, is_open, unused):
            connection.close()


@triton
def test_a_request_longer_than_the_limit_is_cut_off(make_server):
    with make_server(stop_timeout_s=1) as server:
        requests = Open(server, 12.0)
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < 8
        assert all(a.startswith("broken") for a in requests.wait().values()), requests.answers


@triton
def test_a_dead_stub_or_server_hangs_nobody_and_comes_back(make_server):
    with make_server() as server:
        for restarts, killed in ((1, "later"), (2, None)):
            requests = Open(server, 12.0)
            started = time.monotonic()
            (stub_of(server, killed) if killed else psutil.Process(server.pid)).kill()
            answers = requests.wait()
            assert all(a.startswith("broken") for a in answers.values()), answers
            assert time.monotonic() - started < 5
            wait_until(lambda expected=restarts: server.restarts == expected)
            server.wait_ready(60)
            assert json.loads(ask(server.url, "pipeline", 0.1))["out"] == pytest.approx(0.1)
        shown = "\n".join(server.lines)
        assert "the process of model instance later_0_0 died; restart 1 of 5" in shown
        assert "tritonserver was ended by SIGKILL; restart 2 of 5" in shown


@triton
def test_an_installed_tritonserver_serves_the_same_repository(make_server, tmp_path):
    """Laid out as in NVIDIA's container: bin, backends and caches under one folder."""
    embedded = embedded_triton()
    root = tmp_path / "opt"
    for folder in ("bin", "backends/python"):
        (root / folder).mkdir(parents=True)
    binary = shutil.copy(embedded.binary, root / "bin")
    for file in [*embedded.backends["python"].glob("*.*"), embedded.python_stub]:
        shutil.copy(file, root / "backends" / "python")
    (root / "caches").symlink_to(embedded.caches)
    assert installed_triton(Path(binary)) == installed_triton(root)
    env = {"LD_LIBRARY_PATH": ":".join(map(str, embedded.libraries))}
    with make_server(triton=root, env=env) as server:
        assert json.loads(ask(server.url, "pipeline", 0.1))["out"] == pytest.approx(0.1)
        assert str(root) in " ".join(psutil.Process(server.pid).cmdline())


@triton
def test_a_backend_directory_is_complete_or_not_there(no_backends, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (no_backends / "toy").mkdir()
    (no_backends / "toy" / "model.py").write_text("")
    files = embedded_triton()
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: files.lay_out(no_backends), range(32)))
    assert [folder.name for folder in (tmp_path / "cache" / "fullpipe").iterdir()] == [
        folder.name for folder in folders
    ], "one folder, and nothing unfinished beside it"
    folder = folders.pop()
    assert {child.name for child in folder.iterdir()} == {"python", "toy"}
    assert (folder / "python" / "triton_python_backend_stub").is_file()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SetupError, match=r"cannot be written .*XDG_CACHE_HOME"):
        files.lay_out(no_backends)


@triton
def test_restarts_are_bounded(make_server):
    with make_server(max_restarts=0) as server:
        psutil.Process(server.pid).kill()
        assert server.wait(30) == "failed"
        with pytest.raises(SetupError, match="ended by SIGKILL; given up after 0 restarts"):
            server.wait_ready()


@triton
def test_two_servers_side_by_side(make_server):
    first, second = make_server(), make_server()
    first.start()
    second.start()
    first.wait_ready(60)
    second.wait_ready(60)
    first.stop()
    assert json.loads(ask(second.url, "pipeline", 0.1))["out"] == pytest.approx(0.1)


@triton
def test_a_taken_port_is_named_with_its_holder(make_server):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(SetupError, match=rf"grpc_port={port} is in use by .*pid {os.getpid()}"):
            make_server(grpc_port=port).start()


@triton
@pytest.mark.parametrize(
    ("source", "config", "line"),
    [
        (
            "class SetupError(Exception): pass\n"
            "class TritonPythonModel:\n"
            "    def initialize(self, args): raise SetupError('no weights.bin; run: assemble')\n",
            PYTHON,
            "model 'broken' failed to load: no weights.bin; run: assemble",
        ),
        ("import nothing_of_that_name\n", PYTHON, "No module named 'nothing_of_that_name'"),
        ("import os; os._exit(3)\n", PYTHON, "'?broken"),
        (LATER, 'backend: "python" surprise: 1', "model 'broken' failed to load: .*config.pbtxt"),
        (LATER, 'backend: "unheard_of"', "model 'broken' failed to load: .*unheard_of"),
    ],
    ids=["initialize", "import", "exit", "config", "backend"],
)
def test_a_broken_model_ends_the_start_with_one_line(make_server, tmp_path, source, config, line):
    repository = tmp_path / "repository"
    add_model(repository, "broken", config, source)
    slow = LATER.replace(
        "def initialize(self, args):", "def initialize(self, args):\n        time.sleep(60)"
    )
    add_model(repository, "slow", PYTHON, slow)
    server = make_server(repository)
    started = time.monotonic()
    server.start()
    with pytest.raises(SetupError, match=line) as caught:
        server.wait_ready(60)
    assert time.monotonic() - started < 20, "other models' loading is not waited for"
    assert "\n" not in str(caught.value)


SERVE = """
import sys
from pathlib import Path
from fullpipe.serve import serve
from fullpipe.server import ServerConfig
sys.exit(serve(ServerConfig(Path(sys.argv[1]), http_port=0, grpc_port=0, metrics_port=0)))
"""


@triton
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_serve_shows_what_it_serves_and_ends_with_all_it_started(repository, number):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(repository)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    shown = ""
    for line in process.stdout:
        shown += line
        if line.startswith("curl"):
            break
    assert "ready after" in shown
    assert "pipeline pipeline (toy)" in shown
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) == 3
    process.send_signal(number)
    assert process.wait(30) == (0 if number == signal.SIGINT else -number)
    assert not psutil.wait_procs(started, 30)[1]
    assert not list(Path("/dev/shm").glob(f"fullpipe_{process.pid}_*"))


def wait_until(condition, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_log_lines_are_readable():
    line = LogLine.parse(r'E1122 18:08:49.941694 4537 model.cc:642] "no \"x\"\n\nAt:\n  a.py"')
    assert str(line) == '18:08:49 error   no "x"\n\nAt:\n  a.py'
    assert line.is_wanted("error")
    info = LogLine.parse("I1122 18:08:49.9 4537 model.cc:1] \"successfully loaded 'unet'\"")
    assert info.is_wanted("info")
    assert not info.is_wanted("warning")
    printed = LogLine.parse('  File "model.py", line 3')
    assert str(printed) == '  File "model.py", line 3'
    assert printed.is_wanted("error"), "tracebacks are kept"
    assert not LogLine.parse("| unet | 1 | READY |").is_wanted("info")


def test_the_reason_of_a_failed_load_is_one_line():
    text = (
        "E1122 18:08:49.941694 4537 model_lifecycle.cc:642] \"failed to load 'unet' version 1: "
        r'Internal: SetupError: no model.plan; run fullpipe assemble\n\nAt:\n  /model.py(4): f\n"'
    )
    expected = "model 'unet' failed to load: no model.plan; run fullpipe assemble"
    assert load_failure(LogLine.parse(text)) == expected


def test_the_curl_line_writes_the_picture(tmp_path):
    """The part behind the pipe, fed with what /generate answers."""
    command = curl_line("http://127.0.0.1:1", "full_pipeline").split("| ", 1)[1]
    for reply, code, told in (
        ({"image": "aGVsbG8="}, 0, ""),
        ({"error": "steps=0 must be at least 1"}, 1, "steps=0 must be at least 1"),
    ):
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, input=json.dumps(reply), text=True, stderr=-1
        )
        assert (done.returncode, done.stderr.strip()) == (code, told)
    assert (tmp_path / "out.png").read_bytes() == b"hello"
