"""One server's address: connections, and what every failure on the way there means.

The standard library's connections: usable from any thread, streaming, and never sending a request
twice by themselves, which tritonclient's do when a connection breaks. tritonclient supplies the
binary tensor format in `triton.py`. The pack is installed without the `fullpipe` package, so this
is a smaller sibling of `fullpipe/endpoint.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from .call import Call
from .errors import Lost, Refused, Stopped, TritonError, Unavailable
from .settings import Server


@dataclasses.dataclass(frozen=True)
class Answer:
    """An HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Endpoint:
    """Opens connections to one server."""

    def __init__(self, server: Server):
        self.server = server
        parts = urlsplit(server.url)
        self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path
        self._is_tls = parts.scheme == "https"

    def ask(
        self,
        what: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        call: Call | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """Send one request on a connection of its own: GET, or POST if there is a body.

        Args:
            what: is asked for, for messages: "model 'full_pipeline'".
            timeout_s: longest silence; None: the server's read_timeout_s.
        Raises:
            Unavailable: the request did not reach the server.
            Lost: it did, and no answer came.
        """
        with self.opened(what, call or Call(), timeout_s) as connection:
            response = self.send(connection, what, path, body, headers)
            with self.reading(what, timeout_s):
                return Answer(response.status, response.headers, response.read())

    @contextlib.contextmanager
    def opened(
        self, what: str, call: Call, timeout_s: float | None = None
    ) -> Iterator[http.client.HTTPConnection]:
        """An open connection that `call` can break."""
        try:
            connection = self._connect(what, timeout_s)
            with call.using(connection.sock):
                yield connection
        except TritonError:
            if call.is_stopped:
                raise Stopped("interrupted") from None
            raise
        finally:
            with contextlib.suppress(UnboundLocalError):
                connection.close()

    def send(
        self,
        connection: http.client.HTTPConnection,
        what: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        """Send a request and wait for the head of its answer."""
        key = self.server.api_key
        given = {**({"Authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
        method = "GET" if body is None else "POST"
        try:
            connection.request(method, self._path + path, body, given)
        except ValueError:
            raise Refused(
                f"{self._where(what)}: the API key holds characters that no header may have; check"
                " FULLPIPE_API_KEY or the configuration file"
            ) from None
        except OSError as error:
            # Without the whole of it the server cannot have begun.
            raise Unavailable(f"{self._where(what)} {_cause(error, None)}") from None
        with self.reading(what, connection.sock.gettimeout() if connection.sock else None):
            return connection.getresponse()

    @contextlib.contextmanager
    def reading(self, what: str, timeout_s: float | None) -> Iterator[None]:
        """While an answer is awaited: any failure means that the request is lost."""
        try:
            yield
        except (OSError, http.client.HTTPException, AttributeError) as error:
            # AttributeError: http.client, when another thread has closed the connection.
            raise Lost(f"{self._where(what)} {_cause(error, timeout_s)}") from None

    def check(self, answer: Answer, what: str) -> None:
        """Raise what an answer other than 200 means."""
        if answer.status == 200:
            return
        said = error_text(answer.body) or f"HTTP {answer.status}"
        if answer.status in (401, 403):
            raise Refused(
                f"{self._where(what)} refuses access: {said}; set FULLPIPE_API_KEY or api_key in"
                " the configuration file to a key that is allowed to use it"
            )
        if answer.status == 404:
            raise Refused(
                f"{self._where(what)} is not there: {said}; press R to see what the server offers"
            )
        raise self.failure(said, answer.status, what)

    def failure(self, message: str, status: int | None, what: str) -> TritonError:
        """What an error message of the server means.

        /generate answers 400 to every error and a running stream has no status, so a code at the
        head of the message counts before the status.
        """
        wrapping = _WRAPPING.match(message)
        code = wrapping[1] if wrapping else None
        text = " ".join(_WRAPPING.sub("", message, count=1).split()) or f"HTTP {status}"
        kind = _KINDS.get(code or "") or _STATUS_KINDS.get(status or 0, TritonError)
        remedy = "; look at the server's log" if kind is TritonError else ""
        if kind is Unavailable:
            remedy = "; try again later, or another server"
        return kind(f"{self._where(what)}: {text}{remedy}")

    def document(self, answer: Answer, what: str) -> Any:
        """The JSON document of an answer."""
        self.check(answer, what)
        try:
            return json.loads(answer.body)
        except ValueError:
            raise TritonError(
                f"{self._where(what)} answers what is no JSON; is it a Triton Inference Server?"
            ) from None

    def _where(self, what: str) -> str:
        return f"{self.server.url}, {what}"

    def _connect(self, what: str, timeout_s: float | None) -> http.client.HTTPConnection:
        connect_s = self.server.connect_timeout_s
        try:
            if self._is_tls:
                context = ssl.create_default_context(cafile=self.server.ca_cert or None)
                connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                    self._host, self._port, timeout=connect_s, context=context
                )
            else:
                connection = http.client.HTTPConnection(self._host, self._port, timeout=connect_s)
            connection.connect()
        except TimeoutError:
            raise Unavailable(
                f"{self._where(what)} did not take the connection within {connect_s:g} s; check"
                " host, port and firewall"
            ) from None
        except ssl.SSLError as error:
            raise Refused(f"{self._where(what)} {_cause(error, None)}") from None
        except FileNotFoundError:
            raise Refused(f"ca_cert {self.server.ca_cert} is not there; check the path") from None
        except OSError as error:
            raise Unavailable(f"{self._where(what)} {_cause(error, None)}") from None
        connection.sock.settimeout(timeout_s or self.server.read_timeout_s)
        _notice_dead_peers(connection.sock)
        return connection


class Session:
    """One connection that is kept open between the requests of one thread.

    For requests that may be repeated at will: a connection that the server closed meanwhile is
    opened again by itself.
    """

    def __init__(self, endpoint: Endpoint, timeout_s: float | None = None):
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPConnection | None = None

    def ask(
        self, what: str, path: str, body: bytes | None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """See `Endpoint.ask`."""
        for is_last in (self._connection is None, True):
            if self._connection is None:
                self._connection = self._endpoint._connect(what, self._timeout_s)
            try:
                response = self._endpoint.send(self._connection, what, path, body, headers)
                with self._endpoint.reading(what, self._timeout_s):
                    answer = Answer(response.status, response.headers, response.read())
                if response.will_close:
                    self.close()
                return answer
            except Unavailable:
                self.close()
                if is_last:
                    raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


_KINDS = {
    "INTERNAL": TritonError,
    "INVALID_ARG": Refused,
    "UNAVAILABLE": Unavailable,
    "CANCELLED": Stopped,
}
_WRAPPING = re.compile(rf"(?:in ensemble '[^']*', |({'|'.join(_KINDS)}): )*")
# 502 and 504 come from a gateway whose server vanished or was too slow after it took the request.
_STATUS_KINDS = {
    400: Refused,
    413: Refused,
    429: Unavailable,
    499: Stopped,
    502: Lost,
    503: Unavailable,
    504: Lost,
}


def error_text(body: bytes) -> str:
    """The message of an error's body: JSON, a server-sent event, or a gateway's page."""
    text = body.decode("utf-8", "replace").strip()
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(text.removeprefix("data:"))["error"])
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())[:200]


def _cause(error: Exception, timeout_s: float | None) -> str:
    if isinstance(error, ConnectionRefusedError):
        return (
            "refused the connection; start the server (`fullpipe serve`), or set FULLPIPE_URL or"
            " the node Triton Server to one that runs"
        )
    if isinstance(error, TimeoutError):
        silent = f"was silent for {timeout_s:g} s" if timeout_s else "took no data"
        return f"{silent}; look at its log, or allow more with read_timeout_s"
    if isinstance(error, socket.gaierror):
        return f"cannot be found ({error.strerror}); check the host's name"
    if isinstance(error, ssl.SSLError):
        reason = getattr(error, "verify_message", "") or error.reason or error
        return f"speaks no TLS that is trusted here ({reason}); check FULLPIPE_CA_CERT"
    if isinstance(error, http.client.IncompleteRead):
        return "broke off in the middle of its answer; look at its log"
    if isinstance(error, (http.client.RemoteDisconnected, ConnectionError, AttributeError)):
        return "closed the connection without an answer; look at its log"
    if isinstance(error, http.client.HTTPException):
        return "does not speak HTTP; is it the gRPC port?"
    return f"cannot be reached ({error}); check the network"


def _notice_dead_peers(open_socket: socket.socket) -> None:
    """Let the kernel find a peer that vanished without a word within about 12 s of silence."""
    open_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    open_socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 6), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not every system has all of them
            open_socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
