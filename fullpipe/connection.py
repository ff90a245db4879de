"""Where a client finds its server, and what it needs to be let in.

Environment first, then a file: FULLPIPE_URL, FULLPIPE_API_KEY and FULLPIPE_CA_CERT, or `url`,
`api_key` and `ca_cert` of $XDG_CONFIG_HOME/fullpipe/client.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from fullpipe.errors import InvalidRequest

DEFAULT_URL = "http://127.0.0.1:8000"
VARIABLES = {"url": "FULLPIPE_URL", "api_key": "FULLPIPE_API_KEY", "ca_cert": "FULLPIPE_CA_CERT"}


@dataclasses.dataclass(frozen=True)
class Connection:
    """Address and credentials of a server.

    Attributes:
        url: http:// or https:// and HOST:PORT.
        api_key: a gateway's key or token, sent as `Authorization: Bearer …`; "" for none.
        ca_cert: PEM file of the certificates to trust; "" for the system's.
    """

    url: str = DEFAULT_URL
    api_key: str = dataclasses.field(default="", repr=False)
    ca_cert: str = ""

    @classmethod
    def load(cls, environment: Mapping[str, str] | None = None) -> Connection:
        """Read environment and file.

        Raises:
            InvalidRequest: the file has another form, or the key has characters no header may have.
        """
        environment = os.environ if environment is None else environment
        values = _read_file(environment)
        values.update(
            {key: environment[name] for key, name in VARIABLES.items() if environment.get(name)}
        )
        key = values.get("api_key", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise InvalidRequest("the API key has characters that no key has; copy it anew")
        return cls(**{**values, "api_key": key})


def _read_file(environment: Mapping[str, str]) -> dict[str, str]:
    home = environment.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    path = Path(home) / "fullpipe" / "client.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from None
    is_fit = isinstance(document, dict) and all(
        key in VARIABLES and isinstance(value, str) for key, value in document.items()
    )
    if not is_fit:
        raise InvalidRequest(f"{path} needs an object of strings, allowed: {', '.join(VARIABLES)}")
    return document
