"""A repository is complete or as it was, whatever happens while it is made."""

from __future__ import annotations

import hashlib
import io
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fullpipe.assemble import Choices, assemble
from fullpipe.cli import main
from fullpipe.config import LoopSettings
from fullpipe.errors import SetupError
from fullpipe.meter import Meter

from .reduced import build
from .test_checkpoints import keys_of


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    """An SD1 checkpoint in one file of some 30 MB."""
    root = tmp_path_factory.mktemp("single")
    folder = build("sd1", root / "sd1", torch.float16)
    keys = {key: tensor.contiguous() for key, tensor in keys_of("sd1", folder).items()}
    save_file(keys, root / "model.safetensors")
    return root / "model.safetensors"


@pytest.fixture
def out(checkpoint, tmp_path):
    """A repository that has the demo pipeline."""
    assemble(checkpoint, tmp_path / "repository")
    return tmp_path / "repository"


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.md5(p.read_bytes()).hexdigest() for p in files}


def is_untouched(out, before):
    return contents(out) == before and {p.name for p in out.parent.iterdir()} == {out.name}


@pytest.mark.parametrize("step", ["converting", "reading"])
def test_ctrl_c(single_file, out, step):
    before = contents(out)

    def interrupt(what, done, total):
        if what == step and done > total / 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        assemble(single_file, out, progress=interrupt)
    assert is_untouched(out, before)


def test_a_disk_that_takes_no_more(single_file, out, capsys):
    """No file may grow beyond 2 MB, which the kernel reports as it does a full disk."""
    before = contents(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, hard))
    try:
        code = main(["assemble", str(single_file), "--out", str(out)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    err = capsys.readouterr().err
    assert "cannot be written: " in err and err.count("\n") == 1
    assert is_untouched(out, before)


def test_a_disk_without_room_is_seen_beforehand(single_file, out, monkeypatch):
    before = contents(out)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(SetupError, match=r"has 0\.0 GiB free, model\.safetensors needs 0\.\d GiB"):
        assemble(single_file, out)
    assert is_untouched(out, before)


@pytest.mark.parametrize("fails_at", [1, 4, 9])
def test_a_move_that_fails_is_taken_back(single_file, out, monkeypatch, fails_at):
    before = contents(out)
    moves = []
    rename = Path.rename

    def failing(path, target):
        moves.append(path)
        if len(moves) == fails_at:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(SetupError, match=r"cannot be written: .*Input/output error"):
        assemble(single_file, out)
    monkeypatch.undo()
    assert is_untouched(out, before)


def test_a_damaged_file_leaves_the_old_pipeline(single_file, out, tmp_path_factory, capsys):
    before = contents(out)
    cut = tmp_path_factory.mktemp("cut") / "model.safetensors"
    cut.write_bytes(single_file.read_bytes()[:-4096])
    assert main(["assemble", str(cut), "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert "model.safetensors" in err and "is truncated or damaged" in err
    assert err.count("\n") == 1
    assert is_untouched(out, before)


def test_success_replaces_the_old_pipeline_alone(single_file, checkpoint, out, capsys):
    assemble(checkpoint, out, Choices(name="other", loop=LoopSettings(unet="bls")))
    other = {k: v for k, v in contents(out).items() if k.startswith("other")}
    argv = ["assemble", str(single_file), "--out", str(out)]
    argv += ["--defaults", "width=64,height=64,steps=4", "--sizes", "64x64,128x64"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert said.startswith("model.safetensors: SD1.x, epsilon, float16\n")
    assert "serve it with: fullpipe serve" in said
    after = contents(out)
    assert {k: v for k, v in after.items() if k.startswith("other")} == other
    config = (out / "scheduler_model" / "1" / "pipeline.json").read_text()
    assert '"steps": 4' in config and '"width": 64' in config


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--sizes", "512", "must be sizes such as 512x512,768x512, multiples of 8"),
        ("--sizes", "512x500", "must be sizes such as 512x512,768x512, multiples of 8"),
        ("--sizes", "axb", "must be sizes such as 512x512,768x512, multiples of 8"),
        ("--defaults", "steps", "must be like steps=4,cfg=1"),
        ("--engine", "steam", "invalid choice: 'steam'"),
        ("--precision", "int4", "invalid choice: 'int4'"),
    ],
)
def test_options_that_make_no_sense(capsys, option, value, message):
    with pytest.raises(SystemExit):
        main(["assemble", "checkpoint", option, value])
    assert message in capsys.readouterr().err


def test_bf16_is_not_for_onnx(checkpoint, tmp_path):
    choices = Choices(loop=LoopSettings(engine="onnx", precision="bf16"))
    with pytest.raises(SetupError, match="precision=bf16 with engine=onnx, allowed: fp32, fp16"):
        assemble(checkpoint, tmp_path / "repository", choices)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_meter_shows_bytes(monkeypatch, is_terminal):
    clock = iter([0.0, 1.5, 1.6, 7.0, 7.1])
    monkeypatch.setattr("fullpipe.meter.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    meter = Meter(stream)
    for done in (1, 2, 3, 4, 8):
        meter("converting", done * 10**9, 8 * 10**9)
    shown = stream.getvalue()
    if is_terminal:
        assert "\r\x1b[K███████░" in shown and "converting 2.0 of 8.0 GB" in shown
        assert shown.endswith("\r\x1b[K")
    else:
        assert shown == "converting 2.0 of 8.0 GB\nconverting 4.0 of 8.0 GB\n"
