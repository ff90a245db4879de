"""A UNet whose calls replay CUDA graphs, for a process of its own where no tick is recorded."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fullpipe.engines import Engine
from fullpipe.graphs import CallGraphs

# One for each size and number of rows that is asked for.
MAX_GRAPHS = 16


class GraphedUNet(Engine):
    """A capturable engine on a GPU, of one kind of pass."""

    def __init__(self, engine: Engine, device: torch.device):
        """`engine`: on `device`, and `is_capturable`."""
        self._engine = engine
        self._graphs = CallGraphs(device, MAX_GRAPHS)

    def row_counts(self, height: int, width: int, tokens: int) -> tuple[int, ...]:
        """See `Engine`."""
        return self._engine.row_counts(height, width, tokens)

    @torch.inference_mode()
    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Engine`; recorded at the first call with a number of rows that it prefers."""
        rows, _, height, width = tensors["sample"].shape
        tokens = tensors["encoder_hidden_states"].shape[1]
        if rows not in self.row_counts(height, width, tokens):
            return self._engine.run(tensors)

        def predict(*inputs: torch.Tensor) -> list[torch.Tensor]:
            return [self._engine.run(dict(zip(tensors, inputs, strict=True)))["noise_pred"]]

        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        (noise_pred,) = self._graphs.call(key, list(tensors.values()), predict)
        assert noise_pred is not None
        return {"noise_pred": noise_pred}
