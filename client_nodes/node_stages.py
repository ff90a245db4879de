"""The remote stages: drop-in for ComfyUI's own nodes, so that only the heavy part goes away."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
from comfy_api.latest import io

from . import jobs, pack, shared_memory, tensors
from .call import Call
from .offers import Facts
from .pack import ABSENT, OFFERS
from .remote_unet import make_model
from .settings import Choice, Server
from .triton import infer


class _Stage(io.ComfyNode):
    """What the stages have in common: a pipeline and a server that must offer it."""

    @classmethod
    def validate_inputs(cls, pipeline: str | None, server: Any = ABSENT) -> bool | str:
        """A saved workflow stays valid while the server is away."""
        return pack.complaint(pipeline, server)

    @classmethod
    def fingerprint_inputs(cls, pipeline: str, **inputs: Any) -> str:
        """Run again if the server's checkpoint changed."""
        return OFFERS.fingerprint(pipeline)


class TritonCLIPTextEncode(_Stage):
    """A prompt to CONDITIONING, by the server's text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `io.ComfyNode`."""
        return io.Schema(
            node_id="TritonCLIPTextEncode",
            display_name="Triton CLIP Text Encode",
            category=pack.CATEGORY,
            description="CLIP Text Encode on the server; for any KSampler of the same checkpoint.",
            inputs=[
                pack.pipeline_input(),
                io.String.Input("text", multiline=True, dynamic_prompts=True),
                io.Int.Input(
                    "clip_skip",
                    default=0,
                    min=-24,
                    max=0,
                    tooltip="ComfyUI's stop_at_clip_layer; 0: the checkpoint's own.",
                ),
                pack.server_input(),
            ],
            outputs=[io.Conditioning.Output("CONDITIONING")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    async def execute(
        cls, pipeline: str, text: str, clip_skip: int = 0, server: Choice | None = None
    ) -> io.NodeOutput:
        """See the inputs' tooltips."""
        inputs = {"prompt": text, "negative_prompt": "", "clip_skip": clip_skip or None}
        outputs = ["prompt_embeds", "pooled_prompt_embeds"]
        found = await _run_stage(cls, server, pipeline, "text_encoder", inputs, outputs)
        embeds, pooled = (tensors.to_rows(found[name]) for name in outputs)
        return io.NodeOutput([[embeds, {"pooled_output": pooled}]])


class TritonVAEDecode(_Stage):
    """LATENT to IMAGE, by the server's VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `io.ComfyNode`."""
        return io.Schema(
            node_id="TritonVAEDecode",
            display_name="Triton VAE Decode",
            category=pack.CATEGORY,
            description="VAE Decode on the server. The picture travels in 8 bits a channel.",
            inputs=[pack.pipeline_input(), io.Latent.Input("samples"), pack.server_input()],
            outputs=[io.Image.Output("IMAGE")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    async def execute(
        cls, pipeline: str, samples: dict[str, Any], server: Choice | None = None
    ) -> io.NodeOutput:
        """See the inputs' tooltips."""
        latents = tensors.from_latent(samples)["latents"]
        found = await _run_stage(
            cls,
            server,
            pipeline,
            "vae_decoder",
            {"latents": latents},
            ["images"],
            lambda facts: {"images": latents[:, 0].size * facts.vae_scale_factor**2 * 3},
        )
        return io.NodeOutput(tensors.to_image(found["images"], "the VAE decoder"))


class TritonVAEEncode(_Stage):
    """IMAGE to LATENT, by the server's VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `io.ComfyNode`."""
        return io.Schema(
            node_id="TritonVAEEncode",
            display_name="Triton VAE Encode",
            category=pack.CATEGORY,
            description="VAE Encode on the server. The picture travels in 8 bits a channel.",
            inputs=[pack.pipeline_input(), io.Image.Input("pixels"), pack.server_input()],
            outputs=[io.Latent.Output("LATENT")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    async def execute(
        cls, pipeline: str, pixels: Any, server: Choice | None = None
    ) -> io.NodeOutput:
        """See the inputs' tooltips."""
        images = tensors.to_pixels(tensors.crop_to_multiple(pixels, 8))
        found = await _run_stage(
            cls, server, pipeline, "vae_encoder", {"images": images}, ["latents"]
        )
        return io.NodeOutput(tensors.to_latent(found["latents"]))


class TritonKSampler(_Stage):
    """The whole denoising loop in one request, between any encoder and any decoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `io.ComfyNode`."""
        return io.Schema(
            node_id="TritonKSampler",
            display_name="Triton KSampler",
            category=pack.CATEGORY,
            description=(
                "KSampler on the server, in one request. Takes conditionings of Triton CLIP Text"
                " Encode or of a local CLIP of the same checkpoint."
            ),
            inputs=[
                pack.pipeline_input(),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image"),
                pack.seed_input(),
                pack.steps_input(),
                pack.cfg_input(),
                *pack.sampler_inputs(),
                pack.denoise_input(),
                pack.preview_input(),
                pack.server_input(),
            ],
            outputs=[io.Latent.Output("LATENT")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        pipeline: str | None,
        sampler_name: str | None,
        scheduler: str | None,
        server: Any = ABSENT,
    ) -> bool | str:
        """A saved workflow stays valid while the server is away."""
        return pack.complaint(pipeline, server, sampler_name, scheduler)

    @classmethod
    async def execute(
        cls,
        pipeline: str,
        positive: list,
        negative: list,
        latent_image: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        preview: bool = True,
        server: Choice | None = None,
    ) -> io.NodeOutput:
        """See the inputs' tooltips."""
        inputs: dict[str, Any] = {
            **tensors.from_latent(latent_image),
            "seed": seed,
            "steps": steps,
            "cfg": cfg,
            "sampler_name": sampler_name,
            "scheduler": scheduler,
            "denoise": denoise,
            "output": "latents",
            "job_id": secrets.token_urlsafe(16),
        }

        def work(call: Call) -> np.ndarray:
            target, endpoint = pack.connect(server)
            facts = _facts(target, server, pipeline, call)
            height, width = (side * facts.vae_scale_factor for side in inputs["latents"].shape[2:])
            for prefix, name, given in (
                ("", "positive", positive),
                ("negative_", "negative", negative),
            ):
                embeds, pooled = tensors.from_conditioning(given, name, height, width)
                inputs[f"{prefix}prompt_embeds"] = embeds
                inputs[f"{prefix}pooled_prompt_embeds"] = pooled
            model = facts.model("scheduler_model")
            sizes = {"latents": inputs["latents"].nbytes}

            def attempt() -> np.ndarray:
                with shared_memory.region(endpoint, inputs, sizes) as region:
                    return infer(endpoint, model, inputs, ["latents"], call=call, region=region)[
                        "latents"
                    ]

            job = jobs.Job(endpoint, model, inputs["job_id"], call)
            return job.run(attempt, follow=preview, preview=preview)

        latents = await jobs.run(cls.hidden.unique_id, work, steps)
        kept = {key: value for key, value in latent_image.items() if key != "samples"}
        return io.NodeOutput({**kept, **tensors.to_latent(latents)})


class TritonRemoteUNet(_Stage):
    """A MODEL whose every step is a request."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `io.ComfyNode`."""
        return io.Schema(
            node_id="TritonRemoteUNet",
            display_name="Triton Remote UNet",
            category=pack.CATEGORY,
            description=(
                "A MODEL for ComfyUI's own samplers whose every step is a request. Much slower over"
                " a network than Triton KSampler; for what that one cannot do."
            ),
            inputs=[pack.pipeline_input(), pack.server_input()],
            outputs=[io.Model.Output("MODEL")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    async def execute(cls, pipeline: str, server: Choice | None = None) -> io.NodeOutput:
        """See the inputs' tooltips."""
        target, _ = pack.connect(server)
        facts = await jobs.run(
            cls.hidden.unique_id, lambda call: _facts(target, server, pipeline, call)
        )
        return io.NodeOutput(make_model(target, facts))


def _facts(server: Server, choice: Choice | None, pipeline: str, call: Call) -> Facts:
    return jobs.repeat(server, call, lambda: pack.facts(server, choice, pipeline))


async def _run_stage(
    node: type[io.ComfyNode],
    choice: Choice | None,
    pipeline: str,
    part: str,
    inputs: dict[str, Any],
    outputs: list[str],
    sizes: Callable[[Facts], dict[str, int]] = lambda facts: {},
) -> dict[str, np.ndarray]:
    """Ask one stage, a pure function, which may be repeated at will.

    Args:
        sizes: bytes of the large outputs.
    """

    def work(call: Call) -> dict[str, np.ndarray]:
        server, endpoint = pack.connect(choice)
        facts = _facts(server, choice, pipeline, call)

        def attempt() -> dict[str, np.ndarray]:
            with shared_memory.region(endpoint, inputs, sizes(facts)) as region:
                return infer(endpoint, facts.model(part), inputs, outputs, call=call, region=region)

        return jobs.repeat(server, call, attempt)

    return await jobs.run(node.hidden.unique_id, work)
