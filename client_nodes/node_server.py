"""The node Triton Server: which server the connected nodes talk to, and how patiently."""

from __future__ import annotations

from comfy_api.latest import io

from .pack import CATEGORY, SETTINGS, TritonServerType
from .settings import Choice


class TritonServer(io.ComfyNode):
    """Hands on a choice of server; the secrets stay in the configuration."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `io.ComfyNode`."""
        return io.Schema(
            node_id="TritonServer",
            display_name="Triton Server",
            category=CATEGORY,
            description=(
                "Another server than the default one. Keys and certificates are never here: they"
                " are in triton_full_pipeline.json or in FULLPIPE_API_KEY and FULLPIPE_CA_CERT."
            ),
            inputs=[
                io.Combo.Input(
                    "name",
                    options=SETTINGS.names(),
                    tooltip="A server of triton_full_pipeline.json in ComfyUI's user folder.",
                ),
                io.String.Input(
                    "address",
                    default="",
                    tooltip=(
                        "http://HOST:PORT instead. A configured key is sent only to the address"
                        " that it is configured for."
                    ),
                ),
                io.Float.Input(
                    "connect_timeout_s",
                    default=0.0,
                    min=0.0,
                    max=600.0,
                    step=1.0,
                    tooltip="0: as configured (5 s).",
                ),
                io.Float.Input(
                    "read_timeout_s",
                    default=0.0,
                    min=0.0,
                    max=3600.0,
                    step=10.0,
                    tooltip="Longest silence of the server. 0: as configured (330 s).",
                ),
                io.Int.Input(
                    "retries",
                    default=-1,
                    min=-1,
                    max=20,
                    tooltip="Repeats while nothing was started. -1: as configured (3).",
                ),
            ],
            outputs=[TritonServerType.Output("server", display_name="server")],
        )

    @classmethod
    def validate_inputs(cls, name: str | None) -> bool | str:
        """A saved workflow may name a server that is not configured here."""
        known = SETTINGS.names()
        if name is None or name in known:
            return True
        return f"server {name!r} is not in triton_full_pipeline.json; known: {', '.join(known)}"

    @classmethod
    def execute(
        cls, name: str, address: str, connect_timeout_s: float, read_timeout_s: float, retries: int
    ) -> io.NodeOutput:
        """See the inputs' tooltips."""
        changes = {}
        if connect_timeout_s:
            changes["connect_timeout_s"] = connect_timeout_s
        if read_timeout_s:
            changes["read_timeout_s"] = read_timeout_s
        if retries >= 0:
            changes["retries"] = retries
        choice = Choice(name, address, tuple(changes.items()))
        SETTINGS.resolve(choice)  # a mistake shows here and not in every node behind
        return io.NodeOutput(choice)
