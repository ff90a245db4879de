"""Long polls on jobs: who asks how far a job is gets an answer when there is news."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable

from fullpipe.contract import ProgressQuery
from fullpipe.job import Job

log = logging.getLogger(__name__)


# How long a poll of a job that nobody knows is kept: it may be about to arrive, or have ended.
UNKNOWN_JOB_S = 0.02


@dataclasses.dataclass
class _Poll:
    query: ProgressQuery
    reply: Callable[[dict], None]
    asked: float

    def until(self, job: Job | None) -> float:
        """When it is answered at the latest."""
        return self.asked + (UNKNOWN_JOB_S if job is None else self.query.wait_ms / 1e3)


class ProgressBoard:
    """Answers `op=progress` on its own thread, so that previews cost the loop nothing."""

    def __init__(self, find: Callable[[str], Job | None], preview: Callable[[Job], str | None]):
        """
        Args:
            find: the open job of an id, or None.
            preview: base64 JPEG of a job's newest prediction, or None when there is none yet.
        """
        self._find = find
        self._preview = preview
        self._polls: list[_Poll] = []
        self._news = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def ask(self, query: ProgressQuery, reply: Callable[[dict], None]) -> None:
        """Answer once more than `query.since` steps are done, the job ends, or time is up."""
        if query.has_preview and (job := self._find(query.job_id)):
            job.wants_preview = True
        with self._news:
            self._polls.append(_Poll(query, reply, time.monotonic()))
            self._news.notify()

    def tell(self) -> None:
        """Some job has news."""
        with self._news:
            self._news.notify()

    def close(self) -> None:
        """Answer every open poll and end the thread."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._news:
                due = self._take_due()
                if not due:
                    if self._closing and not self._polls:
                        return
                    self._news.wait(self._seconds_left())
                    due = self._take_due()
            for poll in due:
                try:
                    poll.reply(self._event(poll.query))
                except Exception:
                    log.exception("progress of job %s could not be answered", poll.query.job_id)

    def _take_due(self) -> list[_Poll]:
        now = time.monotonic()
        due = [poll for poll in self._polls if self._closing or self._is_due(poll, now)]
        self._polls = [poll for poll in self._polls if poll not in due]
        return due

    def _is_due(self, poll: _Poll, now: float) -> bool:
        job = self._find(poll.query.job_id)
        return now >= poll.until(job) or (job is not None and job.steps_done > poll.query.since)

    def _seconds_left(self) -> float | None:
        if not self._polls:
            return None
        until = min(poll.until(self._find(poll.query.job_id)) for poll in self._polls)
        return max(0.0, until - time.monotonic())

    def _event(self, query: ProgressQuery) -> dict:
        job = self._find(query.job_id)
        if job is None:
            return {"job_id": query.job_id, "state": "unknown"}
        event: dict[str, object] = {
            "job_id": job.id,
            "state": "running" if job.work else "preparing",
            "step": job.steps_done,
            "steps": job.steps,
        }
        if query.has_preview:
            job.wants_preview = True
            event["preview"] = self._preview(job)
        return event
