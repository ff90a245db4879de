"""A compiler whose libraries torch cannot load is passed over, or named, before it is used."""

from __future__ import annotations

import shutil

import pytest
import torch

from fullpipe.engines import host_compiler
from fullpipe.engines.ahead_of_time import check_package, compile_package
from fullpipe.engines.build_pool import build_apart
from fullpipe.engines.host_compiler import find_host_compiler
from fullpipe.errors import SetupError


@pytest.fixture
def static_compiler(tmp_path):
    """g++ as some machines have it: what it links carries a C++ library of its own."""
    path = tmp_path / "bin" / "static-g++"
    path.parent.mkdir()
    path.write_text(
        '#!/bin/sh\ncase " $* " in *" -shared "*) exec g++ -static-libstdc++ "$@";; esac\n'
        'exec g++ "$@"\n'
    )
    path.chmod(0o755)
    return path


def test_the_named_compiler_comes_first(tmp_path, monkeypatch):
    own = tmp_path / "own-g++"
    own.symlink_to(shutil.which("g++"))
    monkeypatch.setenv("CXX", str(own))
    assert find_host_compiler() == str(own)
    monkeypatch.delenv("CXX")
    assert find_host_compiler() == shutil.which("g++")


def test_a_static_compiler_is_passed_over(static_compiler, monkeypatch):
    monkeypatch.setenv("CXX", str(static_compiler))
    assert find_host_compiler() == shutil.which("g++")


def test_without_a_usable_one_a_line_says_what_was_tried(static_compiler, tmp_path, monkeypatch):
    broken = tmp_path / "broken-g++"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(static_compiler))
    monkeypatch.setattr(host_compiler, "OTHERS", (str(broken), "no-such-compiler"))
    with pytest.raises(SetupError) as caught:
        find_host_compiler()
    assert str(caught.value) == (
        "compiling needs a C++ compiler that links the C++ library as a shared one; found:"
        f" {static_compiler} (links the C++ library statically), {broken} (it is broken),"
        " no-such-compiler (missing); install g++, or name another with CXX"
    )


def compile_a_layer(path):
    layer = torch.nn.Linear(8, 8).eval().requires_grad_(False)
    inputs = [torch.randn(2, 8)]
    compile_package(layer, inputs, path)
    check_package(path, layer, inputs)


def test_packages_load_on_a_machine_with_a_static_compiler(static_compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(static_compiler))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    jobs = {"layer.pt2": (compile_a_layer, (tmp_path / "layer.pt2",))}
    assert list(build_apart(jobs, lambda line: None)) == ["layer.pt2"]
