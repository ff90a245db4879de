"""The measured part of `bench.node_overhead`, in a process that may import ComfyUI's modules.

Arguments: the server's URL, how many turns, a folder with more packages. Prints one JSON document.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(sys.argv[3])

import comfy.cli_args

comfy.cli_args.args.cpu = True

import numpy as np  # noqa: E402
import tritonclient.http as triton  # noqa: E402

NODES = Path(__file__).parents[1] / "client_nodes"
INPUTS: dict[str, Any] = {
    "prompt": "a red circle",
    "negative_prompt": "",
    "seed": 7,
    "steps": 20,
    "cfg": 8.0,
    "sampler_name": "euler",
    "scheduler": "normal",
    "denoise": 1.0,
    "width": 1024,
    "height": 1024,
    "batch_size": 1,
}
TYPES = {int: np.int32, float: np.float32}


def main() -> None:
    """Take turns; the first ones warm up."""
    url, count = sys.argv[1], int(sys.argv[2])
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    config = folder / f"node_calls_{os.getpid()}.json"
    plain = {"url": url, "shared_memory": "off"}
    config.write_text(json.dumps({"servers": {"default": {"url": url}, "plain": plain}}))
    os.environ["FULLPIPE_COMFYUI_CONFIG"] = str(config)
    try:
        print(json.dumps(measure(url, count)))
    finally:
        config.unlink()


def measure(url: str, count: int) -> dict[str, list[float]]:
    """Seconds of each way in each turn."""
    pack = load_pack()
    from triton_nodes.node_pipeline import TritonFullPipeline
    from triton_nodes.settings import Choice

    assert pack
    node = TritonFullPipeline.PREPARE_CLASS_CLONE({})
    seconds: dict[str, list[float]] = {"bare": [], "shared memory": [], "binary": []}
    with triton.InferenceServerClient(url.split("://")[1]) as client:
        ways = {
            "bare": lambda seed: bare(client, seed),
            "shared memory": lambda seed: through_node(node, Choice(), seed),
            "binary": lambda seed: through_node(node, Choice("plain"), seed),
        }
        for turn in range(count + 3):
            for way, make in ways.items():
                started = time.perf_counter()
                make(turn)
                if turn >= 3:
                    seconds[way].append(time.perf_counter() - started)
    return seconds


def load_pack() -> Any:
    """Import the pack as ComfyUI does, under a name of our choice."""
    spec = importlib.util.spec_from_file_location("triton_nodes", NODES / "__init__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["triton_nodes"] = module
    spec.loader.exec_module(module)
    return module


def bare(client: triton.InferenceServerClient, seed: int) -> None:
    """What tritonclient alone takes, on a connection that stays open, to the array of pixels."""
    tensors = []
    for name, value in {**INPUTS, "seed": seed, "output_format": "raw"}.items():
        if isinstance(value, str):
            array, datatype = np.array([value.encode()], dtype=object), "BYTES"
        else:
            array = np.array([value], dtype=np.uint64 if name == "seed" else TYPES[type(value)])
            datatype = {"u": "UINT64", "i": "INT32", "f": "FP32"}[array.dtype.kind]
        tensors.append(triton.InferInput(name, [1], datatype))
        tensors[-1].set_data_from_numpy(array)
    outputs = [triton.InferRequestedOutput("images")]
    pixels = client.infer("full_pipeline", tensors, outputs=outputs).as_numpy("images")
    assert pixels.shape == (1, 1024, 1024, 3)


def through_node(node: Any, choice: Any, seed: int) -> None:
    """What the node takes, to ComfyUI's IMAGE."""
    given = {key: value for key, value in INPUTS.items() if "prompt" not in key}
    given |= {"seed": seed, "positive": INPUTS["prompt"], "negative": "", "preview": False}
    output = asyncio.run(node.execute("full_pipeline", **given, server=choice))
    assert tuple(output.args[0].shape) == (1, 1024, 1024, 3)


if __name__ == "__main__":
    main()
