"""What can go wrong between a node and its server; every message is one line for a person."""

from __future__ import annotations


class TritonError(Exception):
    """The server failed on a request, or answered something that this pack does not know."""


class Refused(TritonError):
    """The request can never succeed as it is."""


class Unavailable(TritonError):
    """The server cannot be reached or is too busy; nothing was started, so a repeat is safe."""


class Lost(Unavailable):
    """The connection broke after the request was sent: whether it was carried out is unknown."""


class Stopped(TritonError):
    """The user interrupted, or the server says that the job was cancelled."""
