"""Uvicorn's server with limits per connection: uvicorn itself limits neither size nor time of request headers."""

from __future__ import annotations

import asyncio
import logging
import math
import resource
import socket
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from server.errors import ApiError, HeadersTooLarge, InvalidRequest, TooSlow, Unavailable
from server.gateway.http.errors import ErrorAnswer
from server.settings import Settings

log = logging.getLogger("mta.gateway")

MAX_HEADER_BYTES = 32 << 10  # maximum of consecutive bytes outside a body: request line and headers, or trailers
HEADER_TIMEOUT_S = 10.0
LINGER_S = 2.0  # for what a refused client still sends; closing at once would lose the response
SEND_BUFFER_BYTES = 128 << 10  # of the kernel; its default of megabytes would hold a minute of an engine's output
IDLE_S = 75  # longer than clients (5 s) and most balancers (60 s) keep a connection, since what arrives then is lost
MAX_CONNECTIONS = 2000  # or half the files that the process may open: beyond, the one idle for longest is closed
STALLED_S = 2.0  # until a client that stops reading a generation is disconnected; ordinary answers fit into the buffers
CHECK_SENDING_S = 0.5  # between two looks at a buffer that is full
LAST_READ_S = 1.0  # for which a stopping gateway reads the first request of a connection; then it sends 503
ACCEPT_S = 0.05  # in which an event loop accepts what has connected; closing the listener before would reset it

IdleConnections = OrderedDict["Connection", None]  # of a server, the one that has answered nothing for longest first


class Connection(HttpToolsProtocol):
    """Limits the size and time of everything a client sends except bodies, which `BodyReader` limits.

    One timer runs while no response is in progress and no body is expected: before the first byte, during the headers,
    and when a body continues after its response. Another runs while the client does not read and the buffers are full.
    """

    def __init__(self, *, send_timeout_s: float, limit: int, idle: IdleConnections, **uvicorn_options: Any) -> None:
        super().__init__(**uvicorn_options)
        self._send_timeout_s = send_timeout_s
        self._limit = limit
        self._idle = idle
        self._header_bytes = 0
        self._in_head = True
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._checks_sending = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if (plain := transport.get_extra_info("socket")) is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if len(self.connections) > self._limit and self._idle:
            self._idle.popitem(last=False)[0].transport.abort()
        self._idle[self] = None
        self._start_timer(HEADER_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        self._stop_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close the connection once its response has been sent, or the first request of it has not arrived in time."""
        self.app_state["stopping"] = True  # each later request gets a copy
        if self._is_answering():
            self.cycle.scope["state"]["stopping"] = True
        elif not self._refused and (self.cycle is None or self._header_bytes):
            self._start_timer(LAST_READ_S)
            return
        super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        if not self._checks_sending:
            self._check_sending(0, 0.0)

    def data_received(self, data: bytes) -> None:
        start = 0
        while start < len(data) and not self._refused and not self.transport.is_closing():
            room = MAX_HEADER_BYTES - self._header_bytes
            if room <= 0:
                self._refuse(HeadersTooLarge(f"the request's headers exceed {MAX_HEADER_BYTES} bytes: send fewer"))
                return
            piece = data[start : start + room]
            self._header_bytes += len(piece)
            start += self._parse(piece)
        if self._in_head and self._header_bytes and self._timer is None:
            self._start_timer(HEADER_TIMEOUT_S)

    def _parse(self, piece: bytes) -> int:
        """Parse a piece, and return how many of its bytes were taken: not those after headers that are read again.

        If a client asks for another protocol, the parser takes its body for that protocol and what follows for the next
        request. No other is spoken here, so a new parser reads the headers without `Upgrade`.
        """
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(piece)
        except HttpParserUpgrade as upgrade:
            line = (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
            headers = b"".join(b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade")
            self.parser = HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self._parse(b"%b %b HTTP/%b\r\n%b\r\n" % (*line, headers))
            return int(upgrade.args[0])
        except HttpParserError:
            self._refuse(InvalidRequest("the request is not valid HTTP/1.1", code="invalid_http"))
        return len(piece)

    def on_message_begin(self) -> None:
        self._header_bytes = max(1, self._header_bytes)  # 0 if the request began in the same piece as the previous end
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # ignore trailers
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_answering():  # else nobody would notice when the first one's client leaves or stops reading
            raise ValueError("a second request before the answer to the first")  # closes the connection
        if self.parser.get_method() == b"CONNECT":  # what follows would belong to no request
            raise ValueError("this is no proxy")
        if self.parser.should_upgrade():  # `_parse` has the headers read again
            return
        self._in_head = False
        self._header_bytes = 0
        self._idle.pop(self, None)
        self._stop_timer()
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            _send_until_close(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._header_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_head = True
        self._header_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._idle[self] = None
        super().on_response_complete()
        if not self._in_head:
            self._start_timer(HEADER_TIMEOUT_S)

    def _refuse(self, error: ApiError) -> None:
        """Send the error and close the connection; only close it if another response is in progress."""
        if self._is_answering() or self.transport.is_closing():
            self.transport.close()
            return
        content = ErrorAnswer.of(error).model_dump_json().encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(content)
        self._refused = True
        self.transport.write(STATUS_LINE[error.status] + head + content)
        self.transport.write_eof()
        self._start_timer(LINGER_S)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _check_sending(self, before_bytes: int, changed_s: float) -> None:
        """Disconnect a client that reads nothing while the buffers are full; what is left to send changed last then."""
        left_bytes, now_s = self.transport.get_write_buffer_size(), self.loop.time()
        changed_s = changed_s if left_bytes == before_bytes else now_s
        notes = self.cycle.scope["state"].get("notes") if self.cycle is not None else None
        self._checks_sending = self.flow.write_paused
        if not self.flow.write_paused:
            return
        if now_s - changed_s < (STALLED_S if notes is not None and notes.generating else self._send_timeout_s):
            self.loop.call_later(CHECK_SENDING_S, self._check_sending, left_bytes, changed_s)
            return
        if notes is not None and self._is_answering():
            notes.gone = True  # otherwise its status would be logged as if it had been sent
        else:
            log.warning("a client stopped reading: the last %d bytes of its response were cut", left_bytes)
        self.transport.abort()  # stops an engine and releases the request's places; `close` would wait for the client

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._on_timer)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        if self._is_answering():
            self._start_timer(HEADER_TIMEOUT_S)
        elif self.app_state.get("stopping") and not self._refused:
            self._refuse(Unavailable("this gateway is stopping: try again", code="stopping", retry_after_s=1))
        elif self._in_head and self._header_bytes and not self._refused:
            self._refuse(TooSlow(f"the request's headers did not arrive within {HEADER_TIMEOUT_S:g} s"))
        else:
            self.transport.close()


def _send_until_close(cycle: RequestResponseCycle) -> None:
    """Send a response without a length as HTTP/1.0 has it: not in chunks, it ends with the connection."""

    async def send(message: ASGISendEvent) -> None:
        if message["type"] == "http.response.body":
            cycle.expected_content_length = len(message.get("body", b""))
        await RequestResponseCycle.send(cycle, message)

    cycle.chunked_encoding = False
    cycle.send = send  # type: ignore[method-assign]


def allow_connections() -> int:
    """Raise this process's limit on open files to what `MAX_CONNECTIONS` need; return how many it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 2 * MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, 2 * MAX_CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return files // 2


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    limit, idle = allow_connections(), IdleConnections()
    protocol: Any = partial(Connection, send_timeout_s=settings.send_timeout_s, limit=limit, idle=idle)
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",  # our own code runs the lifespan: uvicorn would log its errors as tracebacks
        log_config=None,
        access_log=False,  # paths contain user ids
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=math.ceil(settings.drain_s),
    )


class GatewayServer(uvicorn.Server):
    """Uvicorn's server, which resets no request when it stops. Its caller handles signals, from before startup."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
        await asyncio.sleep(ACCEPT_S)
        await super().shutdown(sockets)
