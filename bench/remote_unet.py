"""One request for the whole picture against one request per step, over a network with a delay.

The number matters because it is why this project keeps the denoising loop on the server: whoever
sends every step through the network waits for the network at every step. A real ComfyUI runs both
ways against the same served checkpoint; the proxy of `bench/network.py` delays each way of the
traffic and counts it. Bandwidth is not limited, and the demo checkpoint's tensors are small, so the
difference is delay alone; `bytes` says what a narrow line would have to carry.

    python -m bench.remote_unet [--delays 0 10 50 100] [--steps 20 50] [--rounds 1]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench import tables
from bench.network import Network
from bench.record import store
from bench.served import served_demo
from fullpipe.assemble import Choices
from fullpipe.config import LoopSettings

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "parity")]

from comfy_server import ComfyServer  # noqa: E402

PROMPT = "a blue star on a yellow background"
SIZE = {"width": 256, "height": 256, "batch_size": 1}
PIPELINE = {"pipeline": "full_pipeline"}
WAYS = {
    "one request": "Triton Full Pipeline",
    "one request, with previews": "Triton Full Pipeline, every step shown",
    "one request per step": "Triton Remote UNet with ComfyUI's KSampler",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 10, 50, 100], help="ms")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    # The UNet is a Triton model for both, so that the network is all that differs.
    choices = Choices(loop=LoopSettings(unet="bls"))
    with served_demo(choices) as (triton, _), tempfile.TemporaryDirectory() as folder:
        parts = urlsplit(triton.url)
        with Network(parts.hostname or "", parts.port or 0) as network:
            comfy = ComfyServer(
                Path(folder),
                {"triton-full-pipeline": ROOT / "client_nodes"},
                {"FULLPIPE_URL": network.url, "FULLPIPE_COMFYUI_CONFIG": f"{folder}/servers.json"},
            )
            # As over a real network, where memory cannot be shared.
            (Path(folder) / "servers.json").write_text(
                '{"servers": {"default": {"shared_memory": "off"}}}'
            )
            with comfy:
                rows = measure(comfy, network, arguments)
    result = {"picture": "256x256, euler, cfg 4", "ways": WAYS, "table": summarise(rows)}
    print(tables.remote_unet(result))
    store("remote_unet", {**result, "headline": headline(result["table"])})


def measure(
    comfy: ComfyServer, network: Network, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One picture of each way, delay and number of steps in each round."""
    rows = []
    for way in WAYS:
        run(comfy, way, steps=2, seed=1)  # warm
    for number in range(arguments.rounds):
        for delay_ms in arguments.delays:
            for steps in arguments.steps:
                for way in WAYS:
                    network.restore()
                    network.delay_s = delay_ms / 1000
                    seconds = run(comfy, way, steps, seed=1000 + len(rows) + number)
                    traffic = network.traffic
                    rows.append(
                        {
                            "way": way,
                            "delay_ms": delay_ms,
                            "steps": steps,
                            "seconds": seconds,
                            "round_trips": traffic.round_trips,
                            "sent_bytes": traffic.sent_bytes,
                            "received_bytes": traffic.received_bytes,
                        }
                    )
                    print(rows[-1], flush=True)
    return rows


def run(comfy: ComfyServer, way: str, steps: int, seed: int) -> float:
    """Seconds from ComfyUI's start of the workflow to its end, the file of the picture included."""
    graph = per_step(steps, seed) if way == "one request per step" else whole(way, steps, seed)
    status = comfy.finish(comfy.start(graph))["status"]
    if status["status_str"] != "success":
        raise RuntimeError(str(status["messages"])[-1000:])
    at = {name: details["timestamp"] for name, details in status["messages"]}
    return (at["execution_success"] - at["execution_start"]) / 1000


def whole(way: str, steps: int, seed: int) -> dict[str, Any]:
    """Triton Full Pipeline."""
    inputs = {**PIPELINE, **SIZE, **sampling(steps, seed), "positive": PROMPT, "negative": ""}
    inputs |= {"preview": "previews" in way, "clip_skip": 0, "with_latent": False}
    inputs |= {"fallback_checkpoint": "none"}
    return {
        "1": {"class_type": "TritonFullPipeline", "inputs": inputs},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }


def per_step(steps: int, seed: int) -> dict[str, Any]:
    """ComfyUI's KSampler over Triton Remote UNet; text and VAE on the server too."""

    def text(prompt: str) -> dict[str, Any]:
        inputs = {**PIPELINE, "text": prompt, "clip_skip": 0}
        return {"class_type": "TritonCLIPTextEncode", "inputs": inputs}

    ends = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    return {
        "1": {"class_type": "TritonRemoteUNet", "inputs": PIPELINE},
        # Another prompt each time, or ComfyUI would not encode it again.
        "2": text(f"{PROMPT}, number {seed}"),
        "3": text(f"number {seed}"),
        "4": {"class_type": "EmptyLatentImage", "inputs": SIZE},
        "5": {"class_type": "KSampler", "inputs": {**ends, **sampling(steps, seed)}},
        "6": {"class_type": "TritonVAEDecode", "inputs": {**PIPELINE, "samples": ["5", 0]}},
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
    }


def sampling(steps: int, seed: int) -> dict[str, Any]:
    """What a KSampler is told."""
    names = {"sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "cfg": 4.0}
    return {"seed": seed, "steps": steps, **names}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The median of the rounds, and how much longer the way per step takes."""
    grouped: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["steps"], row["delay_ms"], row["way"]), []).append(row)
    table = []
    for (steps, delay_ms, _), group in sorted(grouped.items(), key=lambda item: item[0][:2]):
        newest = group[-1]
        one = [row["seconds"] for row in grouped[steps, delay_ms, "one request"]]
        seconds = statistics.median(row["seconds"] for row in group)
        table.append(
            {
                **newest,
                "seconds": round(seconds, 2),
                "times_one_request": round(seconds / statistics.median(one), 2),
            }
        )
    return table


def headline(table: list[dict[str, Any]]) -> dict[str, str]:
    """The case in the middle of the table, in words."""
    per_step = [row for row in table if row["way"] == "one request per step"]
    row = per_step[len(per_step) // 2 - 1] if len(per_step) > 1 else per_step[0]
    return {
        "what": "one request per step (Triton Remote UNet with ComfyUI's KSampler), against one"
        f" request; {row['steps']} steps, {row['delay_ms']} ms each way",
        "figure": f"{row['times_one_request']:.2f} × the time, {row['round_trips']} round trips",
    }


if __name__ == "__main__":
    main()
