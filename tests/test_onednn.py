"""Packed layers compute what the plain ones do."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from fullpipe.engines.onednn import PackedConv2d, PackedLinear, pack


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(count, 4, 16, 16, generator=generator),
        torch.randint(0, 1000, (count,), generator=generator),
        torch.randn(count, 77, 128, generator=generator),
    )


@torch.inference_mode()
def test_a_packed_unet_predicts_what_the_plain_one_does(checkpoint):
    plain = UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval()
    packed = pack(UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval())
    kinds = {type(layer) for layer in packed.modules()}
    assert {PackedConv2d, PackedLinear} <= kinds and not {nn.Conv2d, nn.Linear} & kinds
    for count in (1, 3):
        expected, got = (unet(*rows(count), return_dict=False)[0] for unet in (plain, packed))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


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
