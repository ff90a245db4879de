"""tritonserver's log, made readable: short lines, no start-up tables, tracebacks kept."""

from __future__ import annotations

import re
from dataclasses import dataclass

LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "fatal"}
LOG_LEVELS = ("error", "warning", "info", "verbose")

_GLOG = re.compile(r"([IWEF])\d{4} (\d\d:\d\d:\d\d)\.\d+ \d+ ([\w.+-]+):\d+\] +(.*)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}
# What every healthy start and stop says, on a machine without a GPU too.
_NOISE = (
    "loading: ",
    "TRITONBACKEND_ModelInstance",
    "Creating TritonCache",
    "Collecting CPU metrics",
    "Collecting metrics for GPU",
    "Waiting for in-flight requests",
    "All models are stopped",
    "Timeout ",
    "successfully unloaded ",
    "Started ",
    "Error: Failed to initialize NVML",
    "DCGM unable to start",
    "CUDA memory pool disabled",
    "CudaDriverHelper has not been initialized",
    "Unable to allocate pinned system memory",
    "failed to allocate pinned system memory",
    "Pinned memory pool is created",
    "CUDA memory pool is created",
    "Signal (15) received",
)


@dataclass(frozen=True)
class LogLine:
    """One line of output. `level` and `time` are empty for what models print themselves."""

    level: str
    time: str
    message: str

    @classmethod
    def parse(cls, line: str) -> LogLine:
        """Read a line: tritonserver's `I1122 12:00:00.000000 pid file:line] "msg"`, or any."""
        match = _GLOG.fullmatch(line.rstrip("\n"))
        if not match:
            return cls("", "", line.rstrip("\n"))
        level, time, _, message = match.groups()
        if message.startswith('"') and message.endswith('"') and len(message) > 1:
            message = re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[0]), message[1:-1])
        return cls(LEVELS[level], time, message.rstrip())

    def is_wanted(self, log_level: str) -> bool:
        """Whether a reader at this level (of LOG_LEVELS) wants to see it."""
        if log_level == "verbose":
            return True
        if not self.level:
            is_table = self.message.startswith(("+--", "|"))
            return bool(self.message) and not is_table and not self.message.startswith(_NOISE)
        if not self.message:  # the head of a table
            return False
        no_gpu = "unable to create stream for" in self.message and "CUDA driver" in self.message
        if self.message.startswith(_NOISE) or no_gpu:
            return False
        shown = LOG_LEVELS[: LOG_LEVELS.index(log_level) + 1]
        return self.level in (*shown, "fatal")

    def __str__(self) -> str:
        return f"{self.time} {self.level:<7} {self.message}" if self.level else self.message


def load_failure(line: LogLine) -> str | None:
    """The one line that says why a model did not load, if this log line tells that.

    Args:
        line: any line of the log.
    Returns:
        For example `model 'unet' failed to load: no file model.plan; run fullpipe assemble`.
    """
    if line.level != "error":
        return None
    for pattern in (
        r"failed to load '(?P<model>[^']+)' version \d+: (?:[A-Z][\w ]+: )?(?P<why>.*)",
        r"Poll failed for model directory '(?P<model>[^']+)': (?P<why>.*)",
        r"Invalid argument: ensemble '?(?P<model>[\w.-]+)'? (?P<why>.*)",
    ):
        match = re.match(pattern, line.message, re.DOTALL)
        if match:
            why = " ".join(match["why"].split("\n\nAt:")[0].split())
            return f"model '{match['model']}' failed to load: {why.removeprefix('SetupError: ')}"
    if line.message.startswith(("failed to start ", "error: creating server")):
        return " ".join(line.message.split())
    return None
