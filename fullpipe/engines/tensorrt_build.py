"""ONNX files become TensorRT plans: strongly typed, an optimisation profile per bucket of rows."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fullpipe.config import PipelineConfig
from fullpipe.engines import TOKENS
from fullpipe.engines.tensorrt_library import Library, library, logger
from fullpipe.errors import SetupError
from fullpipe.text.conditioning import CHUNKS_PER_FORWARD

MAX_TOKENS = 4 * TOKENS
"""Prompt tokens that a plan takes at most; every profile reserves memory for them."""


@dataclasses.dataclass(frozen=True)
class Range:
    """One open dimension of a profile: smallest, best and largest."""

    low: int
    best: int
    high: int

    def holds(self, value: int) -> bool:
        """Whether a call may have this value."""
        return self.low <= value <= self.high


Profile = dict[str, list[Range | None]]
"""Tensor name to its dimensions; None where the network fixes one."""


def profiles(name: str, config: PipelineConfig) -> list[Profile]:
    """What a network is built for: one profile per bucket of UNet rows, one for anything else.

    Args:
        name: unet, vae_decoder, vae_encoder or clip.
        config: `loop.sizes` spans the sizes, its first one is the best; `loop.buckets` the rows.
    """
    scale = config.checkpoint.vae_scale_factor
    widths, heights = ([size[axis] for size in config.loop.sizes] for axis in (0, 1))
    width_px, height_px = (Range(min(s), s[0], max(s)) for s in (widths, heights))
    width, height = (
        Range(side.low // scale, side.best // scale, side.high // scale)
        for side in (width_px, height_px)
    )
    pictures = Range(1, 1, config.limits.max_batch_size if config.loop.unet == "plan" else 1)
    if name == "vae_decoder":
        return [{"latents": [pictures, None, height, width]}]
    if name == "vae_encoder":
        return [{"images": [pictures, height_px, width_px, None]}]
    if name == "clip":
        return [{"inputs_embeds": [Range(1, 2, CHUNKS_PER_FORWARD), None, None]}]
    buckets = config.loop.buckets
    found = []
    for below, bucket in zip([0, *buckets], buckets, strict=False):
        rows = Range(below + 1, bucket, bucket)
        profile: Profile = {
            "sample": [rows, None, height, width],
            "timestep": [rows],
            "encoder_hidden_states": [rows, Range(TOKENS, TOKENS, MAX_TOKENS), None],
        }
        if config.checkpoint.is_sdxl:
            profile |= {"text_embeds": [rows, None], "time_ids": [rows, None]}
        found.append(profile)
    return found


def build_plan(path: Path, plan: Path, name: str, config: PipelineConfig) -> None:
    """Build a plan of an ONNX file.

    Timings of earlier builds are kept in $XDG_CACHE_HOME/fullpipe and shorten this one.

    Args:
        path: the ONNX file, its weights beside it.
        plan: the file to write; `describe` of it goes beside, as .json.
        name: of the network, see `profiles`.
        config: of the pipeline.
    Raises:
        SetupError: TensorRT is missing, or its parser or builder refused; its own words are in it.
    """
    found = library()
    errors: list[str] = []
    builder, network, _parser = parse(found, path, errors)
    configuration = builder.create_builder_config()
    for profile in profiles(name, config):
        add_profile(builder, network, configuration, profile, errors)
    cache = _timing_cache(found, configuration)
    serialized = builder.build_serialized_network(network, configuration)
    if serialized is None:
        raise _refused(f"TensorRT could not build {name}", errors)
    if cache is not None:
        _save_atomically(cache, memoryview(configuration.get_timing_cache().serialize()))
    plan.write_bytes(serialized)
    description = json.dumps(describe(found, network), indent=2) + "\n"
    plan.with_suffix(".json").write_text(description, encoding="utf-8")


def describe(found: Library, network: Any) -> dict[str, list[dict[str, Any]]]:
    """The tensors of a parsed network, as a Triton configuration declares them.

    Returns:
        inputs and outputs: name, data_type such as TYPE_FP32, and dims with -1 for open ones.
    """
    types = {
        found.module.DataType.FLOAT: "TYPE_FP32",
        found.module.DataType.INT64: "TYPE_INT64",
        found.module.DataType.UINT8: "TYPE_UINT8",
    }

    def tensors(count: int, get: Callable[[int], Any]) -> list[dict[str, Any]]:
        return [
            {"name": t.name, "data_type": types[t.dtype], "dims": list(t.shape)}
            for t in map(get, range(count))
        ]

    return {
        "inputs": tensors(network.num_inputs, network.get_input),
        "outputs": tensors(network.num_outputs, network.get_output),
    }


def parse(found: Library, path: Path, errors: list[str]) -> tuple[Any, Any, Any]:
    """Read an ONNX file into a strongly typed network.

    Args:
        errors: gets TensorRT's error lines.
    Returns:
        builder, network and parser, which must live as long as the network is used.
    Raises:
        SetupError: the parser refused the file.
    """
    trt = found.module
    log = logger(trt, errors)
    builder = trt.Builder(log)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        errors += [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise _refused(f"TensorRT cannot read {path.name}", errors)
    return builder, network, parser


def add_profile(
    builder: Any, network: Any, configuration: Any, profile: Profile, errors: list[str]
) -> None:
    """Give the builder one profile; raises SetupError where it does not fit the network."""
    added = builder.create_optimization_profile()
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    if inputs.keys() != profile.keys():
        raise SetupError(f"the network takes {sorted(inputs)}, its profile has {sorted(profile)}")
    for name, ranges in profile.items():
        own = list(inputs[name].shape)
        if len(own) != len(ranges):
            raise SetupError(f"{name} has {len(own)} dimensions, its profile {len(ranges)}")

        def shape(pick: Callable[[Range], int], own: list[int] = own, ranges=ranges) -> list[int]:
            return [size if r is None else pick(r) for size, r in zip(own, ranges, strict=True)]

        added.set_shape(
            name, shape(lambda r: r.low), shape(lambda r: r.best), shape(lambda r: r.high)
        )
    if configuration.add_optimization_profile(added) < 0:
        raise _refused("TensorRT refused an optimisation profile", errors)


def _timing_cache(found: Library, configuration: Any) -> Path | None:
    """Load the timings of earlier builds, where this TensorRT keeps any; returns their file."""
    trt = found.module
    if found.is_rtx or not hasattr(configuration, "create_timing_cache"):
        return None  # TensorRT for RTX measures on the GPU that runs, not at the build
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fullpipe"
    path = folder / f"tensorrt-{trt.__version__}.timing"
    content = path.read_bytes() if path.is_file() else b""
    cache = configuration.create_timing_cache(content)
    # A cache of another GPU model is refused, and an empty one takes its place.
    if not configuration.set_timing_cache(cache, ignore_mismatch=False):
        empty = configuration.create_timing_cache(b"")
        if not configuration.set_timing_cache(empty, ignore_mismatch=False):
            raise SetupError("TensorRT refused an empty timing cache")
    return path


def _save_atomically(path: Path, content: memoryview) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)


def _refused(what: str, errors: list[str]) -> SetupError:
    # Without a GPU the CUDA runtime complains each time, and that is never the cause.
    causes = [error for error in errors if "catchCudaError" not in error]
    reason = causes[0] if causes else "it gave no reason"
    return SetupError(f"{what}: {' '.join(reason.split())}")
