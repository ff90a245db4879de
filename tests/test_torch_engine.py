"""The torch engine beside what the loop's tests show of it."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from fullpipe.engines import torch_engine
from tests.engines.reduced import SMALL, TRUE, build


@pytest.mark.parametrize(("family", "block"), [("sd1", 1), ("sd2", 1), ("sdxl", 0)])
def test_a_convolution_that_a_cudnn_computes_wrongly_is_not_left_to_it(family, block, monkeypatch):
    """One of each UNet's; it is compared here with a right one."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**TRUE[family][0])
    names = list(unet.state_dict())
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: torch_engine.WRONG_CUDNN + 100)
    torch_engine._mend_wrong_convolution(unet)
    assert not replaced(unet)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: torch_engine.WRONG_CUDNN)
    torch_engine._mend_wrong_convolution(unet)
    assert list(unet.state_dict()) == names
    ((name, module),) = replaced(unet).items()
    assert name == f"up_blocks.{block}.resnets.2.conv1"
    module.to_empty(device="cpu")
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    module.to(memory_format=torch.channels_last)
    x = torch.randn(2, 1920, 4, 5).to(memory_format=torch.channels_last)
    wanted = torch.nn.functional.conv2d(x, module.weight, module.bias, padding=1)
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-2)


def replaced(unet):
    return {name: module for name, module in unet.named_modules() if "forward" in vars(module)}


def test_it_is_mended_where_it_is_wrong_only(tmp_path, monkeypatch):
    """fp32 on a GPU; with a stand-in for moving there."""
    folder = build("sdxl", tmp_path / "checkpoint", sizes=SMALL) / "unet"
    mended = []
    monkeypatch.setattr(torch_engine, "_mend_wrong_convolution", mended.append)
    monkeypatch.setattr(UNet2DConditionModel, "to", lambda unet, **_: unet)
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float16)):
        torch_engine.load_network(folder, device=device, dtype=dtype)
    assert not mended
    torch_engine.load_network(folder, device="cuda", dtype=torch.float32)
    assert len(mended) == 1
