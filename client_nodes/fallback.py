"""A picture painted here, with ComfyUI's own nodes, when the server cannot be reached."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from .jobs import say

EVENT = "triton_full_pipeline.notice"


def announce(node_id: str, checkpoint: str, error: Exception) -> None:
    """Say loudly that the picture will not come from the server: log, node and a toast."""
    from server import PromptServer

    say(f"PAINTED HERE with {checkpoint}, not by the server: {error}", node_id)
    notice = {
        "severity": "warn",
        "summary": f"Painted here with {checkpoint}, not by the server",
        "detail": str(error),
    }
    PromptServer.instance.send_sync(EVENT, notice, PromptServer.instance.client_id)


def graph(
    node_id: str,
    checkpoint: str,
    positive: str,
    negative: str,
    clip_skip: int,
    settings: dict[str, Any],
    size: tuple[int, int, int],
    image: Any,
    mask: Any,
) -> io.NodeOutput:
    """The same request as core nodes.

    Args:
        settings: KSampler's seed, steps, cfg, sampler_name, scheduler, denoise.
        size: width and height in pixels, and the number of pictures.
        image, mask: IMAGE and MASK, or None.
    """
    # The prefix that ComfyUI sets is one for all nodes, and nodes of this pack run side by side.
    build = GraphBuilder(prefix=f"{node_id}.fallback.")
    loader = build.node("CheckpointLoaderSimple", ckpt_name=checkpoint)
    clip = loader.out(1)
    if clip_skip:
        clip = build.node("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=clip_skip).out(0)
    width, height, count = size
    if image is None:
        latent = build.node("EmptyLatentImage", width=width, height=height, batch_size=count).out(0)
    else:
        latent = build.node("VAEEncode", pixels=image, vae=loader.out(2)).out(0)
        if count > 1 and len(image) == 1:
            latent = build.node("RepeatLatentBatch", samples=latent, amount=count).out(0)
    if mask is not None:
        latent = build.node("SetLatentNoiseMask", samples=latent, mask=mask).out(0)
    sampled = build.node(
        "KSampler",
        model=loader.out(0),
        positive=build.node("CLIPTextEncode", clip=clip, text=positive).out(0),
        negative=build.node("CLIPTextEncode", clip=clip, text=negative).out(0),
        latent_image=latent,
        **settings,
    )
    decoded = build.node("VAEDecode", samples=sampled.out(0), vae=loader.out(2))
    return io.NodeOutput(decoded.out(0), sampled.out(0), expand=build.finalize())
