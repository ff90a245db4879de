"""A sealed server: its inner models answer their own server alone.

A stage checks little, because the loop has checked before it calls. Over gRPC streams a gateway
cannot see which model a message names, so the stages have to tell the loop from a stranger: the
server's processes share a random word, which every call between models carries.
"""

from __future__ import annotations

import dataclasses
import hmac
import json
import os
import secrets
from typing import TYPE_CHECKING

from fullpipe.errors import InvalidRequest

if TYPE_CHECKING:
    from fullpipe.server import ServerConfig

VARIABLE = "FULLPIPE_SEAL"
PARAMETER = "fullpipe_seal"
# Nobody outside needs these, and they are where Triton's holes were.
CLOSED_APIS = "shared-memory,trace,logging"


def sealed(config: ServerConfig) -> ServerConfig:
    """The same server, with inner models and Triton's control APIs closed to all clients."""
    nobody = secrets.token_urlsafe(32)
    return dataclasses.replace(
        config,
        env={**config.env, VARIABLE: secrets.token_urlsafe(32)},
        flags=(
            *config.flags,
            # The gateway's name for a request becomes the job's; see `triton_adapter.add_job_id`.
            "--http-header-forward-pattern=(?i)x-request-id",
            "--grpc-header-forward-pattern=(?i)x-request-id",
            f"--http-restricted-api={CLOSED_APIS}:fullpipe-closed={nobody}",
            f"--grpc-restricted-protocol={CLOSED_APIS}:fullpipe-closed={nobody}",
        ),
    )


def seal_parameters() -> dict[str, str]:
    """The request parameters that make a call one of this server's own."""
    word = os.environ.get(VARIABLE)
    return {PARAMETER: word} if word else {}


def check_seal(parameters: str) -> None:
    """Let a call through that carries this server's word, or any where the server has none.

    Args:
        parameters: of the request, as JSON text; "" for none.
    Raises:
        InvalidRequest: the call came from elsewhere.
    """
    word = os.environ.get(VARIABLE)
    if not word:
        return
    given = json.loads(parameters or "{}").get(PARAMETER)
    if not (isinstance(given, str) and hmac.compare_digest(given.encode(), word.encode())):
        raise InvalidRequest("this model answers the pipelines of its own server only")
