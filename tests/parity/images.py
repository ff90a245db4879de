"""Whole pictures, case by case: from a running ComfyUI, from a running Triton Inference Server.

ComfyUI is asked first and ends before Triton starts, so that one large model is in memory at a
time, and both servers get all cores.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import write_checkpoint
from comfy_server import ComfyServer
from PIL import Image

from fullpipe.assemble import Choices, assemble
from fullpipe.client import Client
from fullpipe.server import ServerConfig, TritonServer

SUBJECT = "a (red:1.3) circle on a ((white)) background, \\(flat\\), [sharp], (blurry:0.6) edges"
LONG = ", ".join(f"a {c} {s}" for c in ("red", "blue", "(green:1.2)", "gray") for s in (
    "circle", "square", "triangle", "star", "heart", "diamond", "ring"))  # fmt: skip
AVOID = "a (dark:1.4) picture, noise"


@dataclass(frozen=True)
class Case:
    """One request; what ComfyUI's nodes and this project call alike has the same name."""

    name: str
    kind: str
    sampler_name: str = "euler"
    scheduler: str = "normal"
    prompt: str = SUBJECT
    negative_prompt: str = ""
    seed: int = 42
    steps: int = 4
    cfg: float = 5.0
    denoise: float = 1.0
    width: int = 64
    height: int = 64
    batch_size: int = 1
    clip_skip: int | None = None
    has_start: bool = False
    has_mask: bool = False


CASES = [
    Case("plain", "sd15"),
    Case("weights and negative", "sd15", "dpmpp_2m", "karras", negative_prompt=AVOID),
    Case("199 tokens", "sd15", "dpmpp_2m", "karras", prompt=LONG, negative_prompt=AVOID),
    Case("long negative", "sd15", "euler", "simple", negative_prompt=LONG),
    Case("batch of 2", "sd15", "euler_ancestral", batch_size=2),
    Case("cfg 1", "sd15", "lcm", "sgm_uniform", cfg=1.0),
    Case("tree noise", "sd15", "dpmpp_2m_sde", "exponential", seed=2**63 + 11),
    Case("wide", "sd15", "uni_pc", width=96),
    Case("two evaluations a step", "sd15", "heun", "simple"),
    Case("clip skip -2", "sd15", "ddim", "ddim_uniform", clip_skip=-2),
    Case("image to image", "sd15", denoise=0.6, has_start=True),
    Case("image to image, batch of 2", "sd15", "dpmpp_sde", "karras", denoise=0.6,
         has_start=True, batch_size=2),
    Case("inpainting", "sd15", "euler_ancestral", "karras", denoise=0.8, has_start=True,
         has_mask=True),
    Case("inpainting, tall", "sd15", "uni_pc", has_start=True, has_mask=True, height=96),
    Case("plain", "sdxl"),
    Case("long negative", "sdxl", "dpmpp_2m", "karras", negative_prompt=LONG),
    Case("clip skip -1, wide", "sdxl", "euler_ancestral", width=96, clip_skip=-1),
    Case("cfg 1, batch of 2", "sdxl", "lcm", "sgm_uniform", steps=3, cfg=1.0, batch_size=2),
    Case("inpainting", "sdxl", "dpmpp_2m_sde", "exponential", denoise=0.6,
         has_start=True, has_mask=True),
]  # fmt: skip

BY_NAME = {(case.kind, case.name): case for case in CASES}
# A case, and what must not be done to it: each shows that equality is no accident.
SPOILED = {
    "weights ignored": (
        BY_NAME["sd15", "plain"],
        {"prompt": SUBJECT.replace(":1.3", ":1").replace(":0.6", ":1")},
    ),
    "negative prompt ignored": (BY_NAME["sd15", "weights and negative"], {"negative_prompt": ""}),
    "prompt cut": (BY_NAME["sd15", "199 tokens"], {"prompt": SUBJECT}),
    "clip skip ignored": (BY_NAME["sd15", "clip skip -2"], {"clip_skip": None}),
    "mask ignored": (BY_NAME["sd15", "inpainting"], {"has_mask": False}),
    "SDXL: clip skip ignored": (BY_NAME["sdxl", "clip skip -1, wide"], {"clip_skip": None}),
    "SDXL: negative prompt ignored": (BY_NAME["sdxl", "long negative"], {"negative_prompt": ""}),
}


def spoiled(name: str) -> Case:
    """The request of `SPOILED[name]` as a server would see it that ignored something."""
    case, change = SPOILED[name]
    return replace(case, **change)


@dataclass(frozen=True)
class Distance:
    """How far two pictures are apart; `psnr_db` is infinite where they are equal."""

    psnr_db: float
    share_equal: float
    max_levels: int

    @property
    def is_equal(self) -> bool:
        """Whether this is what "the same picture" allows for rounding."""
        return self.psnr_db >= 60 and self.share_equal >= 0.999 and self.max_levels <= 2

    @classmethod
    def between(cls, a: np.ndarray, b: np.ndarray) -> Distance:
        """Compare [N, H, W, 3] uint8 pictures of one shape."""
        levels = np.abs(a.astype(int) - b)
        mean_square = float((levels**2).mean())
        psnr_db = 10 * math.log10(255**2 / mean_square) if mean_square else math.inf
        return cls(psnr_db, float((levels == 0).mean()), int(levels.max()))


def comfyui_pictures(
    folder: Path, cases: Iterable[Case], *, is_full_size: bool = False
) -> dict[Case, np.ndarray]:
    """Write the checkpoints that the cases need, one folder per kind, and ask ComfyUI.

    Returns:
        [N, H, W, 3] uint8 of each case.
    Raises:
        subprocess.CalledProcessError: pip could not download; its output is in the error.
    """
    comfyui = ComfyServer(folder / "comfyui")
    for kind in sorted({case.kind for case in cases}):
        (folder / kind).mkdir()
        single_file = comfyui.checkpoints / f"{kind}.safetensors"
        write_checkpoint(kind, folder / kind, single_file, is_full_size=is_full_size)
    inputs = comfyui.base / "input"
    with comfyui:
        pictures = {c: comfyui.run(graph(c, f"{c.kind}.safetensors", inputs)) for c in cases}
    shutil.rmtree(comfyui.base)
    return pictures


def triton_pictures(folder: Path, cases: Iterable[Case]) -> dict[Case, np.ndarray]:
    """Serve the checkpoints that `comfyui_pictures` left, and send one request per case.

    Returns:
        [N, H, W, 3] uint8 of each case, decoded from the PNG files of the answers.
    """
    pictures = {}
    for kind in sorted({case.kind for case in cases}):
        repository = folder / f"{kind}-repository"
        assemble(folder / kind, repository, Choices(stage_threads=2))
        settings = ServerConfig(
            repository, http_port=0, grpc_port=0, metrics_port=0, log_level="error"
        )
        with TritonServer(settings) as server:
            client = Client(server.url)
            for case in cases:
                if case.kind == kind:
                    pictures[case] = client.generate(case.prompt, **request(case)).pixels
            server.stop(now=True)
        shutil.rmtree(repository)
        shutil.rmtree(folder / kind)
    return pictures


def start_picture(case: Case) -> np.ndarray:
    """A smooth coloured picture of the case's size, [H, W, 3] uint8."""
    coarse = np.random.default_rng(3).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((case.width, case.height), Image.BICUBIC))


def mask_picture(case: Case) -> np.ndarray:
    """A mask with a soft edge that is no multiple of a latent pixel, [H, W] uint8."""
    coarse = np.zeros((8, 8), np.uint8)
    coarse[2:7, 3:] = 255
    return np.asarray(Image.fromarray(coarse).resize((case.width, case.height), Image.BILINEAR))


def request(case: Case) -> dict[str, Any]:
    """The inputs of one request, all but the prompt."""
    names = ("negative_prompt", "seed", "steps", "cfg", "sampler_name", "scheduler", "denoise")
    inputs = {name: getattr(case, name) for name in (*names, "batch_size", "clip_skip")}
    if case.has_start:
        inputs["init_image"] = start_picture(case)
    else:
        inputs |= {"width": case.width, "height": case.height}
    if case.has_mask:
        inputs["mask"] = mask_picture(case)
    return {**inputs, "output_format": "png"}


def graph(case: Case, checkpoint: str, input_folder: Path) -> dict[str, Any]:
    """The same in ComfyUI's API format; writes the pictures that LoadImage is to read."""
    nodes: dict[str, Any] = {}

    def add(class_type: str, **inputs: Any) -> str:
        nodes[str(len(nodes))] = {"class_type": class_type, "inputs": inputs}
        return str(len(nodes) - 1)

    loader = add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    clip = [loader, 1]
    if case.clip_skip is not None:
        clip = [add("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=case.clip_skip), 0]
    positive = add("CLIPTextEncode", clip=clip, text=case.prompt)
    negative = add("CLIPTextEncode", clip=clip, text=case.negative_prompt)
    size = f"{case.width}x{case.height}"
    if case.has_start:
        Image.fromarray(start_picture(case)).save(input_folder / f"start-{size}.png")
        pixels = add("LoadImage", image=f"start-{size}.png")
        latent = add("VAEEncode", pixels=[pixels, 0], vae=[loader, 2])
        if case.batch_size > 1:
            latent = add("RepeatLatentBatch", samples=[latent, 0], amount=case.batch_size)
    else:
        latent = add("EmptyLatentImage", width=case.width, height=case.height,
                     batch_size=case.batch_size)  # fmt: skip
    if case.has_mask:
        Image.fromarray(mask_picture(case)).save(input_folder / f"mask-{size}.png")
        mask = add("LoadImageMask", image=f"mask-{size}.png", channel="red")
        latent = add("SetLatentNoiseMask", samples=[latent, 0], mask=[mask, 0])
    names = ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise")
    settings = {name: getattr(case, name) for name in names}
    sampled = add(
        "KSampler",
        model=[loader, 0],
        positive=[positive, 0],
        negative=[negative, 0],
        latent_image=[latent, 0],
        **settings,
    )
    decoded = add("VAEDecode", samples=[sampled, 0], vae=[loader, 2])
    add("SaveImage", images=[decoded, 0], filename_prefix="parity")
    return nodes
