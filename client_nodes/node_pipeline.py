"""The node Triton Full Pipeline: from prompts to the picture in one request."""

from __future__ import annotations

import json
import secrets
from typing import Any

import folder_paths
import numpy as np
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from . import fallback, jobs, pack, shared_memory, tensors
from .call import Call
from .errors import Lost, Unavailable
from .offers import Facts
from .pack import ABSENT, OFFERS
from .settings import Choice
from .triton import infer, stream

NO_FALLBACK = "none"
NO_LATENT = "Triton Full Pipeline has no latents: switch on with_latent"


class TritonFullPipeline(io.ComfyNode):
    """One request makes the pictures; progress, previews and interrupts as if it were local."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `io.ComfyNode`."""
        return io.Schema(
            node_id="TritonFullPipeline",
            display_name="Triton Full Pipeline",
            category=pack.CATEGORY,
            description=(
                "Prompts in, picture out, in one request to a Triton Inference Server. With an"
                " image it is image to image, with a mask it is inpainting."
            ),
            inputs=[
                pack.pipeline_input(),
                io.String.Input("positive", multiline=True, dynamic_prompts=True),
                io.String.Input("negative", multiline=True, dynamic_prompts=True),
                pack.seed_input(),
                pack.steps_input(),
                pack.cfg_input(),
                *pack.sampler_inputs(),
                pack.denoise_input(),
                io.Int.Input(
                    "width",
                    default=OFFERS.default("width", 512),
                    min=16,
                    max=16_384,
                    step=8,
                    tooltip="Pixels; an image decides by itself.",
                ),
                io.Int.Input(
                    "height",
                    default=OFFERS.default("height", 512),
                    min=16,
                    max=16_384,
                    step=8,
                    tooltip="Pixels; an image decides by itself.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64),
                pack.preview_input(),
                io.Int.Input(
                    "clip_skip",
                    default=0,
                    min=-24,
                    max=0,
                    tooltip="ComfyUI's stop_at_clip_layer; 0: the checkpoint's own.",
                ),
                io.Boolean.Input(
                    "with_latent",
                    default=False,
                    tooltip="Also return the latents that the picture is decoded from.",
                ),
                io.Combo.Input(
                    "fallback_checkpoint",
                    options=[NO_FALLBACK, *folder_paths.get_filename_list("checkpoints")],
                    default=NO_FALLBACK,
                    tooltip=(
                        "Paint with this checkpoint here when the server cannot be reached. The"
                        " picture is then another one, and the UI says so."
                    ),
                ),
                io.Image.Input(
                    "image", optional=True, tooltip="Start picture; set denoise below 1."
                ),
                io.Mask.Input("mask", optional=True, tooltip="1 = repaint; needs an image."),
                pack.server_input(),
            ],
            outputs=[io.Image.Output("IMAGE"), io.Latent.Output("LATENT")],
            hidden=[io.Hidden.unique_id],
            enable_expand=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        pipeline: str | None,
        sampler_name: str | None,
        scheduler: str | None,
        fallback_checkpoint: str | None = NO_FALLBACK,
        server: Any = ABSENT,
    ) -> bool | str:
        """A saved workflow stays valid while the server is away."""
        local = [NO_FALLBACK, *folder_paths.get_filename_list("checkpoints")]
        if fallback_checkpoint is not None and fallback_checkpoint not in local:
            return f"fallback_checkpoint {fallback_checkpoint!r} is not in models/checkpoints"
        return pack.complaint(pipeline, server, sampler_name, scheduler)

    @classmethod
    def fingerprint_inputs(cls, pipeline: str, **inputs: Any) -> str:
        """Run again if the server's checkpoint changed, or the last picture was painted here."""
        return OFFERS.fingerprint(pipeline)

    @classmethod
    async def execute(
        cls,
        pipeline: str,
        positive: str,
        negative: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        width: int,
        height: int,
        batch_size: int,
        preview: bool = True,
        clip_skip: int = 0,
        with_latent: bool = False,
        fallback_checkpoint: str = NO_FALLBACK,
        image: Any = None,
        mask: Any = None,
        server: Choice | None = None,
    ) -> io.NodeOutput:
        """See the inputs' tooltips."""
        node_id = cls.hidden.unique_id
        settings = {
            "seed": seed,
            "steps": steps,
            "cfg": cfg,
            "sampler_name": sampler_name,
            "scheduler": scheduler,
            "denoise": denoise,
        }
        request = {
            "prompt": positive,
            "negative_prompt": negative,
            **settings,
            "width": width if image is None else None,
            "height": height if image is None else None,
            "batch_size": batch_size,
            "clip_skip": clip_skip or None,
            "init_image": None if image is None else tensors.to_pixels(image),
            "mask": None if mask is None else tensors.to_mask(mask),
        }

        def work(call: Call) -> tuple[np.ndarray, np.ndarray | None]:
            return _Request(server, pipeline, request, call).send(preview, with_latent)

        try:
            pixels, latents = await jobs.run(node_id, work, steps)
        except Unavailable as error:
            if fallback_checkpoint == NO_FALLBACK:
                raise
            OFFERS.fell_back()
            fallback.announce(node_id, fallback_checkpoint, error)
            return fallback.graph(
                node_id, fallback_checkpoint, positive, negative, clip_skip, settings,
                (width, height, batch_size), image, mask,
            )  # fmt: skip
        picture = tensors.to_image(pixels, f"pipeline {pipeline!r}")
        if latents is None:
            return io.NodeOutput(picture, ExecutionBlocker(NO_LATENT))
        return io.NodeOutput(picture, tensors.to_latent(latents))


class _Request:
    """One picture request and the ways in which it may travel."""

    def __init__(self, choice: Choice | None, pipeline: str, inputs: dict[str, Any], call: Call):
        self._choice = choice
        self._pipeline = pipeline
        self._inputs = {**inputs, "job_id": secrets.token_urlsafe(16)}
        self._call = call
        self._server, self._endpoint = pack.connect(choice)

    def send(self, preview: bool, with_latent: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns pixels [N, H, W, 3] uint8, and latents [N, 4, h, w] fp32 if asked for."""
        server, call = self._server, self._call
        facts = jobs.repeat(server, call, lambda: pack.facts(server, self._choice, self._pipeline))
        job = jobs.Job(self._endpoint, facts.model("scheduler_model"), self._inputs["job_id"], call)
        starts = self._inputs["init_image"]
        masks = self._inputs["mask"]
        is_single = all(array is None or len(array) == 1 for array in (starts, masks))
        # Shared memory carries pixels as they are; a stream carries files, but it is one
        # connection, through any gateway, and ends its job when it breaks.
        if (
            preview
            and is_single
            and not with_latent
            and not shared_memory.is_usable(self._endpoint)
        ):
            return job.run(lambda: self._stream(facts)), None
        return job.run(lambda: self._infer(facts, with_latent), follow=preview, preview=preview)

    def _infer(self, facts: Facts, with_latent: bool) -> tuple[np.ndarray, np.ndarray | None]:
        inputs = dict(self._inputs)
        model, outputs = facts.pipeline, ["images"]
        if with_latent:
            model, outputs = facts.model("scheduler_model"), ["images", "latents"]
        else:
            inputs["output_format"] = "raw"
        with shared_memory.region(self._endpoint, inputs, self._output_sizes()) as region:
            found = infer(self._endpoint, model, inputs, outputs, call=self._call, region=region)
        return found["images"], found.get("latents")

    def _output_sizes(self) -> dict[str, int]:
        starts = self._inputs["init_image"]
        count = self._inputs["batch_size"]
        width, height = self._inputs["width"], self._inputs["height"]
        if starts is not None:
            count = max(count, len(starts))
            height, width = starts.shape[1:3]
        return {"images": count * height * width * 3}

    def _stream(self, facts: Facts) -> np.ndarray:
        fields = {**self._inputs, "output_format": "png", "preview": "latent"}
        for name in ("init_image", "mask"):
            array = fields.pop(name)
            fields[f"{name}_b64"] = None if array is None else tensors.to_file(array[0])
        picture, told = None, 0
        for document in stream(self._endpoint, facts.stream, fields, self._call):
            event = json.loads(document.get("event") or "{}")
            told = jobs.report(self._call, event, told)
            if document.get("info"):
                picture = document["image"]
        if picture is None:
            raise Lost(f"{self._server.url}, model {facts.stream!r} ended without a picture")
        return tensors.from_files(picture, facts.stream)
