"""What the torch engine says of where it runs."""

from __future__ import annotations

import torch

from fullpipe.engines import torch_engine


def test_a_wrong_cudnn_is_told_of(monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: torch_engine.WRONG_CUDNN)
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float16)):
        torch_engine._warn_of_wrong_convolution(torch.device(device), dtype)
    assert not caplog.records
    torch_engine._warn_of_wrong_convolution(torch.device("cuda"), torch.float32)
    assert "assemble SDXL with --precision fp16" in caplog.text
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: torch_engine.WRONG_CUDNN + 100)
    torch_engine._warn_of_wrong_convolution(torch.device("cuda"), torch.float32)
    assert len(caplog.records) == 1
