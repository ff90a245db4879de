"""A MODEL whose every step is a request to the Triton model `unet`.

The old way: one round trip a step. It is kept for custom samplers, areas and everything else that
needs ComfyUI's own sampling, and as what the benchmark compares with.
"""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import numpy as np
import torch

from . import jobs
from .call import Call
from .endpoint import Endpoint, Session
from .errors import Refused
from .offers import Facts
from .settings import Server
from .triton import infer


def make_model(server: Server, facts: Facts) -> comfy.model_patcher.ModelPatcher:
    """A MODEL for ComfyUI's samplers.

    Raises:
        Refused: the pipeline keeps its UNet in the loop, or says too little about it.
    """
    network = facts.document.get("network")
    if not network or "unet" not in facts.document.get("models", {}):
        raise Refused(
            f"{server.url}, pipeline {facts.pipeline!r} serves no UNet of its own; assemble it with"
            " `fullpipe assemble --unet bls`, or use Triton KSampler, which needs none"
        )
    is_sdxl = network["is_sdxl"]
    schedule = network["scheduler"]
    family = comfy.supported_models.SDXL if is_sdxl else comfy.supported_models.SD15
    config = family({**family.unet_config, "disable_unet_model_creation": True})
    config.sampling_settings = {
        "beta_schedule": _BETAS[schedule.get("beta_schedule", "scaled_linear")],
        "linear_start": schedule.get("beta_start", 0.00085),
        "linear_end": schedule.get("beta_end", 0.012),
        "timesteps": schedule.get("num_train_timesteps", 1000),
        "zsnr": schedule.get("rescale_betas_zero_snr", False),
    }
    config.latent_format.scale_factor = network["scaling_factor"]
    prediction = schedule.get("prediction_type", "epsilon")
    kind = {"epsilon": "EPS", "v_prediction": "V_PREDICTION"}[prediction]
    model = (_RemoteSDXL if is_sdxl else comfy.model_base.BaseModel)(
        config, getattr(comfy.model_base.ModelType, kind)
    )
    model.diffusion_model = RemoteUNet(server, facts.model("unet"))
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


# ComfyUI's names of diffusers' schedules.
_BETAS = {"scaled_linear": "linear", "linear": "sqrt_linear"}


class RemoteUNet(torch.nn.Module):
    """Stands where ComfyUI expects the network; holds no weights."""

    dtype = torch.float32

    def __init__(self, server: Server, model: str):
        super().__init__()
        self._server = server
        self._model = model
        self._endpoint = Endpoint(server)
        self._session = Session(self._endpoint)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: Any = None,
        **unknown: Any,
    ) -> torch.Tensor:
        """One request.

        Args:
            x: [B, 4, h, w], scaled for the network.
            timesteps: [B].
            context: [B, 77n, C].
            y: SDXL: [B, P + 6], pooled text and six sizes; see `_RemoteSDXL`.
        Raises:
            Refused: something that changes the network from inside, such as a ControlNet.
        """
        patches = (transformer_options or {}).get("patches", {})
        extras = [name for name, value in unknown.items() if value is not None]
        if control is not None or patches or extras:
            what = "a ControlNet" if control is not None else ", ".join([*patches, *extras])
            raise Refused(f"Triton Remote UNet cannot apply {what}: the network is on the server")
        inputs = {
            "sample": _array(x),
            "timestep": timesteps.detach().round().long().cpu().numpy(),
            "encoder_hidden_states": _array(context),
        }
        if y is not None:
            inputs["text_embeds"] = _array(y[:, :-SIZES])
            inputs["time_ids"] = _array(y[:, -SIZES:])
        call = _Interruptible()

        def attempt() -> np.ndarray:
            return infer(
                self._endpoint, self._model, inputs, ["noise_pred"], session=self._session
            )["noise_pred"]

        noise_pred = jobs.repeat(self._server, call, attempt)
        return torch.from_numpy(np.array(noise_pred)).to(x.device)


SIZES = 6  # original height and width, crop, target height and width


class _RemoteSDXL(comfy.model_base.SDXL):
    """Hands pooled text and sizes on as numbers; the network on the server embeds them itself."""

    def encode_adm(self, **kwargs: Any) -> torch.Tensor:
        """See `comfy.model_base.SDXL`."""
        pooled = comfy.model_base.sdxl_pooled(kwargs, self.noise_augmentor)
        height, width = kwargs.get("height", 768), kwargs.get("width", 768)
        sizes = [height, width, kwargs.get("crop_h", 0), kwargs.get("crop_w", 0)]
        sizes += [kwargs.get("target_height", height), kwargs.get("target_width", width)]
        row = torch.tensor([sizes], dtype=torch.float32).repeat(len(pooled), 1)
        return torch.cat((pooled.float().to(row.device), row), dim=1)


class _Interruptible(Call):
    """For ComfyUI's sampler, which looks for interrupts between steps: here between repeats."""

    def wait(self, seconds: float) -> None:
        """See `Call`."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        super().wait(seconds)
        comfy.model_management.throw_exception_if_processing_interrupted()


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
