"""The demo checkpoint's student autoencoder starts from its teacher, and never overwrites it."""

import sys

import pytest
import torch
from diffusers import AutoencoderKL

from demo import networks, train


@pytest.fixture
def larger(tmp_path):
    """A checkpoint folder whose autoencoder is larger at full resolution than a student."""
    channels = (24, *networks.VAE_CHANNELS[1:])
    vae = AutoencoderKL.from_config({**networks.make_vae().config, "block_out_channels": channels})
    vae.register_to_config(scaling_factor=0.7)
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path


def test_a_student_starts_from_all_that_fits_and_goes_on_from_itself(larger, tmp_path):
    teacher = AutoencoderKL.from_pretrained(larger / "vae")
    student = train.make_student(teacher, larger / "vae")
    assert tuple(student.config.block_out_channels) == networks.VAE_CHANNELS
    assert student.config.scaling_factor == 0.7
    known, weights = teacher.state_dict(), student.state_dict()
    name = "decoder.mid_block.resnets.0.conv1.weight"
    assert torch.equal(weights[name], known[name])
    assert weights["decoder.conv_out.weight"].shape != known["decoder.conv_out.weight"].shape

    student.decoder.conv_out.bias.data.fill_(3)
    student.save_pretrained(tmp_path / "own")
    again = train.make_student(teacher, tmp_path / "own")
    assert all(torch.equal(again.state_dict()[name], weights[name]) for name in weights)


def test_a_student_never_overwrites_its_teacher(larger, monkeypatch, capsys):
    argv = ["train", "student", "--checkpoint", str(larger), "--teacher", str(larger / "vae")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        train.main()
    assert "a folder other than the vae that it writes" in capsys.readouterr().err
