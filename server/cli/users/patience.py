"""Calls of a gateway that are repeated while it is busy or away, never earlier than it asks."""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pydantic import HttpUrl, TypeAdapter, ValidationError

import mta_client
from adapters.errors import MtaError, excerpt
from server.settings import load_settings

T = TypeVar("T")

PATIENCE_S = 300.0  # how long a gateway may be away or busy before a command gives up
_BUSY = frozenset((408, 429, 502, 503, 504))
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


class Refused(MtaError):
    """The gateway refused the request, and would again."""


class PatientGateway:
    """Calls to one gateway, from any thread.

    While it is busy or away, all calls wait together: one that was told to come back later speaks for the others.
    """

    def __init__(self, client: mta_client.Client, patience_s: float = PATIENCE_S) -> None:
        self.url = client.url
        self._client = client
        self._patience_s = patience_s
        self._state = threading.Lock()
        self._not_before_s = 0.0
        self._failing_since_s: float | None = None
        self._stopped = threading.Event()

    def call(self, method: Callable[[mta_client.Client], T]) -> T:
        """Call a method of the client, one that can be repeated, until it answers.

        Raises Refused when the gateway refuses it, and MtaError when it has been busy or away for too long.
        """
        while True:
            while (left_s := self._not_before_s - time.monotonic()) > 0 and not self._stopped.wait(left_s):
                pass  # another call may have moved it on
            if self._stopped.is_set():
                raise MtaError(f"{self.url}: stopped")
            try:
                answer = method(self._client)
            except mta_client.MtaError as error:
                if error.code != "no_answer" and error.status not in _BUSY:
                    raise Refused(reason_of(error)) from error
                self._back_off(error)
                continue
            self._failing_since_s = None
            return answer

    def stop(self) -> None:
        """End the calls that wait, with an error."""
        self._stopped.set()

    def _back_off(self, error: mta_client.MtaError) -> None:
        """Let all calls wait as long as the gateway asks for, or as long as it has been away already."""
        now_s = time.monotonic()
        with self._state:
            since_s = self._failing_since_s = now_s if self._failing_since_s is None else self._failing_since_s
            pause_s = min(max(now_s - since_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
            if error.retry_after_s is not None:
                pause_s = min(error.retry_after_s, self._patience_s)
            if now_s + pause_s > since_s + self._patience_s:
                raise MtaError(f"{self.url}: {reason_of(error)}; given up after {now_s - since_s:.0f} s")
            self._not_before_s = max(self._not_before_s, now_s + pause_s * random.uniform(1, 1.2))


def reason_of(error: mta_client.MtaError) -> str:
    """What an error says, in a line: it may come from a proxy, too."""
    if error.code == "not_understood" and error.status:
        return f"it answered {error.status}: {excerpt(error.message)}"
    return error.message + ("; MTA_API_KEY is where this command takes the key from" if error.status == 401 else "")


def client_of(url: str | None) -> mta_client.Client:
    """A client of the gateway at `url`, by default this machine's, with the key in MTA_API_KEY."""
    settings = load_settings()
    url = url or f"http://127.0.0.1:{settings.port}"
    try:
        TypeAdapter(HttpUrl).validate_python(url)
    except ValidationError as error:
        raise MtaError(f"{excerpt(url)} is not the URL of a gateway, such as http://127.0.0.1:8000") from error
    key = settings.api_key.get_secret_value() if settings.api_key else None
    # Proxies of the environment are for what is outside.
    return mta_client.Client(url, key=key, trust_env=False, verify=ssl.create_default_context())
