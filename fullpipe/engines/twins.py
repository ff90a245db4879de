"""Rows that differ in their prompt alone, computed as one until the first cross-attention.

The two halves of classifier-free guidance have the same sample and timestep. What a UNet makes of
these before it looks at the prompt is the same for both, in the demo's an eighth of all the work.

Rows with a twin come first, then rows without one, then the twins in the order of the first. So
how a tensor of fewer rows extends to all of them follows from the two numbers of rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn


def spread(x: torch.Tensor, rows: int) -> torch.Tensor:
    """[U, …] to [rows, …]: the first ones again at the end, for their twins."""
    return x if len(x) == rows else torch.cat([x, x[: rows - len(x)]])


def spread_skips(
    block: nn.Module, _: tuple[()], inputs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """A forward pre-hook of an up block: what the first down blocks left there, for all rows."""
    rows = len(inputs["hidden_states"])
    skips = tuple(spread(skip, rows) for skip in inputs["res_hidden_states_tuple"])
    return (), {**inputs, "res_hidden_states_tuple": skips}


@dataclasses.dataclass(frozen=True)
class Share:
    """Rows of a call that are computed together.

    Attributes:
        rows: their numbers in the order that is described above.
        unlike: how many of them have no twin before them.
    """

    rows: list[int]
    unlike: int


def deal(samples: torch.Tensor, timesteps: torch.Tensor, count: int) -> list[Share]:
    """Divide the rows of a call into equal shares, twins into the same one where that is possible.

    Args:
        samples: [R, 4, h, w] on the CPU.
        timesteps: [R] on the CPU.
        count: of shares, R or fewer.
    """
    owners = list(enumerate(_pair_up(samples, timesteps)))
    in_pairs = [(owner, row) for owner, rows in owners for row in rows]
    shares = []
    for number in range(count):
        start, end = (len(in_pairs) * n // count for n in (number, number + 1))
        by_owner: dict[int, list[int]] = {}
        for owner, row in in_pairs[start:end]:
            by_owner.setdefault(owner, []).append(row)
        groups = sorted(by_owner.values(), key=len, reverse=True)
        firsts = [group[0] for group in groups]
        shares.append(Share(firsts + [row for group in groups for row in group[1:]], len(firsts)))
    return shares


def _pair_up(samples: torch.Tensor, timesteps: torch.Tensor) -> list[list[int]]:
    """Every row with its twin, or alone."""
    # Numbers that rows of different origin hardly ever share; equality is what decides.
    probes = samples.flatten(1)[:, :4].tolist()
    pairs: list[list[int]] = []
    waiting: dict[tuple[float, ...], list[int]] = {}
    for row, (timestep, values) in enumerate(zip(timesteps.tolist(), probes, strict=True)):
        probe = (timestep, *values)
        pair = waiting.pop(probe, None)
        if pair is not None and torch.equal(samples[pair[0]], samples[row]):
            pair.append(row)
        else:
            pairs.append([row])
            waiting[probe] = pairs[-1]
    return pairs
