"""`make demo`: assemble the demo pipeline, serve it, make one picture, say how long each part took.

python -m demo.run [PROMPT] [-o out/demo.png]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from fullpipe.assemble import assemble
from fullpipe.client import Client
from fullpipe.errors import PipelineError
from fullpipe.serve import curl_line
from fullpipe.server import ServerConfig, TritonServer

CHECKPOINT = Path(__file__).parent / "checkpoint"
STAGES = {
    "text": "text encoder",
    "queue": "waiting for a slot",
    "loop": "denoising loop",
    "vae_decode": "VAE decoder",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="a red circle on a white background")
    parser.add_argument("-o", "--output", type=Path, default=Path("out") / "demo.png")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    try:
        run(arguments.prompt, arguments.output, arguments.seed)
    except PipelineError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def run(prompt: str, output: Path, seed: int) -> None:
    """Serve the demo checkpoint for as long as one request takes."""
    with tempfile.TemporaryDirectory(prefix="fullpipe-demo-") as folder:
        repository = Path(folder) / "repository"
        print("assembling a model repository from demo/checkpoint", flush=True)
        assemble(CHECKPOINT, repository)
        settings = ServerConfig(
            repository, http_port=0, grpc_port=0, metrics_port=0, log_level="error"
        )
        print("starting Triton Inference Server", flush=True)
        started = time.monotonic()
        with TritonServer(settings) as server:
            print(f"ready after {time.monotonic() - started:.1f} s at {server.url}", flush=True)
            asked = time.monotonic()
            picture = Client(server.url).generate(prompt, seed=seed, output_format="png")
            seconds = time.monotonic() - asked
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_bytes(picture.encoded[0])
            show(prompt, output, picture.info, seconds)


def show(prompt: str, output: Path, info: dict, seconds: float) -> None:
    """Where the picture is and where its time went."""
    print(f"\n{prompt!r}, seed {info['seed']}, {info['steps']} steps of {info['sampler_name']}")
    milliseconds = info["milliseconds"]
    for stage, words in STAGES.items():
        print(f"  {words:<22}{milliseconds[stage]:8.1f} ms")
    print(f"  {'PNG, HTTP and Triton':<22}{1e3 * seconds - milliseconds['total']:8.1f} ms")
    print(f"  {'the whole request':<22}{1e3 * seconds:8.1f} ms")
    print(f"\nthe picture: {output.resolve()}")
    print("\nto keep a server: .venv/bin/fullpipe serve, and then")
    print(curl_line("http://127.0.0.1:8000", "full_pipeline"))


if __name__ == "__main__":
    sys.exit(main())
