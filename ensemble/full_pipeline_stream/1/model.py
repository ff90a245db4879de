"""`full_pipeline_stream`: progress and preview events, then the picture, over one stream.

Thin: it calls the ensemble over BLS on one thread, long-polls the loop model on another, and
cancels the job as soon as its client goes away. No state is shared with the loop but the job id,
so any replica may serve any stream.
"""

import json
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fullpipe import triton_adapter as triton
from fullpipe.errors import Cancelled, InvalidRequest, PipelineError, Unavailable

POLL_MS = 200
NO_PICTURE = {"image": [], "images": np.zeros((0, 0, 0, 3), np.uint8), "info": ""}


class TritonPythonModel:
    """One pair of threads per open stream."""

    def initialize(self, args):
        """Read which models this stream stands before."""
        triton.log_to_triton(args["model_name"])
        parameters = triton.parameters(args)
        self._pipeline = parameters["pipeline"]
        self._scheduler_model = parameters["scheduler_model"]
        self._max_streams = int(parameters["max_streams"])
        self._free = threading.Semaphore(self._max_streams)
        self._threads = ThreadPoolExecutor(2 * self._max_streams, "stream")

    def execute(self, requests):
        """Start each stream and return."""
        for request in requests:
            sender = triton.Sender(request)
            if not self._free.acquire(blocking=False):
                error = Unavailable(f"{self._max_streams} streams are open, all that is allowed")
                sender.last(error)
                continue
            self._threads.submit(self._serve, sender, triton.read_inputs(request))

    def finalize(self):
        """Let open streams end; the loop answers them as it closes."""
        self._threads.shutdown()

    def _serve(self, sender, inputs):
        try:
            outcome = self._stream(sender, inputs)
        except Exception as error:
            outcome = error
        self._free.release()
        sender.last(outcome)

    def _stream(self, sender, inputs):
        """Send events until the picture is there; returns the last response's outputs."""
        preview = triton.text("preview", inputs.pop("preview", None)) or "none"
        if preview not in ("none", "latent"):
            raise InvalidRequest(f"preview={preview[:60]!a} is unknown, allowed: none, latent")
        job_id = triton.text("job_id", inputs.get("job_id")) or secrets.token_urlsafe(16)
        picture = self._threads.submit(
            triton.call_model,
            self._pipeline,
            {**inputs, "job_id": job_id},
            ("image", "images", "info"),
        )
        since = 0
        while not picture.done():
            if sender.is_lost():
                self._ask(job_id, op="cancel")
                picture.exception()
                raise Cancelled(f"job {job_id} was cancelled: its client went away")
            news = self._ask(job_id, op="progress", since=since, preview=preview)
            if news.get("step", 0) > since:
                since = news["step"]
                event = {key: news[key] for key in ("step", "steps", "preview") if news.get(key)}
                sender.event({**NO_PICTURE, "event": json.dumps(event)})
        outputs = picture.result()
        return {
            "image": outputs["image"].as_numpy(),
            "images": outputs["images"].as_numpy(),
            "info": triton.first_string(outputs["info"]),
            "event": json.dumps({"done": True}),
        }

    def _ask(self, job_id, op, since=0, preview="none"):
        try:
            answer = triton.call_model(
                self._scheduler_model,
                {
                    "op": op,
                    "job_id": job_id,
                    "since": np.array([since], np.int32),
                    "wait_ms": np.array([POLL_MS], np.int32),
                    "preview": preview,
                },
                ["event"],
            )
        except PipelineError:
            return {}
        return json.loads(triton.first_string(answer["event"]))
