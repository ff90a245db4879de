"""How many rows a tick takes, where an engine runs fixed numbers of them.

A tick of 16 rows costs the same with 11 images' rows in it as with all, and whether two ticks of 8
do more in that time depends on the network, the size and the GPU. So the loop watches what each
number costs here, and takes the one that does the most work in a second.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable

# Before a number's cost is known, a tick of it may be this empty.
MIN_FILLED = 0.75
# A number is tried if it is more than this part of the largest that could be filled: a row never
# costs much less in company of few than in company of many.
_WORTH_TRYING = 0.25
# The first tick of a number records its graph or warms up.
_IGNORED_TICKS = 1


class RowCounts:
    """What each number of rows has been seen to cost; for one thread."""

    def __init__(self) -> None:
        self._ticks: dict[tuple[Hashable, int], int] = {}
        self._seconds: dict[tuple[Hashable, int], float] = {}

    def saw(self, kind: Hashable, count: int, seconds: float) -> None:
        """Take note of one tick of `count` rows; its least time counts, as others add to it."""
        key = kind, count
        self._ticks[key] = self._ticks.get(key, 0) + 1
        if self._ticks[key] > _IGNORED_TICKS:
            self._seconds[key] = min(seconds, self._seconds.get(key, math.inf))

    def choose(self, kind: Hashable, wanted: int, allowed: int, built: Iterable[int]) -> int:
        """The number of rows to fill.

        Args:
            kind: of tick, within which a number of rows always costs the same.
            wanted: rows that wait.
            allowed: rows that a tick may have; where nothing built is so small, the smallest is.
            built: the numbers that there are, at least one.
        """
        counts = sorted(built)
        fitting = [count for count in counts if count <= allowed] or counts[:1]
        filled = [count for count in fitting if wanted >= MIN_FILLED * count] or fitting[:1]
        for count in reversed(filled):
            if count > _WORTH_TRYING * filled[-1] and (kind, count) not in self._seconds:
                return count
        known = [count for count in fitting if (kind, count) in self._seconds]
        return max(known, key=lambda count: min(wanted, count) / self._seconds[kind, count])
