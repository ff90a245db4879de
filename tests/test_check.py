"""`fullpipe check` on this machine, and on machines that lack something."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fullpipe import check as checks
from fullpipe.check import Finding, check_main, format_table


@pytest.fixture(scope="module")
def bare_machine(tmp_path_factory) -> str:
    """What `check` prints in an environment with nothing installed."""
    venv = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    code = "import sys; from fullpipe.check import check_main; sys.exit(check_main(ports={}))"
    done = subprocess.run(
        [str(venv / "bin" / "python"), "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    return done.stdout


@pytest.mark.triton
def test_a_machine_that_runs_these_tests_has_everything(capsys):
    assert check_main(ports={"http_port": 0}) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert out.rstrip().endswith("ready to serve")
    assert "needed:" not in out


@pytest.mark.parametrize("name", ["tritonserver", "fullpipe", "torch", "diffusers", "numpy"])
def test_what_is_not_installed_is_named_with_its_command(bare_machine, name):
    lines = bare_machine.splitlines()
    row = next(i for i, line in enumerate(lines) if line.split()[:2] == ["PROBLEM", name])
    assert "needed:" in lines[row + 1]
    assert "get it: pip install '.[server]' in a clone" in lines[row + 2]


def test_a_taken_port_is_named_with_its_holder():
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        finding = checks._port("grpc_port", "127.0.0.1", port)
    assert not finding.ok
    assert f"pid {os.getpid()}" in finding.got
    assert "--grpc-port N" in finding.remedy
    assert checks._port("grpc_port", "127.0.0.1", port).ok


def test_a_python_without_its_shared_library(monkeypatch):
    monkeypatch.setattr("fullpipe.triton_files._libpython_folders", lambda version: iter(()))
    finding = checks._libpython()
    assert not finding.ok
    assert "apt-get install libpython3" in finding.remedy
    assert not next(checks._triton(None)).ok


def test_numpy_2_is_a_problem_of_the_embedded_server_only():
    assert not checks._numpy("2.1.0").ok
    assert "numpy<2" in checks._numpy("2.1.0").remedy
    assert checks._numpy("1.26.4").ok


@pytest.mark.triton
def test_a_library_that_is_missing_is_named(tmp_path):
    files = checks.find_triton()
    assert checks._missing_libraries(files) == []
    # Away from its wheel, and without LD_LIBRARY_PATH, the stub finds no CUDA runtime.
    stub = Path(shutil.copy(files.python_stub, tmp_path))
    alone = dataclasses.replace(files, python_stub=stub, libraries=())
    assert any("libcudart" in line for line in checks._missing_libraries(alone))


def test_an_installed_tritonserver_that_is_not_there(tmp_path):
    finding = next(checks._triton(tmp_path / "opt"))
    assert not finding.ok
    assert str(tmp_path / "opt") in finding.got


def test_a_container_has_less_memory_than_its_machine(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    assert checks._available_bytes(meminfo, tmp_path) == 8000000 << 10
    (tmp_path / "memory.max").write_text(f"{2 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 30}\n")
    assert checks._available_bytes(meminfo, tmp_path) == 1 << 30
    (tmp_path / "memory.max").write_text("max\n")
    assert checks._available_bytes(meminfo, tmp_path) == 8000000 << 10


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    finding = checks._cache(tmp_path / "file" / "fullpipe")
    assert not finding.ok
    assert "XDG_CACHE_HOME" in finding.remedy
    assert checks._cache(tmp_path / "new" / "fullpipe").ok


def test_repositories(tmp_path):
    missing = checks._repository(tmp_path / "repository")
    assert not missing.ok
    assert f"fullpipe assemble CHECKPOINT --out {tmp_path / 'repository'}" in missing.remedy

    model = tmp_path / "repository" / "full_pipeline"
    model.mkdir(parents=True)
    assert "no config.pbtxt in full_pipeline" in checks._repository(model.parent).got
    (model / "config.pbtxt").write_text('name: "full_pipeline"\n')
    assert "no version folder in full_pipeline" in checks._repository(model.parent).got
    (model / "1").mkdir()
    assert "0 pipelines, 1 models" in checks._repository(model.parent).got
    with (model / "config.pbtxt").open("a") as config:
        config.write('parameters { key: "fullpipe_pipeline" value { string_value: "{}" } }\n')
    assert checks._repository(model.parent).ok


def test_the_table_shows_how_to_mend_what_is_wrong():
    table = format_table(
        [Finding(True, "Python", "3.11.7"), Finding(False, "C library", "musl", "glibc", "Debian")]
    )
    assert table.splitlines() == [
        "ok       Python     3.11.7",
        "PROBLEM  C library  musl",
        "                    needed: glibc",
        "                    get it: Debian",
        "1 to mend",
    ]
