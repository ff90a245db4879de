"""Slots: the images in flight of one latent shape, and one tick over some of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fullpipe.engines import Engine
from fullpipe.job import Job
from fullpipe.samplers import REGISTERS, advance
from fullpipe.schedulers import ModelSampling


@dataclasses.dataclass(frozen=True)
class Shape:
    """What must be equal for two images to share a UNet call."""

    height: int
    width: int
    tokens: int


@dataclasses.dataclass
class Occupant:
    """Who sits in a slot: image `image` of `job`, at table row `position`."""

    job: Job
    image: int
    position: int = 0
    last_tick: int = -1


class Group:
    """Preallocated slot tensors of one shape; S slots, T table rows at most, K registers.

    Everything that a tick reads or writes lies in tensors indexed by slot, on the loop's device,
    so that a tick is gather, UNet, contraction and scatter, whoever the slots belong to.
    """

    def __init__(self, shape: Shape, capacity: int, device: torch.device, sampling: ModelSampling):
        self.shape = shape
        self.occupants: list[Occupant | None] = [None] * capacity
        self._device = device
        self._sampling = sampling
        self._registers = torch.zeros(0)
        self._embeds = torch.zeros(0)
        self._pooled: torch.Tensor | None = None
        self._time_ids: torch.Tensor | None = None
        self._sigmas = torch.zeros(capacity, 0, device=device)
        self._timesteps = torch.zeros(capacity, 0, dtype=torch.int64, device=device)
        self._matrices = torch.zeros(capacity, 0, REGISTERS, REGISTERS + 3, device=device)
        self._cfg = torch.ones(capacity, 1, 1, 1, device=device)

    @property
    def taken(self) -> list[int]:
        """Slots that hold an image."""
        return [slot for slot, occupant in enumerate(self.occupants) if occupant is not None]

    def occupant(self, slot: int) -> Occupant:
        """The image in a slot that is known to be taken."""
        occupant = self.occupants[slot]
        assert occupant is not None
        return occupant

    def put(self, job: Job, image: int) -> None:
        """Move one image of a job into a free slot; the caller knows that there is one."""
        work = job.work
        assert work is not None
        slot = self.occupants.index(None)
        self._fit(job)
        rows = len(work.table.sigmas)
        sigmas = torch.as_tensor(work.table.sigmas, dtype=torch.float32)
        self._sigmas[slot, :rows] = sigmas.to(self._device)
        self._timesteps[slot, :rows] = self._sampling.timestep(sigmas).to(self._device)
        self._matrices[slot, :rows] = torch.as_tensor(
            work.table.matrices, dtype=torch.float32, device=self._device
        )
        self._registers[slot] = 0
        self._registers[slot, 0] = work.start[image].to(self._device)
        self._embeds[slot] = work.embeds.to(self._device)
        self._cfg[slot] = work.cfg
        if self._pooled is not None and self._time_ids is not None:
            assert work.pooled is not None and work.time_ids is not None
            self._pooled[slot] = work.pooled.to(self._device)
            self._time_ids[slot] = work.time_ids.to(self._device)
        self.occupants[slot] = Occupant(job, image)

    def latents(self, slot: int) -> torch.Tensor:
        """The current sample of a slot, [4, h, w] fp32, own storage on the CPU."""
        return self._registers[slot, 0].to("cpu", copy=True)

    @torch.inference_mode()
    def tick(self, slots: Sequence[int], unet: Engine) -> torch.Tensor:
        """Advance some slots by one table row each.

        Nothing is written before the UNet has answered, so a failed tick may be repeated.

        Args:
            slots: B distinct taken slots.
            unet: gets B rows of the positive half, then one row for every guided slot.
        Returns:
            [B, 4, h, w] fp32, the guided x0 predictions of this tick.
        """
        sitting = [self.occupant(slot) for slot in slots]
        index = torch.tensor(slots, device=self._device)
        position = torch.tensor([occupant.position for occupant in sitting], device=self._device)
        sigma = self._sigmas[index, position]
        sample = self._registers[index, 0]
        for row, occupant in enumerate(sitting):
            sample[row] = self._keep_unmasked(occupant, sample[row], sigma[row])

        guided = [row for row, occupant in enumerate(sitting) if _work(occupant).is_guided]
        rows = torch.cat([torch.arange(len(slots)), torch.tensor(guided, dtype=torch.int64)])
        half = torch.tensor([0] * len(slots) + [1] * len(guided), device=self._device)
        rows = rows.to(self._device)
        noise_pred = unet.run(self._unet_inputs(sample, sigma, index, position, rows, half))
        denoised = self._sampling.denoised(sample[rows], sigma[rows], noise_pred["noise_pred"])

        positive, negative = denoised[: len(slots)], denoised[: len(slots)].clone()
        if guided:
            negative[guided] = denoised[len(slots) :]
            mixed = (
                negative[guided] + (positive[guided] - negative[guided]) * self._cfg[index[guided]]
            )
            positive = positive.clone()
            positive[guided] = mixed
        for row, occupant in enumerate(sitting):
            positive[row] = _masked(occupant, positive[row])
        self._registers[index] = advance(
            self._registers[index],
            positive,
            negative,
            self._noise(sitting, sample),
            self._matrices[index, position],
        )
        for occupant in sitting:
            _work(occupant).release_noise(occupant.position)
            occupant.position += 1
        return positive

    def _unet_inputs(
        self,
        sample: torch.Tensor,
        sigma: torch.Tensor,
        index: torch.Tensor,
        position: torch.Tensor,
        rows: torch.Tensor,
        half: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        slot = index[rows]
        inputs = {
            "sample": (sample * self._sampling.input_scale(sigma).view(-1, 1, 1, 1))[rows],
            "timestep": self._timesteps[index, position][rows],
            "encoder_hidden_states": self._embeds[slot, half],
        }
        if self._pooled is not None and self._time_ids is not None:
            inputs["text_embeds"] = self._pooled[slot, half]
            inputs["time_ids"] = self._time_ids[slot]
        return inputs

    def _noise(self, sitting: list[Occupant], sample: torch.Tensor) -> torch.Tensor:
        noise = torch.zeros_like(sample)
        for row, occupant in enumerate(sitting):
            work = _work(occupant)
            if work.table.noise[occupant.position] is not None:
                noise[row] = work.noise_at(occupant.position, occupant.image).to(self._device)
        return noise

    def _keep_unmasked(
        self, occupant: Occupant, sample: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """Outside the mask the UNet sees the start image at this noise level, as ComfyUI does."""
        work, image = _work(occupant), occupant.image
        if work.mask is None:
            return sample
        mask = work.mask[image].to(self._device)
        noise, latent_image = work.mask_noise[image], work.latent_image[image]
        kept = latent_image.to(self._device) + noise.to(self._device) * sigma
        return sample * mask + kept * (1.0 - mask)

    def _fit(self, job: Job) -> None:
        """Size the tensors for this job: the first one decides the widths, longer tables grow T."""
        work = job.work
        assert work is not None
        capacity, device = len(self.occupants), self._device
        if not self._registers.numel():
            self._registers = torch.zeros(capacity, REGISTERS, *work.start.shape[1:], device=device)
            self._embeds = torch.zeros(capacity, *work.embeds.shape, device=device)
            if work.pooled is not None and work.time_ids is not None:
                self._pooled = torch.zeros(capacity, *work.pooled.shape, device=device)
                self._time_ids = torch.zeros(capacity, *work.time_ids.shape, device=device)
        missing = len(work.table.sigmas) - self._sigmas.shape[1]
        if missing > 0:
            missing = max(missing, self._sigmas.shape[1])
            self._sigmas = _grown(self._sigmas, missing)
            self._timesteps = _grown(self._timesteps, missing)
            self._matrices = _grown(self._matrices, missing)


def _work(occupant: Occupant):
    work = occupant.job.work
    assert work is not None
    return work


def _masked(occupant: Occupant, denoised: torch.Tensor) -> torch.Tensor:
    work, image = _work(occupant), occupant.image
    if work.mask is None:
        return denoised
    mask = work.mask[image].to(denoised.device)
    return denoised * mask + work.latent_image[image].to(denoised.device) * (1.0 - mask)


def _grown(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([tensor, tensor.new_zeros(len(tensor), rows, *tensor.shape[2:])], dim=1)
