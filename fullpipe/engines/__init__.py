"""Executable networks: named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch


class Engine(Protocol):
    """One network that can be executed.

    UNet bindings: `sample` [R, 4, h, w], `timestep` [R], `encoder_hidden_states` [R, 77n, C]
    and, for SDXL, `text_embeds` [R, P] and `time_ids` [R, 6]; the result holds `noise_pred`
    [R, 4, h, w]. Every row stands for itself, so rows of different requests share a call.
    """

    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Execute once; inputs and outputs are fp32 on the engine's device."""
        ...
