"""Images that wait for a slot: one line for all the loops of a pipeline, oldest first."""

from __future__ import annotations

import threading
from collections import deque

from fullpipe.job import Job


class WaitingLine:
    """A queue from which every loop helps itself; on machines with several GPUs, the idlest first.

    A loop that already has more images in flight than another leaves the next one to that other,
    which takes it at its next tick, so that no GPU idles while images wait for a busy one.
    """

    def __init__(self) -> None:
        self._images: deque[tuple[Job, int]] = deque()
        self._in_flight: list[int] = []
        self._is_closing = False
        self._news = threading.Condition()

    def join(self) -> int:
        """Take part as a loop; returns its number, which the other methods ask for."""
        with self._news:
            self._in_flight.append(0)
            return len(self._in_flight) - 1

    def add(self, job: Job) -> None:
        """Queue a prepared job; every image of it takes a slot of its own."""
        with self._news:
            self._images.extend((job, image) for image in range(len(job.latents)))
            self._news.notify_all()

    def nudge(self) -> None:
        """Wake the loops, to have cancelled jobs swept now rather than at the next tick."""
        with self._news:
            self._news.notify_all()

    def close(self) -> None:
        """Let every loop end."""
        with self._news:
            self._is_closing = True
            self._news.notify_all()

    def wait(self, has_work: bool) -> bool:
        """Wait for images unless the loop has work of its own; False when the line is closed."""
        with self._news:
            while not (self._is_closing or self._images or has_work):
                self._news.wait()
            return not self._is_closing

    def take(self, loop: int, in_flight: int) -> tuple[Job, int] | None:
        """The oldest image, or None where none waits or another loop has less to do."""
        with self._news:
            self._report(loop, in_flight)
            if not self._images or in_flight > min(self._in_flight):
                return None
            self._in_flight[loop] += 1
            return self._images.popleft()

    def report(self, loop: int, in_flight: int) -> tuple[int, int]:
        """Say how many images a loop has; returns how many wait, and how many are in flight."""
        with self._news:
            self._report(loop, in_flight)
            return len(self._images), sum(self._in_flight)

    def _report(self, loop: int, in_flight: int) -> None:
        if in_flight < self._in_flight[loop]:
            self._news.notify_all()  # another one may have left an image to this loop
        self._in_flight[loop] = in_flight

    def jobs(self) -> list[Job]:
        """Whoever waits, oldest first."""
        with self._news:
            return list(dict.fromkeys(job for job, _ in self._images))

    def remove(self, job: Job) -> None:
        """Take every image of a job out of the line."""
        with self._news:
            self._images = deque(entry for entry in self._images if entry[0] is not job)
