"""What all nodes of the pack share: the settings, the offers, the inputs that repeat."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from .endpoint import Endpoint
from .offers import Facts, Offers
from .settings import Choice, Server, Settings, default_path

SETTINGS = Settings(default_path())
OFFERS = Offers(SETTINGS)
CATEGORY = "Triton"
TritonServerType = io.Custom("TRITON_SERVER")
# Stands in validate_inputs for an input that is not there; a connected one is None.
ABSENT = object()


def pipeline_input() -> Any:
    """Which pipeline of the server."""
    return io.Combo.Input(
        "pipeline",
        options=OFFERS.pipelines(),
        tooltip="A pipeline of the server: a checkpoint and its settings. R refreshes the list.",
    )


def server_input() -> Any:
    """Which server, if not the default one."""
    return TritonServerType.Input(
        "server",
        optional=True,
        tooltip="Another server than the default one: connect the node Triton Server.",
    )


def sampler_inputs() -> list[Any]:
    """Sampler and schedule, as the servers list them."""
    return [
        io.Combo.Input(
            "sampler_name",
            options=OFFERS.union("samplers", comfy.samplers.KSampler.SAMPLERS),
            default=OFFERS.default("sampler_name", "euler"),
        ),
        io.Combo.Input(
            "scheduler",
            options=OFFERS.union("schedulers", comfy.samplers.KSampler.SCHEDULERS),
            default=OFFERS.default("scheduler", "normal"),
        ),
    ]


def seed_input() -> Any:
    """The seed, which changes after every run unless told otherwise."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip="Same seed, same picture as with ComfyUI's own KSampler.",
    )


def steps_input() -> Any:
    """Sampler steps."""
    return io.Int.Input("steps", default=OFFERS.default("steps", 20), min=1, max=10_000)


def cfg_input() -> Any:
    """Guidance."""
    return io.Float.Input(
        "cfg",
        default=OFFERS.default("cfg", 8.0),
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.01,
        tooltip="Guidance; at 1.0 the negative prompt is not computed, which halves the work.",
    )


def denoise_input() -> Any:
    """How much of the start picture is repainted."""
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01)


def preview_input() -> Any:
    """Whether to show every step."""
    return io.Boolean.Input(
        "preview",
        default=True,
        tooltip="Show every step with a small picture. Off: one request, no more.",
    )


def connect(choice: Choice | None) -> tuple[Server, Endpoint]:
    """The server that a node talks to; raises Refused."""
    server = SETTINGS.resolve(choice)
    return server, Endpoint(server)


def facts(server: Server, choice: Choice | None, pipeline: str) -> Facts:
    """See `Offers.facts`."""
    return OFFERS.facts(server, choice, pipeline)


def complaint(
    pipeline: str | None, server: Any, sampler_name: str | None = None, scheduler: str | None = None
) -> str | bool:
    """What ComfyUI's validation says of the combos: True, or why the server would refuse them.

    Args:
        server: ABSENT where the node talks to the default server, whose offers are known; what a
            connected one offers shows when it is asked.
    """
    if server is not ABSENT or pipeline is None:
        return True
    choices = {"samplers": sampler_name, "schedulers": scheduler}
    given = {key: value for key, value in choices.items() if value is not None}
    return OFFERS.complaint(pipeline, given) or True
