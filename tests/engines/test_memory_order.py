"""Operations in the order of channels-last memory: the same values, and kernels that compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fullpipe.engines import memory_order
from fullpipe.engines.ahead_of_time import check_package, compile_package
from fullpipe.engines.memory_order import MemoryOrder


class Block(nn.Module):
    """What surrounds a skip connection of a UNet."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(8, 48)
        self.conv = nn.Conv2d(48, 32, 3, padding=1)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """[N, 32, h, w] and [N, 16, h, w] to [N, 32, h, w]."""
        return self.conv(nn.functional.silu(self.norm(torch.cat([x, skip], dim=1))))


@pytest.fixture(autouse=True)
def every_norm_is_large(monkeypatch):
    monkeypatch.setattr(memory_order, "LARGE", 0)


def pictures(channels: int, mean: float = 0.0) -> torch.Tensor:
    """Random, each time others."""
    x = torch.randn(2, channels, 6, 10) * (1 + torch.rand(channels, 1, 1)) + mean
    return x.to(memory_format=torch.channels_last)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_group_norm_is_as_exact_as_torch_own(mean):
    norm, x = nn.GroupNorm(8, 48), pictures(48, mean)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    wanted = nn.GroupNorm.forward(norm.double(), x.double())
    norm.float()
    with MemoryOrder():
        got = norm(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert error(got, wanted) < max(4 * error(norm(x), wanted), 1e-6)


def test_a_half_precision_norm_has_fp32_statistics():
    norm, x = nn.GroupNorm(8, 48).half(), pictures(48, 30.0).half()
    wanted = nn.functional.group_norm(x.double(), 8, eps=1e-5)
    with MemoryOrder():
        got = norm(x)
    assert got.dtype == torch.float16
    assert error(got, wanted) < 5e-4


def test_a_norm_without_weights_and_one_of_tokens_stay_torch_own():
    norm, bare = nn.GroupNorm(8, 48), nn.GroupNorm(8, 48, affine=False)
    tokens, x = torch.randn(2, 48, 60), pictures(48)
    wanted = norm(tokens), bare(x)
    with MemoryOrder():
        assert torch.equal(norm(tokens), wanted[0])
        assert torch.equal(bare(x), wanted[1])


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_cat_is_the_same_tensor(dim):
    x, y = pictures(16), pictures(16)
    with MemoryOrder():
        got = torch.cat([x, y], dim=dim), torch.cat((x, y), dim), torch.cat([x[0, 0], y[0, 0]])
    wanted = torch.cat([x, y], dim=dim)
    assert torch.equal(got[0], wanted) and torch.equal(got[1], wanted)
    assert torch.equal(got[2], torch.cat([x[0, 0], y[0, 0]]))


def test_it_compiles_to_the_same_values(tmp_path):
    """Whatever leaves the mode is torch's own again, as `check_package` compares with."""
    block = Block().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    inputs = pictures(32, 5.0), pictures(16)
    compile_package(block, inputs, tmp_path / "block.pt2")
    check_package(tmp_path / "block.pt2", block, inputs)


def test_nothing_is_written_otherwise_while_a_small_norm_is_traced(monkeypatch):
    monkeypatch.setattr(memory_order, "LARGE", 10**6)
    norm, x = nn.GroupNorm(8, 48), pictures(48)
    with MemoryOrder():
        assert torch.equal(norm(x), nn.functional.group_norm(x, 8, norm.weight, norm.bias))
