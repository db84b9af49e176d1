"""A gateway as the user commands call it: patiently, and never faster than it wants."""

from __future__ import annotations

import asyncio
import random
import time
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp
import orjson
from yarl import URL

from adapters.errors import MtaError, excerpt

PATIENCE_S = 300.0
"""How long a gateway may be away or busy before a command gives up."""

ANSWER_S = 120.0
"""Longest silence within an answer."""

_BUSY = frozenset((408, 429, 502, 503, 504))
_LONGEST_PAUSE_S = 30.0
_FIRST_PAUSE_S = 0.5


class Refused(MtaError):
    """The gateway's answer is a no that asking again does not change.

    Attributes:
        status: of the answer.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Gateway:
    """Calls to one gateway; an asynchronous context manager.

    While it is busy or away, all calls wait together: one that was told to come back later speaks for the others.

    Args:
        url: its base URL.
        patience_s: how long it may be busy or away.
        key: the API key that it is sent.
    """

    def __init__(self, url: str, patience_s: float = PATIENCE_S, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._patience_s = patience_s
        self._key = key
        self._not_before_s = 0.0
        self._ill_since_s: float | None = None
        self._failures = 0

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=ANSWER_S)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._session = aiohttp.ClientSession(timeout=timeout, headers=headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def call(self, method: str, path: str, body: object = None) -> bytes:
        """The body of an answer.

        Args:
            method: repeatable: it may be sent again after an answer that was lost.
            path: see `user_path`.
            body: sent as JSON.

        Raises:
            Refused: when the answer is a no.
            MtaError: when there has been none for too long.
        """
        sent = None if body is None else orjson.dumps(body)
        headers = {} if sent is None else {"Content-Type": "application/json"}
        while True:
            await self._turn()
            try:
                async with self._session.request(
                    method, URL(self.url + path, encoded=True), data=sent, headers=headers
                ) as response:
                    raw = await response.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                self._bear(f"it cannot be reached ({error})", None)
                continue
            except ValueError as error:
                raise MtaError(f"{excerpt(self.url)} is not the URL of a gateway: {error}") from error
            if response.status in _BUSY:
                self._bear(reason_of(raw, response.status), response.headers.get("Retry-After"))
                continue
            self._ill_since_s, self._failures = None, 0
            if not response.ok:
                hint = "; MTA_API_KEY is where this command takes it from" if response.status == 401 else ""
                raise Refused(reason_of(raw, response.status) + hint, response.status)
            return raw

    async def json(self, method: str, path: str, body: object = None) -> Any:
        """The same, read as JSON.

        Raises:
            Refused, MtaError: as `call`; also when the answer is not JSON.
        """
        try:
            return orjson.loads(await self.call(method, path, body))
        except ValueError as error:
            raise MtaError(f"{self.url} does not answer as a gateway does: is it one?") from error

    async def _turn(self) -> None:
        """Wait until the gateway may be asked."""
        left_s = self._not_before_s - time.monotonic()
        while left_s > 0:
            await asyncio.sleep(left_s)
            left_s = self._not_before_s - time.monotonic()

    def _bear(self, reason: str, retry_after: str | None) -> None:
        """Have everybody wait: as long as the gateway asks for, or longer with every failure in a row."""
        now_s = time.monotonic()
        ill_since_s = self._ill_since_s = now_s if self._ill_since_s is None else self._ill_since_s
        self._failures += 1
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._failures - 1, 10))
        if retry_after is not None and retry_after.strip().isdecimal():
            pause_s = min(float(retry_after), self._patience_s)
        if now_s + pause_s > ill_since_s + self._patience_s:
            raise MtaError(f"{self.url}: {reason}; given up after {now_s - ill_since_s:.0f} s")
        self._not_before_s = max(self._not_before_s, now_s + pause_s * random.uniform(1, 1.2))


def user_path(user_id: str, *rest: str) -> str:
    """The path of a user's, whatever the id is."""
    return "/".join(("/users", quote(user_id, safe=""), *rest))


def reason_of(raw: bytes, status: int) -> str:
    """What an error says, which may also come from a proxy."""
    try:
        return str(orjson.loads(raw)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"it answered {status}: {excerpt(raw.decode('utf-8', 'replace'))}"
