"""The record of a built engine: what it was built for, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fullpipe.assemble import Choices, assemble
from fullpipe.cli import _parser
from fullpipe.config import LoopSettings, PipelineConfig
from fullpipe.engines.artifact import Artifact, Key
from fullpipe.engines.loading import load_unet
from fullpipe.errors import SetupError


@pytest.fixture(scope="module")
def repository(checkpoint, tmp_path_factory):
    """The demo checkpoint with ONNX engines."""
    out = tmp_path_factory.mktemp("artifact") / "repository"
    chosen = {"steps": "4", "cfg": "1.5"}
    assemble(checkpoint, out, Choices(loop=LoopSettings(engine="onnx"), defaults=chosen))
    return out


@pytest.fixture
def unet(repository):
    return repository / "scheduler_model" / "1" / "unet"


@pytest.fixture
def config(repository):
    return PipelineConfig.load(repository / "scheduler_model" / "1" / "pipeline.json")


def test_it_loads_where_everything_fits(unet, config):
    assert load_unet(unet, config, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp16"}, "precision fp32, needed fp16"),
        ({"sizes": [[64, 64], [96, 64]]}, "sizes any, needed 64x64,96x64"),
        ({"buckets": [1, 2]}, "buckets any, needed 1,2"),
    ],
)
def test_other_settings_are_refused(unet, config, change, message):
    other = dataclasses.replace(config, loop=dataclasses.replace(config.loop, **change))
    with pytest.raises(SetupError) as caught:
        load_unet(unet, other, "cpu")
    assert message in str(caught.value)
    assert "; rebuild it with: fullpipe assemble " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_weights_are_refused(unet, config):
    checkpoint = dataclasses.replace(config.checkpoint, digest="0123456789abcdef")
    with pytest.raises(SetupError, match=r"checkpoint \w{16}, needed 0123456789abcdef; rebuild"):
        load_unet(unet, dataclasses.replace(config, checkpoint=checkpoint), "cpu")


def test_every_difference_is_named_at_once():
    built = Key("compiled", "a", "fp16", [[512, 512]], [1, 2], "sm_89", {"torch": "2.11"})
    here = dataclasses.replace(built, gpu="sm_90", libraries={"torch": "2.13"})
    record = Artifact(built, {}, "fullpipe assemble x")
    with pytest.raises(SetupError) as caught:
        record.check(Path("unet"), here)
    assert str(caught.value) == (
        "unet holds an engine of gpu sm_89, needed sm_90; libraries torch=2.11, needed torch=2.13;"
        " rebuild it with: fullpipe assemble x"
    )


def test_a_missing_or_foreign_record_is_refused(unet, config, tmp_path):
    with pytest.raises(SetupError, match=r"engine.json is missing; `fullpipe assemble` writes it"):
        load_unet(tmp_path, config, "cpu")
    (tmp_path / "engine.json").write_text(json.dumps({"key": {"motor": "diesel"}}))
    with pytest.raises(SetupError, match=r"unknown keys \['motor'\]"):
        load_unet(tmp_path, config, "cpu")
    unknown = dataclasses.replace(config.loop, engine="steam")
    with pytest.raises(SetupError, match=r"engine='steam' is unknown, allowed: torch, compiled"):
        load_unet(unet, dataclasses.replace(config, loop=unknown), "cpu")


def test_the_command_that_rebuilds_is_a_command(unet, checkpoint, repository):
    words = shlex.split(Artifact.load(unet).rebuild)
    assert words[0] == "fullpipe"
    args = _parser().parse_args(words[1:])
    assert (args.command, args.checkpoint, args.out) == ("assemble", checkpoint, repository)
    assert (args.engine, args.precision, args.name) == ("onnx", "fp32", "full_pipeline")
    assert args.defaults == {"steps": "4", "cfg": "1.5"}


def test_too_little_memory_gets_one_line(checkpoint, tmp_path):
    """A process of its own that may not grow, because the limit is for a whole process."""
    assemble(checkpoint, tmp_path / "repository")
    script = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        import psutil
        from fullpipe.config import PipelineConfig
        from fullpipe.engines.loading import load_unet
        from fullpipe.errors import SetupError
        folder = Path(sys.argv[1])
        config = PipelineConfig.load(folder / "pipeline.json")
        load_unet(folder / "unet", config, "cpu")  # everything that it imports is in memory now
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), used + (4 << 20)))
        try:
            load_unet(folder / "unet", config, "cpu")
        except SetupError as error:
            print(error)
    """)
    folder = tmp_path / "repository" / "scheduler_model" / "1"
    ran = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    (line,) = ran.stdout.splitlines()
    assert "unet does not fit into the memory of cpu: its weights alone are 0.0 GiB" in line
