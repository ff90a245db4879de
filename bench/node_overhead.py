"""What the node adds to a bare tritonclient call, for one picture of 1024×1024.

The number matters because the node must not be the reason to send requests by hand: at most 15 ms.
The server is a real Triton whose pipeline answers at once with a fixed picture, so that nothing
hides the difference. The node runs as ComfyUI runs it, in ComfyUI's own modules: request, thread,
progress bar, answer, and the conversion to ComfyUI's floating-point IMAGE. The ways take turns.

Also: how much later ComfyUI answers after its start with the pack, while no server is there.

    python -m bench.node_overhead [--count 40] [--starts 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.record import spread, store
from fullpipe import contract
from fullpipe.server import ServerConfig, TritonServer

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "parity")]

from comfy_server import ComfyServer, install_server_packages  # noqa: E402
from comfyui import install  # noqa: E402

SIDE_PX = 1024
PIPELINE = "full_pipeline"
NOBODY = "http://127.0.0.1:9"

MODEL = f"""
import json
import numpy as np
import triton_python_backend_utils as pb_utils

PIXELS = np.random.default_rng(0).integers(0, 256, (1, {SIDE_PX}, {SIDE_PX}, 3), dtype=np.uint8)


class TritonPythonModel:
    def execute(self, requests):
        outputs = [
            pb_utils.Tensor("image", np.array([], dtype=object)),
            pb_utils.Tensor("images", PIXELS),
            pb_utils.Tensor("info", np.array([b"{{}}"], dtype=object)),
        ]
        return [pb_utils.InferenceResponse(outputs) for _ in requests]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--starts", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        write_model(repository)
        ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
        with TritonServer(ServerConfig(repository, **ports, log_level="error")) as server:
            seconds = time_nodes(server.url, arguments.count)
        starts = time_starts(Path(folder), arguments.starts)
    bare = spread(seconds["bare"])
    result: dict[str, Any] = {"picture": f"{SIDE_PX}x{SIDE_PX}, raw", "bare": bare}
    for way in ("shared memory", "binary"):
        # Of the same turn, so that what disturbs a turn disturbs both.
        added = [node - call for node, call in zip(seconds[way], seconds["bare"], strict=True)]
        result[way] = {
            **spread(seconds[way]),
            "over_bare_p50_ms": round(statistics.median(added) * 1e3, 1),
        }
    result["start_of_comfyui_s"] = starts
    store("node_overhead", result)


def write_model(repository: Path) -> None:
    """A pipeline that answers at once, described as a real one is."""

    def declare(tensors) -> str:
        entries = [
            f'{{ name: "{tensor.name}" data_type: TYPE_{tensor.dtype} dims: {list(tensor.dims)}'
            for tensor in tensors
        ]
        return ", ".join(entries)

    version = repository / PIPELINE / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(MODEL)
    inputs = declare(contract.PICTURE_INPUTS).replace("{ name", "{ optional: true name")
    facts = json.dumps({"scheduler_model": PIPELINE}).replace('"', '\\"')
    config = [
        f'name: "{PIPELINE}" backend: "python"',
        f"input [ {inputs.replace(', {', ' }, {')} }} ]",
        f"output [ {declare(contract.PICTURE_OUTPUTS).replace(', {', ' }, {')} }} ]",
        f'parameters {{ key: "fullpipe_pipeline" value {{ string_value: "{facts}" }} }}',
    ]
    (repository / PIPELINE / "config.pbtxt").write_text("\n".join(config))


def time_nodes(url: str, count: int) -> dict[str, list[float]]:
    """Seconds of each way in each turn, measured in a process with ComfyUI's modules."""
    comfyui = install()
    packages = str(install_server_packages(comfyui.extra_packages.parent))
    script = Path(__file__).with_name("node_calls.py")
    process = comfyui.start(script, url, str(count), packages)
    output, _ = process.communicate(timeout=400)
    if process.returncode:
        raise RuntimeError(f"{script} failed: {output[-2000:]}")
    return json.loads(output.splitlines()[-1])


def time_starts(folder: Path, count: int) -> dict[str, Any]:
    """Seconds from ComfyUI's start to its first answer, without the pack and with it."""
    packs = {"without": {}, "with": {"triton-full-pipeline": ROOT / "client_nodes"}}
    seconds: dict[str, list[float]] = {name: [] for name in packs}
    for turn in range(count):
        for name, nodes in packs.items():
            environment = {"FULLPIPE_URL": NOBODY, "FULLPIPE_COMFYUI_CONFIG": f"{folder}/none.json"}
            comfy = ComfyServer(folder / f"{name}{turn}", nodes, environment)
            started = time.perf_counter()
            with comfy:
                comfy.call("/object_info")
                seconds[name].append(time.perf_counter() - started)
    medians = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    return {**medians, "more": round(medians["with"] - medians["without"], 2)}


if __name__ == "__main__":
    main()
