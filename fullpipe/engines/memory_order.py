"""Operations written in the order of channels-last memory, for Inductor to compile.

Inductor goes by what an operation means for [N, C, H, W], whatever its inputs' strides: it writes a
`torch.cat` of channels plane by plane, which the next kernel then reads against the grain at an
eighth of the memory's speed, and gives each of a group norm's few groups a walk over scattered
channels. The same operations on [N, H, W, C] compile to kernels that read and write in a row. What
they compute stays the same, up to rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Below, a tensor stays in the GPU's cache, and one kernel by groups is faster than two by channels.
LARGE = 4_000_000


def digest() -> str:
    """Of how operations are written here: packages compiled from others differ."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


class MemoryOrder(TorchFunctionMode):
    """While it is entered, `torch.cat` and group norms are traced as the module says."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """What `func` computes of 4-dimensional tensors, in another order; the rest as it is."""
        return _WRITTEN.get(func, func)(*args, **(kwargs or {}))


def _cat(
    tensors: list[torch.Tensor] | tuple[torch.Tensor, ...], dim: int = 0, **options: Any
) -> torch.Tensor:
    if dim != 1 or options or any(tensor.dim() != 4 for tensor in tensors):
        return torch.cat(tensors, dim, **options)
    return torch.cat([tensor.permute(0, 2, 3, 1) for tensor in tensors], dim=3).permute(0, 3, 1, 2)


def _group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """By channels first: mean and variance of each, then of the groups, then a scale and a shift.

    Statistics are in fp32 whatever the input is, and come from deviations, not from squares, so
    that a mean far from 0 costs no digits.
    """
    if input.dim() != 4 or input.numel() < LARGE or weight is None or bias is None:
        return nn.functional.group_norm(input, num_groups, weight, bias, eps)
    count, channels, height, width = input.shape
    pixels = input.permute(0, 2, 3, 1).reshape(count, height * width, channels).float()
    variances, means = torch.var_mean(pixels, dim=1, correction=0)
    variances, means = (x.view(count, num_groups, -1) for x in (variances, means))
    mean = means.mean(-1, keepdim=True)
    variance = (variances + (means - mean).square()).mean(-1, keepdim=True)
    scale = torch.rsqrt(variance + eps) * weight.float().view(1, num_groups, -1)
    shift = bias.float().view(1, num_groups, -1) - mean * scale
    out = pixels * _kept(scale, count, channels) + _kept(shift, count, channels)
    return out.to(input.dtype).view(count, height, width, channels).permute(0, 3, 1, 2)


_WRITTEN: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.cat: _cat,
    nn.functional.group_norm: _group_norm,
}


def _kept(x: torch.Tensor, count: int, channels: int) -> torch.Tensor:
    """[count, 1, channels], computed once: `as_strided` is of memory, so Inductor fills some.

    Without it every pixel would compute it anew.
    """
    flat = x.reshape(count, channels).as_strided((count, channels), (channels, 1))
    return flat.view(count, 1, channels)
