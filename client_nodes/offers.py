"""What the configured servers offer, kept up to date in the background.

Combos are filled from here and never wait for a network. ComfyUI asks for all node definitions when
a page loads and when somebody presses R; a middleware lets that request, and nothing else, wait for
fresh answers, for a moment and without blocking ComfyUI's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .endpoint import Endpoint, Session
from .errors import Refused, TritonError
from .settings import DEFAULT, Choice, Server, Settings
from .triton import model_path

log = logging.getLogger(__name__)

FACTS_PARAMETER = "fullpipe_pipeline"
PLAIN_NAME = "full_pipeline"
# How long a page may wait for servers that do not answer.
PATIENCE_S = 1.0
ASK_TIMEOUT_S = 3.0


@dataclasses.dataclass(frozen=True)
class Facts:
    """One pipeline of one server, as the server itself describes it.

    Attributes:
        document: samplers, schedulers, defaults, limits, checkpoint, models, …; empty where a
            gateway hides it, names and limits are then taken for granted.
    """

    pipeline: str
    document: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def stream(self) -> str:
        """Name of the model that streams."""
        return self.document.get("stream") or f"{self.pipeline}_stream"

    def model(self, part: str) -> str:
        """Name of a part, such as scheduler_model or text_encoder."""
        if part == "scheduler_model" and self.document.get("scheduler_model"):
            return self.document["scheduler_model"]
        known = (self.document.get("models") or {}).get(part)
        return known or (part if self.pipeline == PLAIN_NAME else f"{self.pipeline}_{part}")

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent pixel along one axis."""
        return (self.document.get("network") or {}).get("vae_scale_factor", 8)

    @property
    def version(self) -> tuple[Any, ...]:
        """What makes a picture another one though the request is the same."""
        return self.document.get("checkpoint"), self.document.get("version")


class Offers:
    """The pipelines of all configured servers."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._guard = threading.Lock()
        self._refreshing = threading.Lock()
        self._facts: dict[tuple[str, str], Facts] = {}
        self._fallbacks = 0

    def refresh(self) -> None:
        """Ask every server; what cannot be reached keeps what was known of it."""
        with self._refreshing:
            try:
                servers = list(self._settings.servers().values())
            except Refused as error:
                log.warning("%s", error)
                return
            with ThreadPoolExecutor(max(1, len(servers))) as threads:
                list(threads.map(self._refresh_one, servers))

    def refresh_in_background(self) -> None:
        """The same, without waiting."""
        threading.Thread(target=self.refresh, name="fullpipe-offers", daemon=True).start()

    def pipelines(self) -> list[str]:
        """Names for a combo; never empty, so that a workflow can be built without a server."""
        with self._guard:
            names = {facts.pipeline for facts in self._facts.values()}
        return sorted(names, key=lambda name: (name != PLAIN_NAME, name)) or [PLAIN_NAME]

    def union(self, key: str, otherwise: Iterable[str]) -> list[str]:
        """Samplers or schedulers of all pipelines, in the servers' order.

        Args:
            otherwise: what to offer while nothing is known.
        """
        with self._guard:
            lists = [facts.document.get(key) or [] for facts in self._facts.values()]
        found = list(dict.fromkeys(name for names in lists for name in names))
        return found or list(otherwise)

    def default(self, key: str, otherwise: Any) -> Any:
        """The first pipeline's default of an input."""
        with self._guard:
            for facts in self._facts.values():
                if key in facts.document.get("defaults", {}):
                    return facts.document["defaults"][key]
        return otherwise

    def known(self, server: str, pipeline: str) -> Facts | None:
        """What is known of a pipeline without asking; None: nothing."""
        with self._guard:
            return self._facts.get((server, pipeline))

    def complaint(self, pipeline: str, choices: dict[str, str]) -> str | None:
        """Why a value of a combo cannot work on the default server, as far as that is known.

        Args:
            choices: values by the fact that lists them, such as {"samplers": "euler"}.
        """
        with self._guard:
            mine = {
                name: facts for (server, name), facts in self._facts.items() if server == DEFAULT
            }
        if not mine:
            return None
        if pipeline not in mine:
            return f"pipeline {pipeline!r} is not on the server; it offers: {', '.join(mine)}"
        for key, value in choices.items():
            offered = mine[pipeline].document.get(key)
            if offered and value not in offered:
                return f"{value!r} is none of the {key} of {pipeline}: {', '.join(offered)}"
        return None

    def fingerprint(self, pipeline: str) -> str:
        """Changes when the same request to this pipeline may give another picture."""
        with self._guard:
            versions = [
                (server, facts.version)
                for (server, name), facts in self._facts.items()
                if name == pipeline
            ]
            return f"{sorted(versions, key=repr)} {self._fallbacks}"

    def fell_back(self) -> None:
        """A picture came from elsewhere: the next run must ask the server again."""
        with self._guard:
            self._fallbacks += 1

    def facts(self, server: Server, choice: Choice | None, pipeline: str) -> Facts:
        """What is known of a pipeline, asking the server if need be; blocks.

        Raises:
            TritonError: the server cannot be reached, or does not serve the pipeline.
        """
        key = (server.url if choice and choice.address else server.name, pipeline)
        known = self.known(*key)
        if known is None:
            known = read_facts(Endpoint(server), pipeline)
            with self._guard:
                self._facts[key] = known
        return known

    def _refresh_one(self, server: Server) -> None:
        try:
            found = read_pipelines(Endpoint(server))
        except TritonError as error:
            log.info("%s", error)
            return
        with self._guard:
            others = {key: facts for key, facts in self._facts.items() if key[0] != server.name}
            mine = {(server.name, facts.pipeline): facts for facts in found}
            # The default server's come first in every combo.
            self._facts = {**mine, **others} if server.name == DEFAULT else {**others, **mine}


def read_pipelines(endpoint: Endpoint) -> list[Facts]:
    """The pipelines that a server offers now.

    Raises:
        TritonError: it does not answer.
    """
    session = Session(endpoint, ASK_TIMEOUT_S)
    try:
        answer = session.ask("the list of models", "/v2/repository/index", b"{}")
        if answer.status in (401, 403, 404, 405):  # a gateway that hides the list
            names = list(endpoint.server.pipelines)
        else:
            entries = endpoint.document(answer, "the list of models")
            names = [entry["name"] for entry in entries if entry.get("state") == "READY"]
        found = []
        for name in sorted(set(names)):
            with contextlib.suppress(Refused):
                facts = _read_facts(endpoint, session, name)
                if facts.document or answer.status != 200:
                    found.append(facts)
        return found
    finally:
        session.close()


def read_facts(endpoint: Endpoint, pipeline: str) -> Facts:
    """What a server says of one pipeline; raises TritonError."""
    session = Session(endpoint, ASK_TIMEOUT_S)
    try:
        return _read_facts(endpoint, session, pipeline)
    finally:
        session.close()


def _read_facts(endpoint: Endpoint, session: Session, name: str) -> Facts:
    what = f"model {name!r}"
    answer = session.ask(what, f"{model_path(name)}/config", None)
    if answer.status in (403, 405):
        return Facts(name)
    config = endpoint.document(answer, what)
    parameter = config.get("parameters", {}).get(FACTS_PARAMETER)
    return Facts(name, json.loads(parameter["string_value"]) if parameter else {})


def refresh_with_node_definitions(offers: Offers) -> None:
    """Have ComfyUI's /object_info wait for fresh offers, which is what makes the R key refresh."""
    from aiohttp import web
    from server import PromptServer

    @web.middleware
    async def refresh_first(request: web.Request, handler: Any) -> Any:
        if request.path.removeprefix("/api") == "/object_info":
            fresh = asyncio.get_running_loop().run_in_executor(None, offers.refresh)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(fresh), PATIENCE_S)
        return await handler(request)

    PromptServer.instance.app.middlewares.append(refresh_first)
