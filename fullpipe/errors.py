"""What can go wrong, each with the Triton error code that a client sees.

Every message is one line and says what, got, allowed. The mapping to Triton's own error objects
happens once, in `fullpipe.triton_adapter`.
"""

from __future__ import annotations


class PipelineError(Exception):
    """Base of every expected failure; `code` is Triton's name of the error."""

    code = "INTERNAL"


class InvalidRequest(PipelineError):
    """A value of the request is wrong; the request can never succeed as it is."""

    code = "INVALID_ARG"


class Unavailable(PipelineError):
    """The server cannot take or finish the request now; a later repeat may succeed."""

    code = "UNAVAILABLE"


class Cancelled(PipelineError):
    """The job was cancelled by `op=cancel` or by its client going away."""

    code = "CANCELLED"


class SetupError(PipelineError):
    """A file, a setting or a machine is not fit to serve; the message names the remedy."""
