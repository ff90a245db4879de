"""Executable networks: named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Mapping

import torch

TOKENS = 77  # of one chunk of a prompt, CLIP's context length
UNET_INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")


def in_order(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """A UNet's inputs in the order of `UNET_INPUTS`, those that there are."""
    return [tensors[name] for name in UNET_INPUTS if name in tensors]


def full_fp32(dtype: torch.dtype) -> None:
    """Let fp32 mean fp32 in this process: cuDNN rounds to TF32 where nobody says otherwise."""
    if dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False


class Engine:
    """One network that can be executed; the base of every engine.

    UNet bindings: `sample` [R, 4, h, w], `timestep` [R], `encoder_hidden_states` [R, 77n, C]
    and, for SDXL, `text_embeds` [R, P] and `time_ids` [R, 6]; the result holds `noise_pred`
    [R, 4, h, w]. Every row stands for itself, so rows of different requests share a call.

    One that `has_shallow_pass` also gives `deep` [R, h, w, D], in a precision of its own; given
    that of an earlier call as a further input, it runs the outermost layers alone and gives
    `noise_pred` (`fullpipe.engines.shallow`).
    """

    is_capturable = False
    """Whether `run` only queues work on the current CUDA stream, so that a graph can record it."""

    has_shallow_pass = False
    """Whether it serves step caching."""

    def row_counts(self, height: int, width: int, tokens: int) -> tuple[int, ...]:
        """The numbers of rows that it runs at this latent size and prompt length; () for any."""
        return ()

    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Execute once; inputs and outputs are fp32 on the engine's device."""
        raise NotImplementedError
