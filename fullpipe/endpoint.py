"""One server's HTTP address, and what can happen on the way there."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from fullpipe.contract import shorten
from fullpipe.errors import InvalidRequest, PipelineError, Unavailable
from fullpipe.wire import error_text, server_error

CONNECT_TIMEOUT_S = 10.0


class Endpoint:
    """Opens connections to one address; each belongs to one thread and one call.

    The standard library's connections: usable from any thread, never sending a request twice, and
    streaming. None is kept open, as an idle one would hold up a server that shuts down.
    """

    def __init__(self, url: str, headers: Mapping[str, str], ca_cert: str = ""):
        """
        Args:
            url: http://HOST:PORT, https too, with a path if a gateway has one.
            headers: sent with every request.
            ca_cert: PEM file of the certificates to trust; "" for the system's.
        Raises:
            InvalidRequest: the address has another form, or the file is no certificate.
        """
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._headers = dict(headers)
        try:
            parts = urlsplit(self.url)
            self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path
        except ValueError as error:
            raise InvalidRequest(f"url={shorten(url)} is no address: {error}") from None
        if parts.username:
            raise InvalidRequest("url holds a user name; send credentials in headers instead")
        if parts.scheme not in ("http", "https") or not self._host:
            raise InvalidRequest(f"url={shorten(url)} needs the form http://HOST:PORT")
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            try:
                self._tls = ssl.create_default_context(cafile=ca_cert or None)
            except OSError as error:  # ssl.SSLError is one
                raise InvalidRequest(f"ca_cert={ca_cert} is no certificate: {error}") from None

    @contextlib.contextmanager
    def connected(self, timeout_s: float) -> Iterator[http.client.HTTPConnection]:
        """An open connection; whatever goes wrong with it becomes Unavailable.

        Args:
            timeout_s: longest silence; connecting gets at most CONNECT_TIMEOUT_S of it.
        """
        connect_s = min(timeout_s, CONNECT_TIMEOUT_S)
        connection = self._connection(connect_s)
        try:
            try:
                connection.connect()
            except TimeoutError:
                raise Unavailable(
                    f"{self.url} did not take the connection within {connect_s:g} s; check host,"
                    " port and firewall"
                ) from None
            connection.sock.settimeout(timeout_s)
            yield connection
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"{self.url} {_what_happened(error, timeout_s)}") from error
        finally:
            connection.close()

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=timeout_s, context=self._tls
        )

    def send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        """Send one request and wait for the first line of its answer."""
        connection.request(method, self._path + path, body, {**self._headers, **(headers or {})})
        return connection.getresponse()

    def call(
        self,
        timeout_s: float,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Send one request on a connection of its own; returns status, headers and body."""
        with self.connected(timeout_s) as connection:
            response = self.send(connection, method, path, body, headers)
            return response.status, response.headers, response.read()

    def check(self, status: int, body: bytes, what: str) -> None:
        """Raise what an HTTP answer other than 200 means."""
        if status == 200:
            return
        said = error_text(body) or f"HTTP {status}"
        if status in (401, 403):
            raise PipelineError(f"{self.url} refuses access to {what}: {said}; is a key missing?")
        if status == 404:
            raise InvalidRequest(
                f"{self.url} does not serve {what}: {said}; `fullpipe models` lists what it serves"
            )
        raise server_error(said, status)

    def parse_json(self, body: bytes) -> Any:
        """The document of an answer's body."""
        try:
            return json.loads(body)
        except ValueError:
            raise PipelineError(
                f"{self.url} answers {shorten(error_text(body))}, which is no JSON; is it a Triton"
                " Inference Server?"
            ) from None


def _what_happened(error: Exception, timeout_s: float) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "refused the connection; start a server with `fullpipe serve` or name another one"
    if isinstance(error, TimeoutError):
        return f"was silent for {timeout_s:g} s; look at its log or wait longer"
    if isinstance(error, socket.gaierror):
        return f"cannot be found: {error.strerror}; check the host's name"
    if isinstance(error, ssl.SSLError):
        return f"speaks no TLS that this client trusts: {error.reason or error}"
    if isinstance(error, ConnectionError):
        return "closed the connection without an answer; look at its log"
    if isinstance(error, http.client.IncompleteRead):
        return "broke off in the middle of its answer; look at its log"
    if isinstance(error, http.client.HTTPException):
        return "does not speak HTTP; is it the gRPC port?"
    return f"cannot be reached: {error}"
