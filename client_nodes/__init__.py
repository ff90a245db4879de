"""Triton Full Pipeline: ComfyUI nodes for Stable Diffusion on NVIDIA Triton Inference Server."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

WEB_DIRECTORY = "./web"


class TritonExtension(ComfyExtension):
    """The pack; see README.md."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes of the pack."""
        from .node_pipeline import TritonFullPipeline
        from .node_server import TritonServer
        from .node_stages import (
            TritonCLIPTextEncode,
            TritonKSampler,
            TritonRemoteUNet,
            TritonVAEDecode,
            TritonVAEEncode,
        )

        return [
            TritonFullPipeline,
            TritonServer,
            TritonCLIPTextEncode,
            TritonKSampler,
            TritonVAEDecode,
            TritonVAEEncode,
            TritonRemoteUNet,
        ]


async def comfy_entrypoint() -> TritonExtension:
    """What ComfyUI calls as it starts. Asks the servers what they offer, and waits for none."""
    from .offers import refresh_with_node_definitions
    from .pack import OFFERS

    refresh_with_node_definitions(OFFERS)
    OFFERS.refresh_in_background()
    return TritonExtension()
