"""What a runtime outside of torch executes, in the places where torch's networks stand.

A runtime is only asked to fill given tensors from given tensors, so that nothing is copied and
every shape is known before the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from fullpipe.engines import Engine
from fullpipe.text.clip import ClipTextModel


class Network(Protocol):
    """A loaded file of ONNX Runtime or TensorRT."""

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Fill `outputs`; all tensors are contiguous and on the network's device.

        Raises:
            InvalidRequest: a shape is outside of what the network was built for.
        """
        ...


class NetworkUNet(Engine):
    """A UNet file as an engine."""

    def __init__(self, network: Network):
        self._network = network

    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Predict noise for every row; see `Engine`."""
        inputs = {name: tensor.contiguous() for name, tensor in tensors.items()}
        inputs["timestep"] = inputs["timestep"].long()
        outputs = {"noise_pred": torch.empty_like(inputs["sample"])}
        self._network.run(inputs, outputs)
        return outputs


class NetworkVaeDecoder:
    """A VAE decoder's file in the place of `fullpipe.stages.VaeDecoder`."""

    def __init__(self, network: Network, device: str, scale: int):
        """`scale`: pixels per latent pixel along one axis."""
        self._network, self._device, self._scale = network, device, scale

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[N, 4, h, w] fp32 → [N, H, W, 3] uint8 on the CPU, one picture after the other."""
        count, _, height, width = latents.shape
        shape = (height * self._scale, width * self._scale, 3)
        images = torch.empty((count, *shape), dtype=torch.uint8, device=self._device)
        latents = latents.to(self._device, torch.float32).contiguous()
        for index in range(count):
            one = slice(index, index + 1)
            self._network.run({"latents": latents[one]}, {"images": images[one]})
        return images.cpu()


class NetworkVaeEncoder:
    """A VAE encoder's file in the place of `fullpipe.stages.VaeEncoder`."""

    def __init__(self, network: Network, device: str, scale: int, channels: int):
        """`scale`: pixels per latent pixel along one axis; `channels`: of a latent."""
        self._network, self._device, self._scale = network, device, scale
        self._channels = channels

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[N, H, W, 3] uint8 → [N, 4, h, w] fp32 on the CPU, one picture after the other."""
        count, height, width, _ = images.shape
        shape = (count, self._channels, height // self._scale, width // self._scale)
        latents = torch.empty(shape, dtype=torch.float32, device=self._device)
        images = images.to(self._device).contiguous()
        for index in range(count):
            one = slice(index, index + 1)
            self._network.run({"images": images[one]}, {"latents": latents[one]})
        return latents.cpu()


class NetworkClip:
    """A CLIP file in the place of a `ClipTextModel`.

    Token vectors, final norm and projection stay torch's: they are looked up or run once a prompt.
    """

    def __init__(self, model: ClipTextModel, network: Network):
        """Take everything but the layers from `model`, which loses them."""
        self.config = model.config
        self.embeddings = model.embeddings
        self.final_layer_norm = model.final_layer_norm
        self.embed, self.project = model.embed, model.project
        del model.encoder
        self._network = network

    def __call__(
        self, inputs_embeds: torch.Tensor, hidden_layer: int | None, *, needs_last: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """See `ClipTextModel.forward`."""
        outputs = {
            "last_hidden_state": torch.empty_like(inputs_embeds),
            "hidden_states": inputs_embeds.new_empty(
                (self.config.num_hidden_layers, *inputs_embeds.shape)
            ),
        }
        self._network.run({"inputs_embeds": inputs_embeds.contiguous()}, outputs)
        hidden = None if hidden_layer is None else outputs["hidden_states"][hidden_layer]
        return (outputs["last_hidden_state"] if needs_last else None), hidden
