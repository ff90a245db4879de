"""The engine that runs anywhere: diffusers' UNet in eager torch, no build step.

On a CPU the rows of a call are shared out to as many threads as there are cores, each of which
computes alone. Rows are independent, so the threads never wait for each other inside a call,
where torch's own way (all threads on every small operation) meets at a barrier hundreds of times
a step and collapses as soon as another process wants a core.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from fullpipe.engines import Engine, full_fp32, in_order
from fullpipe.engines.onednn import pack, share_twins
from fullpipe.engines.shallow import ShallowPass, WholePass
from fullpipe.engines.twins import Share, deal
from fullpipe.errors import SetupError

log = logging.getLogger(__name__)

WRONG_CUDNN = 91900
WRONG_CHANNELS = (1920, 1280)
# A GPU replays whole ticks, each number of rows from a graph of its own.
_GPU_ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32)


class TorchUNet(Engine):
    """A diffusers UNet folder as an `Engine`."""

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        step_cache: bool = False,
    ):
        """Load config.json and the safetensors of `folder`; raises what `load_network` raises."""
        network = pack(load_network(folder, device=device, dtype=dtype))
        self.has_shallow_pass = step_cache
        self._whole = WholePass(network.unet, dtype) if step_cache else network
        self._shallow = ShallowPass(network.unet, dtype) if step_cache else None
        self._shares_twins = share_twins(network.unet)
        self.is_capturable = torch.device(device).type == "cuda"
        self._cores = 1 if self.is_capturable else torch.get_num_threads()
        self._threads = ThreadPoolExecutor(
            self._cores, "unet", initializer=torch.set_num_threads, initargs=(1,)
        )

    def row_counts(self, height: int, width: int, tokens: int) -> tuple[int, ...]:
        """See `Engine`."""
        return _GPU_ROWS if self.is_capturable else ()

    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Predict noise for every row; see `Engine`."""
        if len(tensors["sample"]) < self._cores or (self._cores == 1 and not self._shares_twins):
            outputs = self._predict(tensors)
        elif self._shares_twins:
            outputs = self._predict_shares(tensors)
        else:
            split = {name: tensor.tensor_split(self._cores) for name, tensor in tensors.items()}
            shares = [{name: parts[n] for name, parts in split.items()} for n in range(self._cores)]
            answers = list(self._threads.map(self._predict, shares))
            outputs = tuple(torch.cat(parts) for parts in zip(*answers, strict=True))
        return dict(zip(("noise_pred", "deep"), outputs, strict=False))

    @torch.inference_mode()
    def _predict_shares(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        def predict(share: Share) -> tuple[torch.Tensor, ...]:
            unlike = share.rows[: share.unlike]
            rows = {"sample": unlike, "timestep": unlike}
            return self._predict({n: t[rows.get(n, share.rows)] for n, t in tensors.items()})

        shares = deal(tensors["sample"], tensors["timestep"], self._cores)
        answers = list(self._threads.map(predict, shares))
        order = torch.tensor([row for share in shares for row in share.rows]).argsort()
        return tuple(torch.cat(parts)[order] for parts in zip(*answers, strict=True))

    @torch.inference_mode()
    def _predict(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """noise_pred, and deep where there is one, of tensors by name."""
        inputs = in_order(tensors)
        if "deep" in tensors:
            assert self._shallow is not None
            return (self._shallow(tensors["deep"], *inputs),)
        answer = self._whole(*inputs)
        return answer if isinstance(answer, tuple) else (answer,)


class Fp32Ends(nn.Module):
    """A diffusers UNet of any precision with fp32 inputs and outputs, in the bindings' order."""

    def __init__(self, unet: UNet2DConditionModel, dtype: torch.dtype):
        super().__init__()
        self.unet = unet
        self._dtype = dtype

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Inputs as the UNet bindings of `Engine`; returns noise_pred [R, 4, h, w] fp32."""
        added = None
        if text_embeds is not None and time_ids is not None:
            added = {"text_embeds": text_embeds.to(self._dtype), "time_ids": time_ids}
        (noise_pred,) = self.unet(
            sample.to(self._dtype, memory_format=torch.channels_last),
            timestep,
            encoder_hidden_states=encoder_hidden_states.to(self._dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )
        return noise_pred.float().contiguous()


def load_network(folder: Path, *, device: str, dtype: torch.dtype) -> Fp32Ends:
    """Read a diffusers UNet folder, in channels-last layout and eval mode.

    Raises:
        SetupError: the folder is missing or its files are broken.
    """
    full_fp32(dtype)
    try:
        unet = UNet2DConditionModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise SetupError(
            f"{folder} holds no readable UNet ({error}); `fullpipe assemble` writes one"
        ) from error
    unet = unet.to(device=device, memory_format=torch.channels_last).eval()
    if torch.device(device).type == "cuda" and dtype == torch.float32:
        _mend_wrong_convolution(unet)
    return Fp32Ends(unet, dtype)


def _mend_wrong_convolution(unet: nn.Module) -> None:
    """Take one convolution of SD's UNets from this cuDNN, in place; names and weights stay.

    [8, 1920, 32, 32] to 1280 channels in fp32 is off by 58 % there (docs/engines.md); SDXL comes to
    that at 1024×1024 with 8 rows.
    """
    if torch.backends.cudnn.version() != WRONG_CUDNN:
        return
    for module in unet.modules():
        if (
            isinstance(module, nn.Conv2d)
            and (module.in_channels, module.out_channels) == WRONG_CHANNELS
            and module.kernel_size == (3, 3)
        ):
            log.info("this cuDNN (9.19) computes %s wrongly in fp32; torch's own does it", module)
            module.forward = functools.partial(_convolve, module)  # type: ignore[method-assign]


def _convolve(module: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A plain convolution as an unfolding and a matrix product, without cuDNN."""
    assert isinstance(module.padding, tuple)
    answer: torch.Tensor = torch.ops.aten.thnn_conv2d(
        x, module.weight, module.kernel_size, module.bias, module.stride, module.padding
    )
    return answer
