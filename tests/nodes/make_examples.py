"""Make the pack's example workflows and their pictures: `python tests/nodes/make_examples.py`.

ComfyUI's own page builds each graph from the lists below and saves it, so that the files are what
the page would save; Triton, with the demo checkpoint, paints what the pictures show.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity"), str(ROOT / "tests" / "nodes")]

from browser import (  # noqa: E402
    fit,
    follow_events,
    install_front_end,
    opened,
    settle_in,
    wait_for_event,
)
from comfy_server import ComfyServer  # noqa: E402

from fullpipe.assemble import Choices, assemble  # noqa: E402
from fullpipe.config import LoopSettings  # noqa: E402
from fullpipe.server import ServerConfig, TritonServer  # noqa: E402

EXAMPLES = ROOT / "client_nodes" / "example_workflows"
RED = "a red circle on a white background"
FULL = [400, 620]
WAYS = {"sampler_name": "dpmpp_2m", "scheduler": "karras"}


def node(kind: str, at: list[int], size: list[int] | None = None, links: Any = (), **widgets: Any):
    """One node: links are (input, number of the node, its output)."""
    return {"type": kind, "pos": at, "size": size, "links": list(links), "widgets": widgets}


def sampling(model: int | None, at: list[int], links: list, **widgets: Any) -> dict[str, Any]:
    """A KSampler, ComfyUI's own with a model or ours without."""
    kind = "TritonKSampler" if model is None else "KSampler"
    links = [*links, *([("model", model, 0)] if model is not None else [])]
    given = {"seed": 7, "steps": 20, "cfg": 4.0, "scheduler": "normal", **widgets}
    given["control_after_generate"] = "fixed"
    return node(kind, at, [300, 330], links, **given)


WORKFLOWS: dict[str, list[dict[str, Any]]] = {
    "txt2img": [
        node("TritonFullPipeline", [40, 60], FULL, positive=RED, seed=7, cfg=4.0,
             control_after_generate="fixed"),
        node("PreviewImage", [500, 60], [420, 460], [("images", 0, 0)]),
    ],
    "img2img": [
        node("TritonFullPipeline", [40, 60], FULL, positive=RED, seed=7, cfg=4.0,
             control_after_generate="fixed"),
        node("PreviewImage", [480, 60], [300, 330], [("images", 0, 0)]),
        node("TritonFullPipeline", [820, 60], FULL, [("image", 0, 0)],
             positive="a red circle on a blue background", seed=7, cfg=5.0, denoise=0.85,
             control_after_generate="fixed", **WAYS),
        node("PreviewImage", [1260, 60], [300, 330], [("images", 2, 0)]),
    ],
    "inpaint": [
        node("TritonFullPipeline", [40, 60], FULL, positive=RED, seed=7, cfg=4.0,
             control_after_generate="fixed"),
        node("PreviewImage", [480, 60], [300, 330], [("images", 0, 0)]),
        node("SolidMask", [480, 440], [250, 110], value=0.0, width=256, height=256),
        node("SolidMask", [480, 590], [250, 110], value=1.0, width=256, height=128),
        node("MaskComposite", [760, 480], [250, 150], [("destination", 2, 0), ("source", 3, 0)],
             x=0, y=128, operation="add"),
        node("TritonFullPipeline", [1040, 60], FULL, [("image", 0, 0), ("mask", 4, 0)],
             positive="a green circle on a white background", seed=3, cfg=6.0,
             control_after_generate="fixed", **WAYS),
        node("PreviewImage", [1480, 60], [300, 330], [("images", 5, 0)]),
    ],
    "sdxl": [
        node("TritonServer", [40, 60], [300, 160]),
        node("TritonFullPipeline", [380, 60], FULL, [("server", 0, 0)], pipeline="sdxl",
             positive="a lighthouse on a cliff at dusk, oil painting", negative="blurry, text",
             seed=7, steps=30, cfg=6.0, width=1024, height=1024, control_after_generate="fixed",
             **WAYS),
        node("SaveImage", [820, 60], [420, 460], [("images", 1, 0)], filename_prefix="sdxl"),
    ],
    "remote_ksampler": [
        node("TritonCLIPTextEncode", [40, 60], [360, 190], text="a blue star on yellow"),
        node("TritonCLIPTextEncode", [40, 300], [360, 190], text=""),
        node("EmptyLatentImage", [40, 540], [360, 110], width=256, height=256, batch_size=1),
        sampling(None, [440, 60], [("positive", 0, 0), ("negative", 1, 0), ("latent_image", 2, 0)]),
        node("TritonVAEDecode", [780, 60], [300, 80], [("samples", 3, 0)]),
        node("PreviewImage", [780, 200], [420, 460], [("images", 4, 0)]),
    ],
    "side_by_side": [
        node("CheckpointLoaderSimple", [40, 60], [360, 100],
             ckpt_name="v1-5-pruned-emaonly-fp16.safetensors"),
        node("CLIPTextEncode", [40, 210], [360, 150], [("clip", 0, 1)], text="a lighthouse"),
        node("CLIPTextEncode", [40, 410], [360, 150], [("clip", 0, 1)], text="blurry"),
        node("EmptyLatentImage", [40, 610], [360, 110], width=512, height=512, batch_size=1),
        sampling(0, [440, 60], [("positive", 1, 0), ("negative", 2, 0), ("latent_image", 3, 0)],
                 cfg=7.0),
        sampling(None, [440, 440], [("positive", 1, 0), ("negative", 2, 0), ("latent_image", 3, 0)],
                 cfg=7.0),
        node("VAEDecode", [780, 60], [220, 50], [("samples", 4, 0), ("vae", 0, 2)]),
        node("VAEDecode", [780, 440], [220, 50], [("samples", 5, 0), ("vae", 0, 2)]),
        node("PreviewImage", [1040, 60], [320, 340], [("images", 6, 0)]),
        node("PreviewImage", [1040, 440], [320, 340], [("images", 7, 0)]),
    ],
    "remote_unet": [
        node("TritonRemoteUNet", [40, 60], [300, 60], pipeline="apart"),
        node("TritonCLIPTextEncode", [40, 180], [360, 170], pipeline="apart",
             text="a purple heart on a green background"),
        node("TritonCLIPTextEncode", [40, 400], [360, 170], pipeline="apart", text=""),
        node("EmptyLatentImage", [40, 620], [360, 110], width=256, height=256, batch_size=1),
        sampling(0, [440, 60], [("positive", 1, 0), ("negative", 2, 0), ("latent_image", 3, 0)]),
        node("TritonVAEDecode", [440, 450], [300, 80], [("samples", 4, 0)], pipeline="apart"),
        node("PreviewImage", [780, 60], [420, 460], [("images", 5, 0)]),
    ],
}  # fmt: skip
# These need a checkpoint that is not part of this repository.
NOT_PAINTED = ("sdxl", "side_by_side")

BUILD = """async (nodes) => {
  app.clean();
  app.graph.clear();
  app.nodeOutputs = {};
  app.nodePreviewImages = {};
  const made = nodes.map((spec) => {
    const node = LiteGraph.createNode(spec.type);
    node.pos = spec.pos;
    app.graph.add(node);
    for (const [name, value] of Object.entries(spec.widgets)) {
      const widget = node.widgets.find((w) => w.name === name);
      if (!widget) throw new Error(`${spec.type} has no ${name}`);
      widget.value = value;
    }
    if (spec.size) node.setSize(spec.size);
    return node;
  });
  nodes.forEach((spec, index) => spec.links.forEach(([input, from, output]) => {
    const slot = made[index].inputs.findIndex((i) => i.name === input);
    if (!made[from].connect(output, made[index], slot)) throw new Error(`${spec.type}.${input}`);
  }));
}"""


def build(page, nodes: list[dict[str, Any]]) -> None:
    """Put the nodes into the page's graph."""
    page.evaluate(BUILD, nodes)
    fit(page)


def main() -> None:
    """Write every workflow and its picture."""
    front_end = install_front_end()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assemble(ROOT / "demo" / "checkpoint", folder / "models")
        apart = Choices(name="apart", loop=LoopSettings(unet="bls"))
        assemble(ROOT / "demo" / "checkpoint", folder / "models", apart)
        settle_in(folder / "comfyui")
        ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
        settings = ServerConfig(folder / "models", **ports, log_level="error")
        with TritonServer(settings, log=lambda line: None) as triton:
            environment = {
                "FULLPIPE_URL": triton.url,
                "FULLPIPE_COMFYUI_CONFIG": str(folder / "none.json"),
            }
            nodes = {"triton-full-pipeline": ROOT / "client_nodes"}
            with (
                ComfyServer(folder / "comfyui", nodes, environment, front_end) as comfy,
                opened(comfy.url) as page,
            ):
                for title, workflow in WORKFLOWS.items():
                    make(page, title, workflow)


def make(page, title: str, workflow: list[dict[str, Any]]) -> None:
    """Write one workflow and its picture."""
    build(page, workflow)
    saved = page.evaluate("() => JSON.stringify(app.graph.serialize(), null, 1)")
    (EXAMPLES / f"{title}.json").write_text(saved + "\n")
    if title not in NOT_PAINTED:
        follow_events(page)
        page.get_by_role("button", name="Run", exact=True).click()
        wait_for_event(page, "execution_success")
        fit(page)
        page.wait_for_timeout(1500)  # the pictures load
    page.screenshot(path=EXAMPLES / f"{title}.jpg", type="jpeg", quality=85)


if __name__ == "__main__":
    main()
