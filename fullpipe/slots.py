"""Slots: the images in flight of one latent shape, and one tick over some of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch

from fullpipe.engines import Engine
from fullpipe.graphs import TickGraphs
from fullpipe.job import Job, Work
from fullpipe.samplers import REGISTERS, advance
from fullpipe.schedulers import ModelSampling
from fullpipe.seats import Seats, pack_seats

FIRST_TABLE_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Shape:
    """What must be equal for two images to share a UNet call."""

    height: int
    width: int
    tokens: int


@dataclasses.dataclass
class Occupant:
    """Who sits in a slot: image `image` of `job`, at table row `position`.

    Attributes:
        last_tick: the number of its last tick, -1 before its first.
        waits_since: when that was launched, or when it got its slot; `time.monotonic`.
    """

    job: Job
    image: int
    position: int = 0
    last_tick: int = -1
    waits_since: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def work(self) -> Work:
        """What the loop needs of the job; there from the moment that it has a slot."""
        assert self.job.work is not None
        return self.job.work

    @property
    def rows(self) -> int:
        """UNet rows of one tick."""
        return 2 if self.work.is_guided else 1

    @property
    def keeps_deep(self) -> bool:
        """Whether the image reuses deep features of the UNet."""
        return self.work.step_cache > 1

    @property
    def is_shallow(self) -> bool:
        """Whether its next table row takes a shallow pass of the UNet."""
        return self.position % self.work.step_cache != 0

    @property
    def is_done(self) -> bool:
        """Whether the last table row has been run."""
        return self.position == len(self.work.table.sigmas)


class Group:
    """Preallocated slot tensors of one shape; S slots and a spare one, T table rows, K registers.

    Everything that a tick reads or writes lies in tensors indexed by slot, on the loop's device,
    so that a tick is gather, UNet, contraction and scatter, whoever the slots belong to. Where each
    slot stands in its table is counted there too: a tick is told its seats and nothing else. So on
    a GPU the whole tick replays as one graph. The spare slot serves the seats that a tick of fixed
    size leaves empty; its table is all zeros.

    For images that cache steps, a tick is either a whole pass, which leaves each slot's deep
    features of the UNet in its slot, or a shallow one, which reads them there.
    """

    def __init__(self, shape: Shape, capacity: int, device: torch.device, sampling: ModelSampling):
        self.shape = shape
        self.occupants: list[Occupant | None] = [None] * capacity
        self._device = device
        self._sampling = sampling
        self._graphs = TickGraphs(device)
        self._slots = capacity + 1
        self._registers = torch.zeros(0)
        self._denoised = torch.zeros(0)
        self._noise = torch.zeros(0)
        self._embeds = torch.zeros(0)
        self._pooled: torch.Tensor | None = None
        self._time_ids: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self._kept_image = torch.zeros(0)
        self._kept_noise = torch.zeros(0)
        self._deep: torch.Tensor | None = None
        self._position = self._zeros(dtype=torch.int64)
        self._cfg = self._zeros(1, 1, 1)
        self._sigmas = self._zeros(FIRST_TABLE_ROWS)
        self._timesteps = self._zeros(FIRST_TABLE_ROWS, dtype=torch.int64)
        self._matrices = self._zeros(FIRST_TABLE_ROWS, REGISTERS, REGISTERS + 3)

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
        occupant = Occupant(job, image)
        work = occupant.work
        slot = self.occupants.index(None)
        self._fit(work)
        rows = len(work.table.sigmas)
        sigmas = torch.as_tensor(work.table.sigmas, dtype=torch.float32)
        self._sigmas[slot, :rows] = sigmas.to(self._device)
        self._timesteps[slot, :rows] = self._sampling.timestep(sigmas).to(self._device)
        self._matrices[slot, :rows] = torch.as_tensor(
            work.table.matrices, dtype=torch.float32, device=self._device
        )
        self._position[slot] = 0
        self._cfg[slot] = work.cfg
        self._registers[slot] = 0
        self._registers[slot, 0] = work.start[image].to(self._device)
        self._noise[slot] = 0
        self._embeds[slot] = work.embeds.to(self._device)
        if self._pooled is not None and self._time_ids is not None:
            assert work.pooled is not None and work.time_ids is not None
            self._pooled[slot] = work.pooled.to(self._device)
            self._time_ids[slot] = work.time_ids.to(self._device)
        if self._mask is not None:
            has_mask = work.mask is not None
            self._mask[slot] = work.mask[image].to(self._device) if work.mask is not None else 1
            self._kept_image[slot] = work.latent_image[image].to(self._device) if has_mask else 0
            self._kept_noise[slot] = work.mask_noise[image].to(self._device) if has_mask else 0
        self.occupants[slot] = occupant

    def latents(self, slot: int) -> torch.Tensor:
        """The current sample of a slot, [4, h, w] fp32, own storage on the loop's device."""
        return self._registers[slot, 0].clone()

    def denoised(self, slot: int) -> torch.Tensor:
        """The guided x0 prediction of a slot's last tick, [4, h, w] fp32, own storage there."""
        return self._denoised[slot].clone()

    @torch.inference_mode()
    def tick(self, slots: Sequence[int], unet: Engine) -> int | None:
        """Advance some slots by one table row each.

        Nothing is written before the UNet has answered, so a failed tick may be repeated. On a GPU
        the work is only queued on the current stream when this returns.

        Args:
            slots: B distinct taken slots, all of them due for a shallow pass or none.
            unet: gets B rows of the positive half, then one row for every guided slot.
        Returns:
            The number of rows that the engine was built for and ran, empty ones included; None
            where it runs any number.
        """
        sitting = [self.occupant(slot) for slot in slots]
        is_shallow = sitting[0].is_shallow
        keeps_deep = not is_shallow and any(occupant.keeps_deep for occupant in sitting)
        for slot, occupant in zip(slots, sitting, strict=True):
            work = occupant.work
            if work.table.noise[occupant.position] is not None:
                drawn = work.noise_at(occupant.position, occupant.image)
                self._noise[slot].copy_(drawn, non_blocking=True)

        shape, needed = self.shape, sum(occupant.rows for occupant in sitting)
        built = unet.row_counts(shape.height, shape.width, shape.tokens)
        rows = min((count for count in built if count >= needed), default=None)
        is_guided = [occupant.work.is_guided for occupant in sitting]
        packed, seats = pack_seats(slots, is_guided, self._slots - 1, rows)
        has_masks = any(occupant.work.mask is not None for occupant in sitting)
        kind = (has_masks, is_shallow, keeps_deep)
        if self._graphs.are_possible and unet.is_capturable and rows is not None:
            self._graphs.replay(
                (rows, *kind),
                packed,
                lambda: pack_seats((), (), self._slots - 1, rows)[0],
                lambda device: self._advance(Seats.view(device, seats), unet, *kind),
            )
        else:
            self._advance(Seats.view(packed.to(self._device), seats), unet, *kind)
        for occupant in sitting:
            occupant.work.release_noise(occupant.position)
            occupant.position += 1
        return rows

    def _advance(
        self, seats: Seats, unet: Engine, has_masks: bool, is_shallow: bool, keeps_deep: bool
    ) -> None:
        """The tick itself: only tensors, nothing that a graph could not replay for other seats."""
        slot, sampling = seats.slot, self._sampling
        position = self._position[slot]
        sigma = self._sigmas[slot, position]
        sample = self._registers[slot, 0]
        if has_masks:
            # Outside the mask the UNet sees the start image at this noise level, as in ComfyUI.
            assert self._mask is not None
            mask, kept_image = self._mask[slot], self._kept_image[slot]
            kept = kept_image + self._kept_noise[slot] * sigma.view(-1, 1, 1, 1)
            sample = sample * mask + kept * (1.0 - mask)
        scaled = sample * sampling.input_scale(sigma).view(-1, 1, 1, 1)
        row_slot = slot[seats.seat]
        inputs = {
            "sample": scaled[seats.seat],
            "timestep": self._timesteps[slot, position][seats.seat],
            "encoder_hidden_states": self._embeds[row_slot, seats.half],
        }
        if self._pooled is not None and self._time_ids is not None:
            inputs["text_embeds"] = self._pooled[row_slot, seats.half]
            inputs["time_ids"] = self._time_ids[row_slot]
        if is_shallow:
            assert self._deep is not None
            inputs["deep"] = self._deep[row_slot, seats.half]
        answer = unet.run(inputs)
        if keeps_deep:
            self._keep(answer["deep"], row_slot, seats.half)
        rows = sampling.denoised(sample[seats.seat], sigma[seats.seat], answer["noise_pred"])
        negative = rows[seats.negative]
        denoised = negative + (rows[seats.positive] - negative) * self._cfg[slot]
        if has_masks:
            denoised = denoised * mask + kept_image * (1.0 - mask)
        matrices = self._matrices[slot, position]
        self._registers[slot] = advance(
            self._registers[slot], denoised, negative, self._noise[slot], matrices
        )
        self._denoised[slot] = denoised
        self._position[slot] = position + seats.is_taken

    def _keep(self, deep: torch.Tensor, slot: torch.Tensor, half: torch.Tensor) -> None:
        """Put each row's deep features into its slot.

        The first ones size the tensor. On a GPU those are of a tick that warms up for its graph,
        which is not recorded yet, so the memory is of no graph's pool.
        """
        if self._deep is None:
            shape = (self._slots, 2, *deep.shape[1:])
            self._deep = torch.zeros(shape, dtype=deep.dtype, device=deep.device)
        self._deep[slot, half] = deep

    def _fit(self, work: Work) -> None:
        """Size the tensors for this job: the first one decides the widths, longer tables grow T."""
        if not self._registers.numel():
            sample = work.start.shape[1:]
            self._registers = self._zeros(REGISTERS, *sample)
            self._denoised, self._noise = self._zeros(*sample), self._zeros(*sample)
            self._embeds = self._zeros(*work.embeds.shape)
            if work.pooled is not None and work.time_ids is not None:
                self._pooled = self._zeros(*work.pooled.shape)
                self._time_ids = self._zeros(*work.time_ids.shape)
        if work.mask is not None and self._mask is None:
            sample = work.start.shape[1:]
            self._mask = self._zeros(1, *sample[1:]) + 1.0
            self._kept_image, self._kept_noise = self._zeros(*sample), self._zeros(*sample)
        missing = len(work.table.sigmas) - self._sigmas.shape[1]
        if missing > 0:
            missing = max(missing, self._sigmas.shape[1])
            self._sigmas = _grown(self._sigmas, missing)
            self._timesteps = _grown(self._timesteps, missing)
            self._matrices = _grown(self._matrices, missing)
            self._graphs.forget()  # they read the old ones

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(self._slots, *shape, dtype=dtype, device=self._device)


def _grown(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([tensor, tensor.new_zeros(len(tensor), rows, *tensor.shape[2:])], dim=1)
