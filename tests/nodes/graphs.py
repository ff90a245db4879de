"""Workflows in ComfyUI's API format, and what ComfyUI tells while they run."""

from __future__ import annotations

import io
import json
import time
import uuid
from typing import Any

import numpy as np
from comfy_server import ComfyServer
from PIL import Image
from websocket import WebSocketTimeoutException, create_connection

PROMPT = "a red circle on a white background"
SMALL = {"steps": 8, "cfg": 4.0, "seed": 7}
SILENCE_S = 180
ENDS = ("execution_success", "execution_error", "execution_interrupted")


class Graph:
    """Nodes, numbered as they are added."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}

    def add(self, class_type: str, **inputs: Any) -> str:
        """Add a node; returns its id. A link is [id, output]."""
        self.nodes[str(len(self.nodes) + 1)] = {"class_type": class_type, "inputs": inputs}
        return str(len(self.nodes))

    def save(self, node: str, output: int = 0) -> dict[str, Any]:
        """Save a node's pictures; returns the finished workflow."""
        self.add("SaveImage", images=[node, output], filename_prefix="nodes")
        return self.nodes


def pipeline_inputs(**changed: Any) -> dict[str, Any]:
    """All required inputs of Triton Full Pipeline."""
    return {
        "pipeline": "full_pipeline",
        "positive": PROMPT,
        "negative": "",
        **SMALL,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
        "width": 128,
        "height": 128,
        "batch_size": 1,
        "preview": True,
        "clip_skip": 0,
        "with_latent": False,
        "fallback_checkpoint": "none",
        **changed,
    }


def full_pipeline(server: str | None = None, **changed: Any) -> dict[str, Any]:
    """Triton Full Pipeline and SaveImage; with a server, Triton Server before it."""
    graph = Graph()
    if server:
        changed["server"] = [graph.add("TritonServer", **server_inputs(server)), 0]
    return graph.save(graph.add("TritonFullPipeline", **pipeline_inputs(**changed)))


def server_inputs(name: str, **changed: Any) -> dict[str, Any]:
    """All inputs of Triton Server."""
    patience = {"connect_timeout_s": 0.0, "read_timeout_s": 0.0, "retries": -1}
    return {"name": name, "address": "", **patience, **changed}


def node_of(graph: dict[str, Any], class_type: str) -> str:
    """Id of the first node of a type."""
    return next(key for key, node in graph.items() if node["class_type"] == class_type)


class Run:
    """One workflow in a ComfyUI, watched through the websocket as its web page does."""

    def __init__(self, comfy: ComfyServer, graph: dict[str, Any]):
        self._comfy = comfy
        client = uuid.uuid4().hex
        self._socket = create_connection(
            f"{comfy.url.replace('http', 'ws')}/ws?clientId={client}", timeout=SILENCE_S
        )
        self.events: list[dict[str, Any]] = []
        self.previews: list[Image.Image] = []
        self.outputs: dict[str, Any] = {}
        self.started = time.monotonic()
        self.prompt_id = comfy.start(graph, client)

    def until(self, kind: str, count: int = 1) -> None:
        """Read events until so many of a kind came."""
        while sum(event["type"] == kind for event in self.events) < count:
            assert not self._is_over, f"no {kind}, but {self.events[-1]}"
            self._read()

    def finish(self) -> dict[str, Any]:
        """Read on to the end, whatever it is; returns the last event."""
        while not self._is_over:
            self._read()
        self.outputs = self._comfy.finish(self.prompt_id)["outputs"]
        self._socket.close()
        return self.events[-1]

    def succeed(self) -> Run:
        """Read on to the end, which must be a success."""
        last = self.finish()
        assert last["type"] == "execution_success", last["data"].get("exception_message", last)
        return self

    def fail(self) -> str:
        """Read on to the end, which must be an error; returns its message."""
        last = self.finish()
        assert last["type"] == "execution_error", last
        return last["data"]["exception_message"].strip()

    @property
    def seconds(self) -> float:
        """From the start to the last event."""
        return self.events[-1]["at"] - self.started

    def texts(self) -> list[str]:
        """Lines that were shown at nodes."""
        return [event["data"]["text"] for event in self.events if event["type"] == "text"]

    def steps(self, node: str) -> list[tuple[int, int]]:
        """Progress that was shown at a node: (value, max)."""
        return [
            (event["data"]["value"], event["data"]["max"])
            for event in self.events
            if event["type"] == "progress" and event["data"]["node"] == node
        ]

    def pixels(self) -> np.ndarray:
        """[N, H, W, 3] uint8: the files that SaveImage wrote, in the order of the nodes."""
        nodes = sorted(self.outputs, key=int)
        saved = [image for node in nodes for image in self.outputs[node].get("images", [])]
        files = [self._comfy.base / "output" / image["filename"] for image in saved]
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])

    @property
    def _is_over(self) -> bool:
        return bool(self.events) and self.events[-1]["type"] in ENDS

    def _read(self) -> None:
        try:
            message = self._socket.recv()
        except WebSocketTimeoutException:
            raise AssertionError(f"nothing for {SILENCE_S} s after {self.events[-3:]}") from None
        if isinstance(message, bytes):
            self._read_binary(message)
            return
        event = json.loads(message)
        if event["type"] != "status":
            self.events.append({**event, "at": time.monotonic()})

    def _read_binary(self, message: bytes) -> None:
        kind = int.from_bytes(message[:4], "big")
        if kind == 1:  # a preview: its type, then the file
            self.previews.append(Image.open(io.BytesIO(message[8:])))
        elif kind == 3:  # text at a node: the length of its id, the id, the text
            length = int.from_bytes(message[4:8], "big")
            node, text = message[8 : 8 + length], message[8 + length :]
            data = {"node": node.decode(), "text": text.decode()}
            self.events.append({"type": "text", "data": data, "at": time.monotonic()})
