"""CLIP's text layers on a GPU as CUDA graphs, one for each number of chunks.

A prompt is so little work that launching its hundreds of kernels takes several times as long as
running them; a graph launches them at once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import torch

from fullpipe.graphs import record
from fullpipe.text.clip import ClipTextModel

# A pair of prompts of four chunks each; longer ones are bound by the work itself.
MAX_ROWS = 8
# The least used goes first: clip skip allows two dozen layers with every number of rows.
MAX_GRAPHS = 16


class _Key(NamedTuple):
    rows: int
    tokens: int
    hidden_layer: int | None
    needs_last: bool


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    outputs: tuple[torch.Tensor | None, torch.Tensor | None]


class GraphedClip:
    """A `ClipTextModel` on a GPU, called like it by any number of threads."""

    def __init__(self, model: ClipTextModel):
        """`model`: loaded, its weights on a GPU; they may be changed in place later."""
        self.config = model.config
        self.embeddings = model.embeddings
        self.final_layer_norm = model.final_layer_norm
        self.embed, self.project = model.embed, model.project
        self._model = model
        self._device = model.embeddings.token_embedding.weight.device
        self._stream = torch.cuda.Stream(self._device)
        self._recorded: OrderedDict[_Key, _Recorded] = OrderedDict()
        self._turn = threading.Lock()

    @torch.inference_mode()
    def __call__(
        self, inputs_embeds: torch.Tensor, hidden_layer: int | None, *, needs_last: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """See `ClipTextModel.forward`; recorded at the first call of a kind."""
        rows, tokens, _ = inputs_embeds.shape
        if rows > MAX_ROWS:
            return self._model(inputs_embeds, hidden_layer, needs_last=needs_last)
        key = _Key(rows, tokens, hidden_layer, needs_last)
        caller = torch.cuda.current_stream(self._device)
        with self._turn, torch.cuda.stream(self._stream):
            self._stream.wait_stream(caller)
            recorded = self._recorded.get(key) or self._record(key, inputs_embeds)
            self._recorded.move_to_end(key)
            recorded.inputs.copy_(inputs_embeds)
            recorded.graph.replay()
            last, hidden = (None if out is None else out.clone() for out in recorded.outputs)
        caller.wait_stream(self._stream)
        for out in (last, hidden):
            if out is not None:
                out.record_stream(caller)
        return last, hidden

    def _record(self, key: _Key, example: torch.Tensor) -> _Recorded:
        inputs = example.clone()

        def run() -> tuple[torch.Tensor | None, torch.Tensor | None]:
            return self._model(inputs, key.hidden_layer, needs_last=key.needs_last)

        graph, outputs = record(run)
        if len(self._recorded) == MAX_GRAPHS:  # nothing runs any more: recording has waited
            self._recorded.popitem(last=False)
        recorded = self._recorded[key] = _Recorded(graph, inputs, outputs)
        return recorded
