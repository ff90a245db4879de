"""Whole results that replicas share, for exact repeats with a seed of their own. Off by default.

It stands before the pipeline of the loop model. Triton's response cache on the ensemble would also
answer requests without a seed, which must differ, and miss every request that has a job id.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from fullpipe.cache_embeddings import store_from_environment
from fullpipe.cache_store import RedisStore
from fullpipe.errors import PipelineError
from fullpipe.job import Result

log = logging.getLogger(__name__)

VARIABLE = "FULLPIPE_RESULT_CACHE"
THREADS = 4
MAX_BYTES = 32 << 20
TIMEOUT_S = 0.25  # a picture is larger than embeddings, and worth a longer wait
_Reply = Callable[[Any], None]
_Call = Callable[[Mapping[str, np.ndarray], _Reply], None]


class CachedResults:
    """`Pipeline.call` with a memory.

    A request is remembered by all its inputs but the job id, so every change of any input makes
    another request. Answers from here say `cached` in `info`.
    """

    def __init__(
        self,
        call: _Call,
        store: RedisStore,
        digest: str,
        count: Callable[[str], None] = lambda result: None,
    ) -> None:
        """
        Args:
            call: the pipeline's own.
            store: where results are kept.
            digest: of everything but the inputs that a picture depends on.
            count: hears how each look-up went, see `RedisStore.get`.
        """
        self._call = call
        self._store = store
        self._digest = digest
        self._count = count
        self._threads = ThreadPoolExecutor(THREADS, "result-cache")

    def call(self, inputs: Mapping[str, np.ndarray], reply: _Reply) -> None:
        """See `Pipeline.call`. Never blocks."""
        key = self._key(inputs)
        if key is None:
            self._call(inputs, reply)
        else:
            self._threads.submit(self._answer, key, inputs, reply)

    def close(self) -> None:
        """End the threads; look-ups that wait are answered first."""
        self._threads.shutdown()
        self._store.close()

    def _answer(self, key: str, inputs: Mapping[str, np.ndarray], reply: _Reply) -> None:
        started = time.monotonic()
        try:
            result, tensors, info = self._store.get(key)
            self._count(result)
        except Exception:
            log.exception("the result cache failed and is passed by")
            result = "error"
        if result == "hit":
            ms = round((time.monotonic() - started) * 1e3, 3)
            job_id = _text(inputs, "job_id") or secrets.token_urlsafe(16)
            told = {**info, "job_id": job_id, "milliseconds": {"cache": ms, "total": ms}}
            latents = torch.from_numpy(tensors["latents"])
            reply(Result(tensors.get("images"), latents, {**told, "cached": True}))
            return

        def keep(outcome: Result | dict | PipelineError) -> None:
            reply(outcome)
            if isinstance(outcome, Result):
                found = {"latents": outcome.latents.detach().float().cpu().numpy()}
                if outcome.images is not None:
                    found["images"] = np.asarray(outcome.images)
                self._store.put(key, found, outcome.info)

        try:
            self._call(inputs, keep)
        except Exception as error:  # on a pool's thread nobody else would hear of it
            log.exception("a request could not be taken")
            reply(PipelineError(f"the server failed on this request: {type(error).__name__}"))

    def _key(self, inputs: Mapping[str, np.ndarray]) -> str | None:
        """None for what is no repeatable picture: control calls, and pictures without a seed."""
        job_id = _text(inputs, "job_id")
        if "seed" not in inputs or len(job_id) > 128 or not job_id.isprintable():
            return None
        if _text(inputs, "op") not in ("", "generate"):
            return None
        digest = hashlib.sha256(self._digest.encode())
        for name, array in sorted(inputs.items()):
            if name == "job_id":
                continue
            is_text = array.dtype == object
            parts = [bytes(item) for item in array.reshape(-1)] if is_text else [array.tobytes()]
            head = f"\0{name}\0{array.dtype}\0{array.shape}\0{[len(part) for part in parts]}\0"
            digest.update(head.encode())
            for part in parts:
                digest.update(part)
        return digest.hexdigest()


def _text(inputs: Mapping[str, np.ndarray], name: str) -> str:
    if name not in inputs:
        return ""
    return bytes(inputs[name].reshape(-1)[0]).decode("utf-8", "replace")


def results_from_environment(
    call: _Call, digest: str, count: Callable[[str], None]
) -> CachedResults | None:
    """The cache, where FULLPIPE_RESULT_CACHE is 1 and FULLPIPE_CACHE_URL names a Redis."""
    if os.environ.get(VARIABLE) != "1":
        return None
    store = store_from_environment(
        "fullpipe:result:", os.environ, timeout_s=TIMEOUT_S, max_bytes=MAX_BYTES
    )
    return None if store is None else CachedResults(call, store, digest, count)
