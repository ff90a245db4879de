"""Seats: which slots take part in a tick, and which rows of the UNet call are whose."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True)
class Seats:
    """Index tensors of one tick: B slots take part, their halves make R rows.

    All are int64. They lie in one tensor, so that a tick is told its seats in one copy.

    Attributes:
        slot: [B], the slot of each seat; an empty seat names the spare slot.
        positive: [B], the row of each seat's positive half.
        negative: [B], the row of its negative half; the positive row again where there is none.
        is_taken: [B], 0 for an empty seat.
        seat: [R], the seat of each row.
        half: [R], 0 for the positive and 1 for the negative half.
    """

    slot: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor
    is_taken: torch.Tensor
    seat: torch.Tensor
    half: torch.Tensor

    @classmethod
    def view(cls, packed: torch.Tensor, seats: int) -> Seats:
        """The six tensors in a packed one, [4 · seats + 2 · rows]."""
        rows = (len(packed) - 4 * seats) // 2
        return cls(*packed.split([seats] * 4 + [rows] * 2))


def pack_seats(
    slots: Sequence[int], is_guided: Sequence[bool], spare: int, rows: int | None = None
) -> tuple[torch.Tensor, int]:
    """Seat some slots; the positive halves come first, then the negative ones that there are.

    Args:
        slots: distinct slots.
        is_guided: for each, whether its negative half is evaluated.
        spare: a slot that nobody has, for empty seats.
        rows: fill up to so many rows, and as many seats; None leaves nothing empty.
    Returns:
        What `Seats.view` takes: a packed tensor on the CPU, and the number of seats.
    """
    taken, guided = len(slots), [seat for seat, yes in enumerate(is_guided) if yes]
    needed = taken + len(guided)
    seats, rows = (taken, needed) if rows is None else (rows, rows)
    negative = list(range(taken))
    for row, seat in enumerate(guided, start=taken):
        negative[seat] = row
    empty_seats, empty_rows = seats - taken, rows - needed
    # An empty row belongs to an empty seat, of which there are at least as many.
    empty_row = needed if empty_rows else 0
    packed = [
        *slots, *[spare] * empty_seats,
        *range(taken), *[empty_row] * empty_seats,
        *negative, *[empty_row] * empty_seats,
        *[1] * taken, *[0] * empty_seats,
        *range(taken), *guided, *[taken] * empty_rows,
        *[0] * taken, *[1] * len(guided), *[0] * empty_rows,
    ]  # fmt: skip
    return torch.tensor(packed), seats
