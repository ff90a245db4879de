"""One checkpoint on a GPU: what the loop adds to the bare UNet, and how fast pictures come.

The numbers matter because speed is what people come for: they say how near a picture's time is to
that of its UNet calls alone, what sharing the GPU brings, and how long a server takes to start. All
phases run one after the other in one run, on the same weights, and answer with raw pixels over
HTTP. Without `--checkpoint` the weights are random, of the true architecture: as fast, no picture.

    python -m bench.gpu --family sd1 [--engine compiled] [--concurrency 16] [--count 32]
    python -m bench.gpu --family sdxl --buckets 2 4 8 --concurrency 8 [--keep FOLDER] [--build-only]
    python -m bench.gpu --family sdxl --buckets 2 4 8 --step-cache 2 --phases networks loop
    python -m bench.gpu --family sd1 --buckets 2 16 --device cuda:0,cuda:1 --phases loop
    python -m bench.gpu --family sd1 --buckets 2 16 --phases networks --cudnn-benchmark
    python -m bench.gpu --checkpoint demo/checkpoint --device cpu --engine torch --precision fp32
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from bench import rivals
from bench.fidelity import relative_errors, unet_inputs
from bench.headlines import GPU_WORDS
from bench.record import spread, store
from bench.served import load, prompts
from fullpipe.assemble import Choices, assemble
from fullpipe.client import Client
from fullpipe.config import LoopSettings, PipelineConfig
from fullpipe.engines import Engine
from fullpipe.engines.loading import load_unet
from fullpipe.server import ServerConfig, TritonServer

PHASES = ("networks", "loop", "rivals", "bls")


def main() -> None:
    parser = _options()
    arguments = parser.parse_args()
    if arguments.cudnn_benchmark and arguments.phases != ["networks"]:
        parser.error("--cudnn-benchmark is for --phases networks, which run in this process")
    torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
    loop = LoopSettings(
        device=arguments.device,
        engine=arguments.engine,
        precision=arguments.precision,
        buckets=arguments.buckets if arguments.engine != "torch" else [],
        max_rows=max(arguments.buckets),
        vae=arguments.vae,
        step_cache=arguments.step_cache > 1,
    )
    plain = what = "gpu" if arguments.checkpoint else f"gpu_{arguments.family}"
    if len(loop.devices) > 1:
        what += f"_{len(loop.devices)}_devices"
    if loop.step_cache:
        what += "_step_cache"
    if arguments.cudnn_benchmark:
        what += "_cudnn_benchmark"
    result: dict = {
        "request": f"native size, {arguments.steps} steps, euler, cfg {arguments.cfg:g}, raw",
        "settings": dataclasses.asdict(loop),
        "device": _device_name(loop.devices),
    }
    with _folder(arguments.keep) as folder:
        checkpoint = arguments.checkpoint or _random_checkpoint(
            arguments.family, loop.devices[0], folder
        )
        repositories = {
            "loop": loop,
            # Told apart by its milliseconds a step; one picture needs one size.
            "bls": dataclasses.replace(
                loop, unet="bls", buckets=loop.buckets[:1], step_cache=False
            ),
            "one_device": dataclasses.replace(loop, device=loop.devices[0]),
        }
        names = list(arguments.phases)
        if len(loop.devices) > 1 and "loop" in names:
            names.insert(names.index("loop") + 1, "one_device")
        for where, settings in repositories.items():
            if where in names or (where == "loop" and "networks" in names):
                result[where] = {"assemble_s": _assembled(checkpoint, folder / where, settings)}
        if arguments.build_only:
            return
        phases: dict[str, Callable[[], dict]] = {
            "networks": lambda: _networks(folder / "loop", arguments.buckets),
            "loop": lambda: _served(folder / "loop", arguments, is_whole=True),
            "cached": lambda: _served(
                folder / "loop", arguments, is_whole=True, step_cache=arguments.step_cache
            ),
            "one_device": lambda: _served(
                folder / "one_device",
                arguments,
                is_whole=True,
                concurrency=arguments.concurrency // len(loop.devices),
            ),
            "rivals": lambda: rivals.compare(checkpoint, arguments),
            "bls": lambda: _served(folder / "bls", arguments, is_whole=False),
        }
        if loop.step_cache and "loop" in names:
            result["cached"] = {"step_cache": arguments.step_cache}
            names.insert(names.index("loop") + 1, "cached")
        for name in names:
            started = time.perf_counter()
            try:
                measured = phases[name]()
            except Exception as error:  # the other phases are worth their time all the same
                traceback.print_exc()
                measured = {"error": f"{type(error).__name__}: {error}"}
            result[name] = result.get(name, {}) | measured
            seconds = time.perf_counter() - started
            print(f"{name}, {seconds:.0f} s:", json.dumps(result[name]), flush=True)
    _add_ratios(result, arguments.steps, GPU_WORDS[plain])
    store(what, result, "gpu")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=("sd1", "sdxl"), default="sd1")
    parser.add_argument("--checkpoint", type=Path, help="instead of random weights")
    parser.add_argument("--device", default="cuda", help="several, as in cuda:0,cuda:1, for `loop`")
    parser.add_argument("--engine", default="compiled")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--buckets", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--vae", choices=("bls", "loop"), default="bls")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=7.0)
    parser.add_argument(
        "--step-cache", type=int, default=1, metavar="N", help="above 1 `loop` is served so too"
    )
    parser.add_argument(
        "--cudnn-benchmark",
        action="store_true",
        help="convolutions that cuDNN chooses by measuring, for `networks` alone",
    )
    parser.add_argument("--count", type=int, default=32, help="requests of a phase")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--keep", type=Path, help="build there, or take what is built there")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--build-only", action="store_true", help="end when all is built")
    rivals.add_options(parser)
    return parser


def _add_ratios(result: dict, steps: int, words: str) -> None:
    """What the phases that were run say of each other; `words`: whose pictures these are."""
    served = result.get("loop", {})
    one, together = served.get("one_at_a_time"), served.get("together")
    if one and "bare_unet" in result.get("networks", {}):
        bare_ms = steps * result["networks"]["bare_unet"]["2"]["ms"]
        result["loop_over_bare_unet"] = round(one["stages_ms"]["loop"] / bare_ms, 3)
    if one and together:
        result["together_over_one"] = _throughput_ratio(together, one)
    alone = result.get("one_device", {}).get("together")
    if together and alone:
        over_one = result["devices_over_one"] = _throughput_ratio(together, alone)
        result["headline"] = {
            "what": f"{words} on {result['device']} behind one queue,"
            f" {together['concurrency']} at a time, against one with {alone['concurrency']}:"
            f" {result['request']}",
            "figure": f"{together['images_per_second']:.1f} pictures a second, {over_one:.2f} ×",
        }


def _throughput_ratio(way: dict, other: dict) -> float:
    return round(way["images_per_second"] / other["images_per_second"], 3)


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as name:
        yield Path(name)


def _assembled(checkpoint: Path, repository: Path, loop: LoopSettings) -> float:
    """Assemble unless it is there; the seconds that it took, which are kept beside it."""
    note = repository.with_suffix(".seconds")
    if not note.exists():
        started = time.perf_counter()
        assemble(checkpoint, repository, Choices(loop=loop), report=print)
        note.write_text(f"{time.perf_counter() - started:.1f}")
    return float(note.read_text())


def _networks(repository: Path, rows: list[int]) -> dict:
    """Errors against fp32, and the UNet alone; in this process, which frees its memory again."""
    folder = repository / "scheduler_model" / "1"
    config = PipelineConfig.load(folder / "pipeline.json")
    device = config.loop.devices[0]
    started = time.perf_counter()
    unet = load_unet(folder / "unet", config, device)
    measured = {
        "load_unet_s": round(time.perf_counter() - started, 1),
        "bare_unet": _bare_unet(unet, config, rows),
        "relative_error": relative_errors(repository, unet, config),
    }
    if unet.has_shallow_pass:
        measured["bare_shallow_unet"] = _bare_unet(unet, config, rows, is_shallow=True)
    del unet
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return measured


def _bare_unet(
    unet: Engine, config: PipelineConfig, rows: list[int], *, is_shallow: bool = False
) -> dict:
    """Median milliseconds of UNet calls alone, as a recorded graph where there is a GPU."""
    device = config.loop.devices[0]
    measured = {}
    for count in rows:
        inputs = unet_inputs(config, count, device)
        if is_shallow:
            inputs["deep"] = unet.run(inputs)["deep"].clone()
        milliseconds = _time(lambda inputs=inputs: unet.run(inputs), device)
        measured[str(count)] = {"ms": round(milliseconds, 3)}
    return measured


def _time(run: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Median of single calls; CUDA events around the replays of a graph."""
    if torch.device(device).type != "cuda":
        run()
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return float(np.median(seconds)) * 1e3
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return float(np.median(times))


def _served(
    repository: Path,
    arguments: argparse.Namespace,
    *,
    is_whole: bool,
    step_cache: int = 1,
    concurrency: int | None = None,
) -> dict:
    """Start, one at a time, and together; the last only where `is_whole`."""
    concurrency = concurrency or arguments.concurrency
    captions, seeds = prompts(), itertools.count()
    settings = ServerConfig(repository, http_port=0, grpc_port=0, metrics_port=0, log_level="error")
    started = time.perf_counter()
    stages = _Stages()
    with TritonServer(settings) as server:
        ready_s = time.perf_counter() - started
        client = Client(server.url)

        def make(_: int) -> object:
            picture = client.generate(
                next(captions),
                seed=next(seeds),
                steps=arguments.steps,
                cfg=arguments.cfg,
                step_cache=step_cache,
                output_format="raw",
            )
            stages.add(picture.info)
            return picture

        load(make, 3, 1)
        stages.clear()
        passed, seconds, _ = load(make, arguments.count, 1)
        measured = {
            "ready_s": round(ready_s, 1),
            "one_at_a_time": {
                "images_per_second": round(arguments.count / passed, 3),
                **spread(seconds),
                "stages_ms": stages.medians(),
                "loop_ms_per_step": round(stages.medians()["loop"] / arguments.steps, 3),
            },
        }
        if is_whole:
            load(make, concurrency, concurrency)
            stages.clear()
            count = arguments.count * 2
            passed, seconds, _ = load(make, count, concurrency)
            measured["together"] = {
                "concurrency": concurrency,
                "images_per_second": round(count / passed, 3),
                **spread(seconds),
                "stages_ms": stages.medians(),
                "mean_batch_rows": round(float(np.mean(stages.rows)), 2),
            }
    return measured


class _Stages:
    """What the answers' `info` says about their stages."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.milliseconds: list[dict[str, float]] = []
        self.rows: list[float] = []

    def add(self, info: dict) -> None:
        self.milliseconds.append(info["milliseconds"])
        self.rows.append(info["mean_batch_rows"])

    def medians(self) -> dict[str, float]:
        names = self.milliseconds[0]
        return {n: round(float(np.median([m[n] for m in self.milliseconds])), 2) for n in names}


def _random_checkpoint(family: str, device: str, folder: Path) -> Path:
    """The true architecture at its native size; weights are drawn where that is fast."""
    from tests.engines.reduced import TRUE, build

    target = folder / "checkpoint"
    if not (target / "complete").exists():
        side = {"sd1": 64, "sdxl": 128}[family]
        with torch.device(device):
            build(family, target, torch.float16, sizes=TRUE, sample_size=side)
        (target / "complete").touch()
    return target


def _device_name(devices: list[str]) -> str:
    names = [torch.cuda.get_device_name(d) if d.startswith("cuda") else d for d in devices]
    return names[0] if len(names) == 1 else f"{len(names)} of {names[0]}"


if __name__ == "__main__":
    main()
