"""Embeddings that replicas share: the text encoder's answers, kept in Redis.

It stands before the text encoder, behind Triton's own response cache, which is faster but belongs
to one server. The loop knows nothing of either. A picture's size is no part of the key, because
embeddings do not depend on it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fullpipe.cache_store import RedisStore

URL_VARIABLE = "FULLPIPE_CACHE_URL"
TTL_VARIABLE = "FULLPIPE_CACHE_TTL_S"
DEFAULT_TTL_S = 7 * 86400
_Encode = Callable[[str, str, int | None], Mapping[str, torch.Tensor]]
NAMES = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


class CachedEncoder:
    """`PromptEncoder.encode` with a memory that other servers share.

    Only successful encodings are kept. An error is cheap and is made anew each time.
    """

    def __init__(
        self,
        encode: _Encode,
        store: RedisStore,
        digest: str,
        count: Callable[[str], None] = lambda result: None,
    ) -> None:
        """
        Args:
            encode: the text encoder's own.
            store: where answers are kept.
            digest: of everything but the texts that an answer depends on; `folder_digest` of the
                weights, and how they are computed with.
            count: hears how each look-up went, see `RedisStore.get`.
        """
        self._encode = encode
        self._store = store
        self._digest = digest
        self._count = count

    def encode(
        self, prompt: str, negative_prompt: str = "", clip_skip: int | None = None
    ) -> Mapping[str, torch.Tensor]:
        """See `PromptEncoder.encode`; tensors from the cache are on the CPU."""
        key = self._key(prompt, negative_prompt, clip_skip)
        result, tensors, _ = self._store.get(key)
        if result == "hit" and set(tensors) != set(NAMES):
            result = "corrupt"
        self._count(result)
        if result == "hit":
            return {name: torch.from_numpy(array) for name, array in tensors.items()}
        encoded = self._encode(prompt, negative_prompt, clip_skip)
        self._store.put(key, {name: _array(encoded[name]) for name in NAMES})
        return encoded

    def _key(self, prompt: str, negative_prompt: str, clip_skip: int | None) -> str:
        text = json.dumps([self._digest, prompt, negative_prompt, clip_skip])
        return hashlib.sha256(text.encode()).hexdigest()


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def folder_digest(folder: Path, *facts: Any) -> str:
    """sha256 over the files of a stage's folder, by name and content, and over further facts."""
    digest = hashlib.sha256(json.dumps([str(fact) for fact in facts]).encode())
    for path in _files(folder):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 22), b""):
                digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def store_from_environment(prefix: str, environment: Mapping[str, str], **options: Any):
    """The store that FULLPIPE_CACHE_URL names, or None where it is not set."""
    url = environment.get(URL_VARIABLE)
    if not url:
        return None
    ttl_s = int(environment.get(TTL_VARIABLE) or DEFAULT_TTL_S)
    return RedisStore(url, prefix=prefix, ttl_s=ttl_s, **options)


def cached(
    encode: _Encode, folder: Path, facts: Iterable[Any], count: Callable[[str], None]
) -> _Encode:
    """The encoder of a stage's folder, with the shared cache if the environment names one."""
    store = store_from_environment("fullpipe:embeds:", os.environ)
    if store is None:
        return encode
    return CachedEncoder(encode, store, folder_digest(folder, *facts), count).encode
