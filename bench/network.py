"""A network between a client and a server on this machine: it delays, counts and breaks.

A TCP proxy with a delay each way. Loopback opens connections in no time; a real network needs one
round trip for it, so the proxy holds back the first bytes of a connection for that long. Bandwidth
is not limited.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
from types import TracebackType

FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 6\r\nConnection: close\r\n\r\nwalled"


@dataclasses.dataclass
class Traffic:
    """What passed since the last reset; bytes are payload, without TCP/IP headers.

    Attributes:
        round_trips: times that one side had to wait for the other: openings of connections, and
            answers to something sent.
    """

    connections: int = 0
    round_trips: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    requests: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Cut:
    pattern: bytes
    after_bytes: int


class Network:
    """The proxy; a context manager. Attributes may be changed at any time from any thread.

    Attributes:
        delay_s: added each way.
        is_hanging: connections are taken and nothing passes.
        answer: sent to every new connection instead of the server's, if not empty.
        forbidden: connections whose first request begins with this path are answered with 403.
        traffic: what passed.
    """

    def __init__(self, host: str, port: int):
        """
        Args:
            host, port: where the server listens.
        """
        self.delay_s = 0.0
        self.is_hanging = False
        self.answer = b""
        self.forbidden = ""
        self.traffic = Traffic()
        self._target = (host, port)
        self._cut: _Cut | None = None
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            self.port = chosen.getsockname()[1]

    @property
    def url(self) -> str:
        """HTTP address of this end."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Network:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.restore()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.refuse()
        self._run(self._end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def restore(self) -> None:
        """Everything passes again; the counts start at zero."""
        self.delay_s, self.is_hanging, self.answer, self._cut = 0.0, False, b"", None
        self.forbidden = ""
        self.traffic = Traffic()
        if self._server is None:
            self._run(self._listen())

    def refuse(self) -> None:
        """Break every connection and refuse new ones, like a server that died."""
        self._run(self._refuse())

    def break_connections(self) -> None:
        """Break every connection; new ones pass."""
        self._loop.call_soon_threadsafe(self._abort_all)

    def cut_next(self, pattern: bytes, after_bytes: int = 0) -> None:
        """Break the next connection that asks for this, after so many bytes of the answer."""
        self._cut = _Cut(pattern, after_bytes)

    def _run(self, coroutine) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self._abort_all()

    async def _end_tasks(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _abort_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._serve_one(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # either end is gone, or the proxy closes
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.traffic.connections += 1
        self.traffic.round_trips += 1
        if self.answer:
            await reader.read(1 << 16)
            writer.write(self.answer)
            await writer.drain()
            return
        first = await reader.read(1 << 18)
        if self.forbidden and f" {self.forbidden}".encode() in first[:100]:
            writer.write(FORBIDDEN)
            await writer.drain()
            return
        while self.is_hanging:
            await asyncio.sleep(0.02)
            if writer.transport.is_closing():
                return
        server_reader, server_writer = await asyncio.open_connection(*self._target)
        self._writers.add(server_writer)
        connection = _Connection(self, writer, server_writer)
        try:
            await asyncio.gather(
                connection.pass_on(reader, server_writer, is_answer=False, first=first),
                connection.pass_on(server_reader, writer, is_answer=True),
            )
        finally:
            self._writers.discard(server_writer)
            server_writer.transport.abort()

    def _take_cut(self, data: bytes) -> _Cut | None:
        if self._cut is None or self._cut.pattern not in data[:4096]:
            return None
        cut, self._cut = self._cut, None
        return cut


class _Connection:
    def __init__(
        self, network: Network, client: asyncio.StreamWriter, server: asyncio.StreamWriter
    ):
        self._network = network
        self._both = (client, server)
        self._cut: _Cut | None = None
        self._answered = 0
        self._is_asking = False

    async def pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        is_answer: bool,
        first: bytes = b"",
    ) -> None:
        """Pass everything on, each piece as late as the delay says."""
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        async def deliver() -> None:
            while True:
                due, data = await pieces.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not data:
                    with contextlib.suppress(OSError):
                        writer.write_eof()
                    return
                writer.write(data)
                with contextlib.suppress(ConnectionError):
                    await writer.drain()

        delivering = asyncio.create_task(deliver())
        try:
            # The client could not have sent anything before the connection was open.
            handshake_s = 0.0 if is_answer else 2 * self._network.delay_s
            is_open = True
            while is_open:
                data = self._look_at(first or await reader.read(1 << 18), is_answer)
                first, is_open = b"", bool(data)
                if data is None:
                    return
                await pieces.put((loop.time() + self._network.delay_s + handshake_s, data))
            await delivering
        except ConnectionError:
            await pieces.put((0.0, b""))
        finally:
            delivering.cancel()

    def _look_at(self, data: bytes, is_answer: bool) -> bytes | None:
        traffic = self._network.traffic
        if not is_answer:
            traffic.sent_bytes += len(data)
            if data[:5] in (b"POST ", b"GET /"):
                traffic.requests.append(data.split(b" ", 2)[1].decode("latin-1"))
            self._cut = self._network._take_cut(data) or self._cut
            self._is_asking = self._is_asking or bool(data)
            return data
        traffic.received_bytes += len(data)
        if data and self._is_asking:
            traffic.round_trips += 1
            self._is_asking = False
        if self._cut is not None:
            self._answered += len(data)
            if self._answered > self._cut.after_bytes:
                for writer in self._both:
                    writer.transport.abort()
                return None
        return data
