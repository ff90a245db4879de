"""CLIP's text layers on a GPU as CUDA graphs, one for each number of chunks.

A prompt is so little work that launching its hundreds of kernels takes several times as long as
running them; a graph launches them at once.
"""

from __future__ import annotations

import torch

from fullpipe.graphs import CallGraphs
from fullpipe.text.clip import ClipTextModel

# A pair of prompts of four chunks each; longer ones are bound by the work itself.
MAX_ROWS = 8
# Clip skip allows two dozen layers with every number of rows.
MAX_GRAPHS = 16


class GraphedClip:
    """A `ClipTextModel` on a GPU, called like it by any number of threads."""

    def __init__(self, model: ClipTextModel):
        """`model`: loaded, its weights on a GPU; they may be changed in place later."""
        self.config = model.config
        self.embeddings = model.embeddings
        self.final_layer_norm = model.final_layer_norm
        self.embed, self.project = model.embed, model.project
        self._model = model
        self._graphs = CallGraphs(model.embeddings.token_embedding.weight.device, MAX_GRAPHS)

    @torch.inference_mode()
    def __call__(
        self, inputs_embeds: torch.Tensor, hidden_layer: int | None, *, needs_last: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """See `ClipTextModel.forward`; recorded at the first call of a kind."""

        def run(embeds: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
            return self._model(embeds, hidden_layer, needs_last=needs_last)

        if len(inputs_embeds) > MAX_ROWS:
            return run(inputs_embeds)
        key = (inputs_embeds.shape, hidden_layer, needs_last)
        last, hidden = self._graphs.call(key, [inputs_embeds], run)
        return last, hidden
