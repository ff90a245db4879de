"""Chunks of tokens to conditioning tensors, with one CLIP model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from fullpipe.text.clip import ClipTextModel
from fullpipe.text.tokens import Chunk, Token

logger = logging.getLogger(__name__)

# Chunks of one forward pass, which bounds the memory that a very long prompt takes.
CHUNKS_PER_FORWARD = 32


class ChunkEncoder:
    """One CLIP model and the way in which a checkpoint family reads its outputs.

    Args:
        model: loaded, in eval mode.
        embedding_key: what files of textual inversions for two encoders call this one.
        start: token id before the text of a chunk.
        end: token id after it; the first one in a chunk is where the pooled output is taken.
        pad: token id of the rest.
        default_skip: stop_at_clip_layer where a request names none; None is the last layer, normed.
        is_hidden_normed: whether a layer named by stop_at_clip_layer goes through the final norm.
        has_pooled: whether the pooled output is wanted; it is projected if the model can.
        layers: that the encoder was trained with, from which stop_at_clip_layer counts back; a
            checkpoint may leave out the last ones.
    """

    def __init__(
        self,
        model: ClipTextModel,
        *,
        embedding_key: str,
        start: int,
        end: int,
        pad: int,
        default_skip: int | None,
        is_hidden_normed: bool,
        has_pooled: bool,
        layers: int,
    ) -> None:
        self.model = model
        self.embedding_key = embedding_key
        self.start, self.end, self.pad = start, end, pad
        self.has_pooled = has_pooled
        self._default_skip = default_skip
        self._is_hidden_normed = is_hidden_normed
        self._layers = layers
        self._empty: dict[int | None, torch.Tensor] = {}

    @property
    def width(self) -> int:
        """C, the width of a token's vector."""
        return self.model.config.hidden_size

    @property
    def chunk_length(self) -> int:
        """Tokens of a chunk, start and end included."""
        return self.model.config.max_position_embeddings

    def encode(
        self, prompts: Sequence[Sequence[Chunk]], clip_skip: int | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Encode prompts together.

        Args:
            prompts: the chunks of each, at least one.
            clip_skip: stop_at_clip_layer, or None for the checkpoint's own.
        Returns:
            for each prompt, fp32: its chunks' embeddings one after the other [1, 77n, C], and the
            pooled output of its first chunk [1, P]; the latter list is empty without pooled.
        """
        layer = self._hidden_layer(clip_skip)
        chunks = [chunk for prompt in prompts for chunk in prompt]
        hidden, pooled = self._forward([chunk.tokens for chunk in chunks], layer)
        if any(chunk.is_weighted for chunk in chunks):
            hidden = self._weigh(hidden, [chunk.weights for chunk in chunks], layer)
        counts = [len(prompt) for prompt in prompts]
        embeds = [part.reshape(1, -1, part.shape[-1]) for part in hidden.split(counts)]
        return embeds, [part[:1] for part in pooled.split(counts)] if pooled is not None else []

    def _hidden_layer(self, clip_skip: int | None) -> int | None:
        skip = self._default_skip if clip_skip is None else clip_skip
        if skip is None or -skip > self._layers:
            return None
        layer = self._layers + skip
        return layer if layer < self.model.config.num_hidden_layers else None

    def _weigh(
        self, hidden: torch.Tensor, weights: list[list[float]], layer: int | None
    ) -> torch.Tensor:
        if layer not in self._empty:
            # Alone, so that its rounding does not depend on the request that came first.
            row: list[Token] = [self.start, self.end, *[self.pad] * (self.chunk_length - 2)]
            self._empty[layer] = self._forward([row], layer)[0]
        empty = self._empty[layer]
        weight = torch.tensor(weights, dtype=torch.float32, device=hidden.device).unsqueeze(-1)
        return torch.where(weight == 1.0, hidden, (hidden - empty) * weight + empty)

    def _forward(
        self, rows: list[list[Token]], layer: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the model over chunks: [B, 77, C] and pooled [B, P] or None, fp32."""
        hiddens, pooleds = [], []
        for first in range(0, len(rows), CHUNKS_PER_FORWARD):
            embeds, ends = self._embed(rows[first : first + CHUNKS_PER_FORWARD])
            needs_last = self.has_pooled or layer is None
            last, hidden = self.model(embeds, layer, needs_last=needs_last)
            if hidden is None:
                hidden = last
            elif self._is_hidden_normed:
                hidden = self.model.final_layer_norm(hidden)
            hiddens.append(hidden.float())
            if self.has_pooled:
                pooled = last[torch.arange(len(last)), ends]
                pooleds.append(self.model.project(pooled).float())
        return torch.cat(hiddens), torch.cat(pooleds) if pooleds else None

    def _embed(self, rows: list[list[Token]]) -> tuple[torch.Tensor, list[int]]:
        """Look up the tokens of chunks: [B, 77, C], and the position of each chunk's end token.

        ComfyUI drops vectors of another width only here: the tokens after them move up and
        padding follows, while the weights stay where they were. It counts the end's position as
        the ids up to the first end plus all vectors.
        """
        ids, vectors, ends = [], [], []
        dropped = 0
        for index, row in enumerate(rows):
            kept = [t for t in row if isinstance(t, int) or t.shape[-1] == self.width]
            dropped += len(row) - len(kept)
            kept += [self.pad] * (len(row) - len(kept))
            row_ids = []
            for position, token in enumerate(kept):
                if isinstance(token, int):
                    row_ids.append(token)
                else:
                    row_ids.append(self.pad)
                    vectors.append((index, position, token))
            ids.append(row_ids)
            plain = [token for token in kept if isinstance(token, int)]
            ends.append(plain.index(self.end) + len(kept) - len(plain))
        if dropped:
            logger.warning(
                "%d embedding vectors are not of width %d, ignoring them", dropped, self.width
            )
        weight = self.model.embeddings.token_embedding.weight
        embeds = self.model.embed(torch.tensor(ids, device=weight.device))
        for index, position, vector in vectors:
            embeds[index, position] = vector.to(weight.device, weight.dtype)
        return embeds, ends
