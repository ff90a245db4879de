"""Packed layers compute what the plain ones do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from fullpipe.engines import onednn_blocks
from fullpipe.engines.onednn import pack, share_twins
from fullpipe.engines.onednn_blocks import (
    PackedAttention,
    PackedResnet,
    PackedTransformer,
    PackedUpsample,
)
from fullpipe.engines.onednn_layers import PackedConv2d, PackedLinear
from fullpipe.engines.torch_engine import TorchUNet
from fullpipe.engines.twins import deal
from fullpipe.stages import load_vae


def rows(
    count: int, size: tuple[int, int] = (16, 16)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(count, 4, *size, generator=generator),
        torch.randint(0, 1000, (count,), generator=generator),
        torch.randn(count, 77, 128, generator=generator),
    )


def plain_unet(checkpoint: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval()


@torch.inference_mode()
def test_a_packed_unet_predicts_what_the_plain_one_does(checkpoint):
    plain, packed = plain_unet(checkpoint), pack(plain_unet(checkpoint))
    kinds = {type(layer) for layer in packed.modules()}
    assert {PackedConv2d, PackedLinear, PackedResnet, PackedTransformer, PackedUpsample} <= kinds
    assert not {nn.Conv2d, nn.Linear, ResnetBlock2D, Transformer2DModel} & kinds
    for count, size in ((1, (16, 16)), (3, (16, 16)), (2, (17, 24)), (1, (8, 11))):
        expected, got = (unet(*rows(count, size), return_dict=False)[0] for unet in (plain, packed))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_packed_vae_computes_what_the_plain_one_does(checkpoint):
    plain = load_vae(checkpoint / "vae", "cpu", torch.float32, is_packed=False)
    packed = load_vae(checkpoint / "vae", "cpu", torch.float32)
    left = {type(layer) for layer in packed.modules()}
    assert not {nn.Conv2d, nn.Linear, ResnetBlock2D, Attention} & left
    latents = rows(1, (9, 12))[0]
    pixels = plain.decode(latents).sample
    torch.testing.assert_close(packed.decode(latents).sample, pixels, atol=1e-5, rtol=0)
    expected, got = (vae.encode(pixels).latent_dist.mode() for vae in (plain, packed))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [10, 96])  # with packed weights, and with plain ones
@pytest.mark.parametrize("size", [None, (10, 14), (9, 13)])
@torch.inference_mode()
def test_an_upsampling_and_its_convolution_are_one(size, channels):
    plain = Upsample2D(6, use_conv=True, out_channels=channels)
    x = torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last)
    got = PackedUpsample(plain)(x, size)
    torch.testing.assert_close(got, plain(x, size), atol=1e-5, rtol=0)
    assert got.is_contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def test_a_vaes_attention_in_strips(monkeypatch):
    plain = Attention(
        16,
        heads=1,
        dim_head=16,
        norm_num_groups=4,
        residual_connection=True,
        bias=True,
        _from_deprecated_attn_block=True,
    )
    x = torch.randn(2, 16, 5, 7)
    before = x.clone()
    for strip in (1024, 8):
        monkeypatch.setattr(onednn_blocks, "ATTENTION_STRIP", strip)
        got = PackedAttention(plain)(x)
        torch.testing.assert_close(got, plain(x), atol=1e-6, rtol=1e-6)
        assert torch.equal(x, before)


@torch.inference_mode()
def test_a_resnet_adds_its_time_and_keeps_its_input():
    for channels in (16, 24):  # without and with a shortcut
        plain = ResnetBlock2D(in_channels=16, out_channels=channels, temb_channels=12, groups=8)
        x, temb = torch.randn(2, 16, 6, 5), torch.randn(2, 12)
        before = x.clone()
        got = PackedResnet(plain)(x, temb)
        torch.testing.assert_close(got, plain(x, temb), atol=1e-5, rtol=0)
        assert torch.equal(x, before)


def test_blocks_of_another_make_stay_as_they_are():
    scaled = ResnetBlock2D(in_channels=8, groups=8, output_scale_factor=2.0)
    shifted = ResnetBlock2D(in_channels=8, groups=8, time_embedding_norm="scale_shift")
    resampled = ResnetBlock2D(in_channels=8, groups=8, up=True)
    transposed = Upsample2D(8, use_conv_transpose=True)
    headed = Attention(8, heads=2, dim_head=4, norm_num_groups=4, residual_connection=True)
    packed = pack(nn.ModuleList([scaled, shifted, resampled, transposed, headed]))
    assert [type(part) for part in packed] == [ResnetBlock2D] * 3 + [Upsample2D, Attention]


@torch.inference_mode()
def test_guided_halves_share_what_comes_before_the_prompt(checkpoint):
    plain, packed = plain_unet(checkpoint), pack(plain_unet(checkpoint))
    assert share_twins(packed)
    sample, timestep, _ = rows(3)
    prompts = rows(5)[2]
    all_rows = [0, 1, 2, 0, 1]
    expected = plain(sample[all_rows], timestep[all_rows], prompts, return_dict=False)[0]
    got = packed(sample, timestep, prompts, return_dict=False)[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "origins", [[0], [0, 0], [0, 1, 2, 0, 2], [0, 0, 0, 1], [0, 1, 0, 1, 2, 3]]
)
def test_an_engine_finds_twins_wherever_they_are(checkpoint, origins):
    sample, timestep, _ = rows(4)
    prompts = rows(len(origins))[2]
    engine = TorchUNet(checkpoint / "unet")
    got = engine.run(
        {
            "sample": sample[origins],
            "timestep": timestep[origins],
            "encoder_hidden_states": prompts,
        }
    )["noise_pred"]
    with torch.inference_mode():
        expected = plain_unet(checkpoint)(
            sample[origins], timestep[origins], prompts, return_dict=False
        )[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_twins_are_dealt_together():
    sample, timestep, _ = rows(4)
    halves = [0, 1, 2, 3, 0, 2, 3]
    shares = deal(sample[halves], timestep[halves], 2)
    assert [(share.rows, share.unlike) for share in shares] == [([0, 1, 4], 2), ([2, 3, 5, 6], 2)]
    (share,) = deal(sample[[0, 0]], torch.tensor([7, 8]), 1)
    assert share.unlike == 2, "the same sample at another timestep is no twin"


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_strides_groups_and_missing_biases(bias):
    plain = nn.Sequential(
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4, bias=bias),
        nn.Conv2d(16, 16, 3, dilation=2, padding=(2, 1), bias=bias),
        nn.Linear(4, 6, bias=bias),
    ).eval()
    x = torch.randn(2, 8, 12, 12)
    expected = plain(x)
    torch.testing.assert_close(pack(plain)(x), expected, atol=1e-5, rtol=0)


def test_what_onednn_is_not_for_stays_as_it_is():
    half = nn.Sequential(nn.Linear(2, 2)).to(torch.bfloat16)
    named = nn.Sequential(nn.Conv2d(2, 2, 3, padding="same"))
    mirrored = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    for network in (half, named, mirrored):
        layer = network[0]
        assert pack(network)[0] is layer
