"""A node's request from start to end: progress, interrupts, lost connections, repeats.

The request itself runs on a thread of its own; the node's coroutine shows news and looks for
interrupts. ComfyUI runs coroutines of several nodes at once, so nodes that do not depend on each
other wait for the server together.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from .call import Call, News
from .endpoint import Endpoint, Session
from .errors import Lost, Refused, TritonError, Unavailable
from .settings import Server
from .triton import control, is_alive

log = logging.getLogger(__name__)
T = TypeVar("T")

# How often a waiting node looks for an interrupt.
SLICE_S = 0.05
FIRST_DELAY_S, LAST_DELAY_S = 0.5, 8.0
PREVIEW_MAX_PX = 512
# Looks at a silent server in a row that must fail before it counts as gone.
MISSES = 2
POLL_MS = 1000


async def run(node_id: str | None, work: Callable[[Call], T], steps: int = 0) -> T:
    """Run `work` on a thread, show its news at the node, and stop it when the user interrupts.

    Args:
        node_id: ComfyUI's unique id of the node.
        work: gets the call to report to and to be stopped by.
        steps: length of the progress bar; 0: none.
    Raises:
        comfy.model_management.InterruptProcessingException: the user interrupted.
    """
    import comfy.model_management
    import comfy.utils

    loop, has_news = asyncio.get_running_loop(), asyncio.Event()

    def notify(*_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop ended with the prompt
            loop.call_soon_threadsafe(has_news.set)

    call = Call(notify)
    outcome: Future[T] = Future()
    outcome.add_done_callback(notify)
    threading.Thread(target=_carry_out, args=(work, call, outcome), daemon=True).start()
    bar = comfy.utils.ProgressBar(steps, node_id=node_id) if steps else None
    try:
        while True:
            comfy.model_management.throw_exception_if_processing_interrupted()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(has_news.wait(), SLICE_S)
            has_news.clear()
            _show(call.take(), bar, node_id)
            if outcome.done():
                result = outcome.result()
                if bar is not None and bar.current < bar.total:  # the result overtook its news
                    bar.update_absolute(bar.total)
                return result
    finally:
        call.stop()  # nothing to stop if it is done


def _carry_out(work: Callable[[Call], Any], call: Call, outcome: Future) -> None:
    try:
        outcome.set_result(work(call))
    except BaseException as error:
        outcome.set_exception(error)


def _show(news: list[News], bar: Any, node_id: str | None) -> None:
    for item in news:
        if item.text:
            say(item.text, node_id)
        elif bar is not None and item.steps:
            preview = ("JPEG", _open(item.preview), PREVIEW_MAX_PX) if item.preview else None
            bar.update_absolute(item.step, item.steps, preview)


def say(text: str, node_id: str | None) -> None:
    """Show a line at a node and write it to ComfyUI's log."""
    from server import PromptServer

    log.warning("%s", text)
    if node_id is not None:
        PromptServer.instance.send_progress_text(text, node_id)


def _open(jpeg: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(jpeg)).convert("RGB")


def repeat(
    server: Server,
    call: Call,
    attempt: Callable[[], T],
    is_repeatable: Callable[[Lost], bool] = lambda lost: True,
) -> T:
    """Try until it works or a repeat is of no use or not safe.

    Args:
        attempt: sends the request; Unavailable means that it was not carried out, Lost that nobody
            knows.
        is_repeatable: decides on a lost one, and may take its time; by default for pure functions.
    """
    failures = 0
    while True:
        try:
            return attempt()
        except Unavailable as error:
            failures += 1
            if failures > server.retries:
                raise
            if isinstance(error, Lost) and not is_repeatable(error):
                raise
            delay_s = min(FIRST_DELAY_S * 2 ** (failures - 1), LAST_DELAY_S)
            delay_s *= random.uniform(0.75, 1.25)  # nodes that failed together shall not repeat so
            call.report(
                News(text=f"{error}. Again in {delay_s:.1f} s ({failures} of {server.retries})")
            )
            call.wait(delay_s)


class Job:
    """A job of a pipeline's loop, known to the server by an id that only this process knows."""

    def __init__(self, endpoint: Endpoint, loop_model: str, job_id: str, call: Call):
        self._endpoint = endpoint
        self._loop_model = loop_model
        self._call = call
        self.id = job_id

    def run(self, attempt: Callable[[], T], *, follow: bool = False, preview: bool = False) -> T:
        """Send the job, at most one at a time, repeating it only when the last one is settled.

        Args:
            attempt: sends the request under this job's id and returns its result.
            follow: whether to ask for progress on a second connection.
            preview: with pictures.
        """

        def watched() -> T:
            with self._watched(follow, preview), self._call.when_stopped(self.cancel):
                return attempt()

        return repeat(self._endpoint.server, self._call, watched, self._settle)

    def cancel(self) -> None:
        """Have the server drop the job; it needs a moment to hear of one that was just sent."""
        for _ in range(3):
            with contextlib.suppress(TritonError):
                if self._ask("cancel").get("state") == "cancelled":
                    return
            time.sleep(0.2)

    def _ask(self, op: str, session: Session | None = None, **inputs: Any) -> dict[str, Any]:
        timeout_s = self._endpoint.server.connect_timeout_s + inputs.get("wait_ms", 0) / 1000
        return control(
            self._endpoint,
            self._loop_model,
            op,
            self.id,
            timeout_s=timeout_s,
            session=session,
            **inputs,
        )

    def _settle(self, lost: Lost) -> bool:
        """After a lost connection: make sure that the job neither runs nor was finished.

        Returns:
            True: the server is there and has no such job, so a repeat makes no second picture.
        Raises:
            TritonError: the server did not come back, or the picture was made and got lost.
        """
        server = self._endpoint.server
        self._call.report(
            News(text=f"{lost}. Waiting for the server (up to {server.recover_s:g} s)")
        )
        until = time.monotonic() + server.recover_s
        while time.monotonic() < until:
            try:
                answer = self._ask("cancel")
            except Refused:  # a gateway that hides the loop: nobody can tell
                return False
            except TritonError:
                self._call.wait(FIRST_DELAY_S)
                continue
            if answer.get("outcome") == "OK":
                raise TritonError(
                    f"{lost}. The server had made the picture, but its answer was lost on the way."
                    " It is not made a second time by itself; run again if you want that"
                )
            if answer.get("state") != "cancelled":
                return True
            self._call.wait(0.1)  # it leaves the loop with the next step
        raise Unavailable(f"{lost}. It did not come back within {server.recover_s:g} s")

    @contextlib.contextmanager
    def _watched(self, follow: bool, preview: bool):
        self._call.heard = time.monotonic()
        over = threading.Event()
        gone: list[bool] = []
        watch = threading.Thread(
            target=self._watch, args=(over, gone, follow, preview), daemon=True
        )
        watch.start()
        try:
            yield
        except Lost as error:
            if gone:
                server = self._endpoint.server
                raise Lost(
                    f"{server.url}, model {self._loop_model!r} has not answered anything for"
                    f" {time.monotonic() - self._call.heard:.0f} s; check the network and its log"
                ) from None
            raise error
        finally:
            over.set()

    def _watch(self, over: threading.Event, gone: list[bool], follow: bool, preview: bool) -> None:
        """Report progress; break the connection of a server that answers nobody any more."""
        server, call = self._endpoint.server, self._call
        session = Session(self._endpoint, server.connect_timeout_s + POLL_MS / 1000)
        since, misses = 0, 0
        while not over.is_set() and not call.is_stopped:
            is_missed = False
            if follow:
                try:
                    news = self._ask(
                        "progress",
                        session,
                        since=since,
                        wait_ms=POLL_MS,
                        preview="latent" if preview else "none",
                    )
                    call.heard = time.monotonic()
                    if over.is_set():
                        break
                    since = report(call, news, since)
                    if news.get("state") == "unknown":
                        over.wait(SLICE_S)  # not there yet, or just done
                except Refused:
                    follow = False  # a gateway that hides the loop: no progress, but a picture
                except TritonError:
                    is_missed = True
            elif over.wait(server.probe_s):
                break
            elif time.monotonic() - call.heard >= server.probe_s:
                is_missed = not is_alive(self._endpoint, server.connect_timeout_s)
                if not is_missed:
                    call.heard = time.monotonic()
            misses = misses + 1 if is_missed else 0
            if misses >= MISSES and not over.is_set():
                gone.append(True)
                call.hang_up()
                break
            if is_missed:
                over.wait(server.probe_s / 2)
        session.close()


def report(call: Call, event: dict[str, Any], since: int) -> int:
    """Tell the user of a loop's event; returns the number of steps that are told.

    Args:
        event: step, steps and perhaps preview, a base64 JPEG; steps between two events, which the
            server leaves out when they come too fast, are told too.
        since: the steps that were told before.
    """
    step = event.get("step", 0)
    if step <= since:
        return since
    for skipped in range(since + 1, step):
        call.report(News(skipped, event["steps"]))
    preview = base64.b64decode(event["preview"]) if event.get("preview") else None
    call.report(News(step, event["steps"], preview))
    return step
