"""A proxy that loses answers of a server: it forwards bytes and randomly breaks connections before an answer."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import suppress

from server.supervisor.services import free_port

_CHUNK = 1 << 16


class LossyProxy:
    """Forwards a port in its own thread; as a context manager, it returns once it listens.

    Args:
        to_port: the server's port on this machine; a change applies to new connections.
        seed: seed of the random choice.

    Attributes:
        share: share of the answers that are lost with their connection, after the server has processed the request.
    """

    def __init__(self, to_port: int, seed: int = 0) -> None:
        self.port, self.share, self.lost = free_port(), 0.0, 0
        self.to_port = to_port
        self._chance = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> LossyProxy:
        self._thread.start()
        assert self._listening.wait(10), "the proxy did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", self.port))
        self._listening.set()
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.to_port)
        except OSError:
            writer.transport.abort()
            return
        ways = [
            asyncio.ensure_future(self._pass(reader, far_writer, loses=False)),
            asyncio.ensure_future(self._pass(far_reader, writer, loses=True)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for end in (writer, far_writer):
            end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, loses: bool) -> None:
        with suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                if loses and self._chance.random() < self.share:
                    self.lost += 1
                    return
                writer.write(chunk)
                await writer.drain()
