"""The run of everything that needs a GPU, with parts that need none."""

from __future__ import annotations

import re
import shlex
import sys

import pytest

from tests import on_gpu
from tests.on_gpu import Part, Run


def run(tmp_path, monkeypatch, parts, builds=None, minutes=5.0):
    monkeypatch.setattr(on_gpu, "PARTS", parts)
    monkeypatch.setattr(on_gpu, "BUILDS", builds or {})
    tmp_path.joinpath("out").mkdir()
    passed = Run(tmp_path / "out", tmp_path / "work", minutes).all(list(parts))
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    return passed, [line.split(" s  ", 1)[1] for line in lines]


def python(program):
    return shlex.join(["-c", program])


def test_parts_wait_for_their_builds_and_say_how_they_ended(tmp_path, monkeypatch):
    parts = {
        "plain": Part(python("print(6 * 7)"), 60),
        "built": Part(python("print(open('{work}-built').read())"), 60, "good"),
        "wrong": Part(python("raise SystemExit(3)"), 60),
        "unbuilt": Part(python("print()"), 60, "bad"),
    }
    builds = {
        "good": python("open('{work}-built', 'w').write('yes')"),
        "bad": python("raise SystemExit(2)"),
    }
    passed, lines = run(tmp_path, monkeypatch, parts, builds)
    assert not passed
    assert [re.sub(r"\d+ s:", "", line) for line in lines] == [
        "plain: exit status 0,  42",
        "built: exit status 0,  yes",
        "wrong: exit status 3,  ",
        "unbuilt: not run: build_bad ended with 2",
    ]


def test_parts_leave_their_results_in_the_folder(tmp_path, monkeypatch):
    parts = {"told": Part(python("from bench.record import store; store('told', {})"), 60)}
    passed, _ = run(tmp_path, monkeypatch, parts)
    assert passed and (tmp_path / "out" / "told.json").is_file()


@pytest.mark.parametrize(("minutes", "limit", "said"), [(0, 60, "not run: no"), (5, 0.5, "ended")])
def test_what_takes_too_long_is_named(tmp_path, monkeypatch, minutes, limit, said):
    parts = {"endless": Part(python("while True: pass"), limit)}
    passed, lines = run(tmp_path, monkeypatch, parts, minutes=minutes)
    assert not passed and lines[0].startswith(f"endless: {said}")


def test_a_machine_without_a_gpu_gets_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["on_gpu", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: this machine lacks a GPU that torch sees"):
        on_gpu.main()
