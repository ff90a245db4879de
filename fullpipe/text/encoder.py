"""Prompts to the tensors that condition a Stable Diffusion UNet."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fullpipe.errors import InvalidRequest, SetupError
from fullpipe.text.clip import ClipTextModel, load_clip
from fullpipe.text.clip_graphs import GraphedClip
from fullpipe.text.conditioning import ChunkEncoder
from fullpipe.text.embeddings import EmbeddingsFolder
from fullpipe.text.prompt import Piece, check_text, split_prompt
from fullpipe.text.tokens import Chunk, ClipTokenizer, Group, make_chunks

logger = logging.getLogger(__name__)

# What ComfyUI's CLIPSetLastLayer node allows.
CLIP_SKIP_MIN, CLIP_SKIP_MAX = -24, -1
OPEN_CLIP_H_LAYERS = 24


class PromptEncoder:
    """Encodes prompts as ComfyUI 0.3.75 does; any number of threads may call `encode`."""

    def __init__(
        self,
        tokenizer: ClipTokenizer,
        encoders: list[ChunkEncoder],
        embeddings: EmbeddingsFolder,
        max_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._encoders = encoders
        self._embeddings = embeddings
        self._max_tokens = max_tokens

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        embeddings_folder: Path | None = None,
        max_tokens: int = 15_000,
        weights_dtype: torch.dtype | None = torch.float16,
        execute: Callable[[Path, ClipTextModel], Any] | None = None,
    ) -> PromptEncoder:
        """Load the text part of a diffusers checkpoint: SD1, SD2, or SDXL with a text_encoder_2.

        SD2's encoder is OpenCLIP-H, told from CLIP-L by its activation. ComfyUI reads its layer
        -2 of 24, with the final norm, and pads with 0; diffusers' folders leave layer 24 out.

        Args:
            folder: holds tokenizer, text_encoder and, for SDXL, text_encoder_2. SDXL's tokenizer_2
                differs from tokenizer in its padding only, which is known, and is not read.
            device: where to compute, and where the results are.
            dtype: the type to compute in.
            embeddings_folder: textual inversions that prompts may name; listed now, so a file that
                is added later needs a reload.
            max_tokens: of one prompt, without start, end and padding.
            weights_dtype: the precision that weights are cut to before they are converted to
                `dtype`. ComfyUI keeps text encoders in fp16 on every device and computes in fp32,
                so the default gives its results for fp32 and bf16 checkpoints too. None: as stored.
            execute: gets each encoder's folder and model, and returns what stands in for the model;
                without it torch runs the model, on a GPU as CUDA graphs.
        Raises:
            SetupError: a file is missing or broken; the message names it and the remedy.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise SetupError(f"checkpoint folder {folder} is missing: check the path")
        tokenizer = ClipTokenizer.from_folder(folder / "tokenizer")
        is_sdxl = (folder / "text_encoder_2").is_dir()

        def load(name: str, *, key: str, pad: int, has_pooled: bool) -> ChunkEncoder:
            model: Any = load_clip(
                folder / name,
                has_projection=is_sdxl and has_pooled,
                device=device,
                dtype=dtype,
                weights_dtype=weights_dtype,
            )
            if execute is not None:
                model = execute(folder / name, model)
            elif torch.device(device).type == "cuda":
                model = GraphedClip(model)
            if tokenizer.size > model.config.vocab_size:
                raise SetupError(
                    f"{folder / 'tokenizer'} has {tokenizer.size} tokens, {name} beside it "
                    f"{model.config.vocab_size}: copy both from one checkpoint"
                )
            is_sd2 = not is_sdxl and model.config.hidden_act == "gelu"
            return ChunkEncoder(
                model,
                embedding_key="clip_h" if is_sd2 else key,
                start=tokenizer.start,
                end=tokenizer.end,
                pad=0 if is_sd2 else pad,
                default_skip=-2 if is_sdxl or is_sd2 else None,
                is_hidden_normed=not is_sdxl,
                has_pooled=has_pooled,
                layers=OPEN_CLIP_H_LAYERS if is_sd2 else model.config.num_hidden_layers,
            )

        encoders = [load("text_encoder", key="clip_l", pad=tokenizer.end, has_pooled=not is_sdxl)]
        if is_sdxl:
            encoders.append(load("text_encoder_2", key="clip_g", pad=0, has_pooled=True))
        return cls(tokenizer, encoders, EmbeddingsFolder(embeddings_folder), max_tokens)

    @torch.no_grad()
    def encode(
        self, prompt: str, negative_prompt: str = "", clip_skip: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Encode a pair of prompts.

        Args:
            prompt: in ComfyUI's syntax.
            negative_prompt: the same.
            clip_skip: ComfyUI's stop_at_clip_layer, -1 (the last layer) to -24; None is the
                checkpoint's own: the last layer for SD1, -2 for SDXL. As in ComfyUI, an encoder
                with fewer layers than that gives its last layer, normed.
        Returns:
            fp32 on the encoder's device: prompt_embeds [1, 77n, C], negative_prompt_embeds
            [1, 77m, C], pooled_prompt_embeds [1, P] and negative_pooled_prompt_embeds [1, P].
            SD1's pooled is the last layer's normed output at the end token of the first chunk,
            SDXL's is CLIP-G's projection of the same. The prompts share forward passes, so the
            other one's length can change the rounding of the last bits, and nothing else.
        Raises:
            InvalidRequest: clip_skip out of range; a prompt that is too long or not Unicode, or
                whose weights are so large that the result is not finite.
        """
        if clip_skip is not None and not CLIP_SKIP_MIN <= clip_skip <= CLIP_SKIP_MAX:
            raise InvalidRequest(f"clip_skip={clip_skip}, allowed {CLIP_SKIP_MIN}..{CLIP_SKIP_MAX}")
        texts = {"prompt": prompt, "negative_prompt": negative_prompt}
        chunks = [self.chunks(text, name) for name, text in texts.items()]
        parts: list[list[torch.Tensor]] = []
        pooled: list[torch.Tensor] = []
        for index, encoder in enumerate(self._encoders):
            embeds, pooled = encoder.encode([of_prompt[index] for of_prompt in chunks], clip_skip)
            parts.append(embeds)
        results = {}
        for index, name in enumerate(texts):
            # A textual inversion may have another length for each of SDXL's encoders.
            length = min(part[index].shape[1] for part in parts)
            embeds_of_prompt = torch.cat([part[index][:, :length] for part in parts], dim=-1)
            if not torch.isfinite(embeds_of_prompt).all():
                raise InvalidRequest(f"{name} has weights that make its embeddings infinite")
            results[f"{name}_embeds"] = embeds_of_prompt
            results[f"{name.removesuffix('prompt')}pooled_prompt_embeds"] = pooled[index]
        return results

    def chunks(self, text: str, name: str = "prompt") -> list[list[Chunk]]:
        """Tokenise a prompt for each of the checkpoint's encoders (SD1 one, SDXL two).

        They differ in padding and in the vectors of textual inversions. An embedding that the
        server does not have is left out, and named in the log, as in ComfyUI.

        Args:
            text: in ComfyUI's syntax.
            name: of the request's field, for messages.
        Raises:
            InvalidRequest: the text is too long, not Unicode, or has `embedding:` without a name.
        """
        check_text(name, text)
        pieces: list[Piece] = []
        unknown: list[str] = []
        for piece in split_prompt(text):
            if not piece.is_embedding:
                pieces.append(piece)
                continue
            known, written, rest = self._embeddings.find(piece.text)
            if known is None:
                unknown.append(written[:64])
            else:
                pieces.append(Piece(known, piece.weight, is_embedding=True))
            if rest:
                pieces.append(Piece(rest, piece.weight))
        if unknown:
            listed = ", ".join(repr(written) for written in unknown[:8])
            logger.warning("%s names %d unknown embeddings: %s", name, len(unknown), listed)
        ids = self._tokenizer.ids([piece.text for piece in pieces if not piece.is_embedding])
        return [self._chunks_of(encoder, pieces, ids, name) for encoder in self._encoders]

    def _chunks_of(
        self, encoder: ChunkEncoder, pieces: list[Piece], ids: list[list[int]], name: str
    ) -> list[Chunk]:
        remaining = iter(ids)
        groups = [
            Group(
                self._embeddings.vectors(piece.text, encoder.embedding_key, encoder.width)
                if piece.is_embedding
                else next(remaining),
                piece.weight,
            )
            for piece in pieces
        ]
        count = sum(len(group.tokens) for group in groups)
        if count > self._max_tokens:
            raise InvalidRequest(f"{name} has {count} tokens, allowed {self._max_tokens}")
        return make_chunks(
            groups,
            length=encoder.chunk_length,
            start=encoder.start,
            end=encoder.end,
            pad=encoder.pad,
        )


def repeat_to_same_length(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat embeddings along the tokens to the least common multiple of their lengths.

    Attention to a sequence and to repeats of it are the same, so this lets prompts of unequal
    length share a batch without a mask (ComfyUI 0.3.75, comfy/conds.py).

    Args:
        a: [B, n, C].
        b: [B', m, C].
    Returns:
        [B, lcm(n, m), C] and [B', lcm(n, m), C]; the arguments themselves where they have it.
    """
    length = math.lcm(a.shape[1], b.shape[1])
    if a.shape[1] != length:
        a = a.repeat(1, length // a.shape[1], 1)
    if b.shape[1] != length:
        b = b.repeat(1, length // b.shape[1], 1)
    return a, b
