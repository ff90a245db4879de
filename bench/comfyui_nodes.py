"""Runs in ComfyUI's process: `comfyui_nodes.py BASE` times KSampler and VAEDecode.

BASE is ComfyUI's base directory, with `job.json` and the checkpoint in `models/checkpoints`; the
times go to `result.json` in it. ComfyUI gets its default flags, on a machine without a GPU `--cpu`,
and its nodes are called as its executor calls them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

# What ComfyUI imports and these nodes never call: video files, the noise of stochastic samplers.
UNUSED = ("av", "av.container", "av.subtitles", "av.subtitles.stream", "torchsde")


class _Unused(ModuleType):
    """Stands in for a module whose names are imported only."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def main() -> None:
    base = Path(sys.argv[1])
    job = json.loads((base / "job.json").read_text())
    sys.argv[1:] = ["--base-directory", str(base), *(["--cpu"] if job["is_cpu"] else [])]
    absent = [n for n in UNUSED if "." not in n and importlib.util.find_spec(n) is None]
    for name in UNUSED:
        if name.partition(".")[0] in absent:
            sys.modules[name] = _Unused(name)

    import comfy.options

    comfy.options.enable_args_parsing()

    # As main.py does, before torch: it chooses the allocator.
    importlib.import_module("cuda_malloc")

    import comfy.model_management as management
    import nodes
    import torch
    from comfyui_version import __version__

    def call(run):
        """A call's result and seconds, the GPU's work included."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result, time.perf_counter() - started

    seconds: dict[str, list[float]] = {"ksampler_s": [], "vae_decode_s": []}
    with torch.inference_mode():
        loader = nodes.CheckpointLoaderSimple()
        (model, clip, vae), load_s = call(lambda: loader.load_checkpoint(job["checkpoint"]))
        (positive,), (negative,) = (
            nodes.CLIPTextEncode().encode(clip, text) for text in (job["positive"], "")
        )
        (latent,) = nodes.EmptyLatentImage().generate(job["size_px"], job["size_px"], 1)
        for seed in range(job["count"]):
            request = (seed, job["steps"], job["cfg"], "euler", "normal", positive, negative)
            (samples,), sampling_s = call(
                lambda request=request: nodes.KSampler().sample(model, *request, latent)
            )
            (pixels,), decoding_s = call(
                lambda samples=samples: nodes.VAEDecode().decode(vae, samples)
            )
            seconds["ksampler_s"].append(sampling_s)
            seconds["vae_decode_s"].append(decoding_s)
    side = job["size_px"]
    if tuple(pixels.shape) != (1, side, side, 3):
        raise RuntimeError(f"a picture of {tuple(pixels.shape)}, needed (1, {side}, {side}, 3)")
    result = {
        **seconds,
        "version": __version__,
        "device": str(management.get_torch_device()),
        "unet_dtype": str(model.model.get_dtype()).removeprefix("torch."),
        "vae_dtype": str(vae.vae_dtype).removeprefix("torch."),
        "allocator": torch.cuda.get_allocator_backend() if torch.cuda.is_available() else None,
        "load_s": round(load_s, 1),
        "stood_in_for": absent,
    }
    (base / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
