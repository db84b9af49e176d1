"""Gateway calls that are retried while the gateway is busy or down, and respect `Retry-After`."""

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

MAX_RETRY_S = 300.0  # time after which a command gives up on a gateway that is busy or down
_RETRIED_STATUSES = frozenset((408, 429, 502, 503, 504))
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.5, 30.0


class RequestRefused(MtaError):
    """The gateway refused the request; a retry would not help."""


class RetryingGateway:
    """Thread-safe calls to one gateway; a delay that one answer requests applies to all calls."""

    def __init__(self, client: mta_client.Client, max_retry_s: float = MAX_RETRY_S) -> None:
        self.url = client.url
        self._client = client
        self._max_retry_s = max_retry_s
        self._lock = threading.Lock()
        self._not_before_s = 0.0
        self._failing_since_s: float | None = None
        self._stopped = threading.Event()

    def call(self, method: Callable[[mta_client.Client], T]) -> T:
        """Call an idempotent method until it answers; RequestRefused if refused, MtaError if down for too long."""
        while True:
            while (left_s := self._not_before_s - time.monotonic()) > 0 and not self._stopped.wait(left_s):
                pass  # another call may have extended the wait
            if self._stopped.is_set():
                raise MtaError(f"{self.url}: stopped")
            try:
                answer = method(self._client)
            except mta_client.MtaError as error:
                if error.code != "no_answer" and error.status not in _RETRIED_STATUSES:
                    raise RequestRefused(describe_error(error)) from error
                self._back_off(error)
                continue
            self._failing_since_s = None
            return answer

    def stop(self) -> None:
        """Make waiting calls raise MtaError."""
        self._stopped.set()

    def _back_off(self, error: mta_client.MtaError) -> None:
        """Delay all calls for as long as the gateway asks, or for as long as it has been down so far."""
        now_s = time.monotonic()
        with self._lock:
            since_s = self._failing_since_s = self._failing_since_s or now_s
            pause_s = min(max(now_s - since_s, _FIRST_PAUSE_S), _MAX_PAUSE_S)
            if error.retry_after_s is not None:
                pause_s = min(error.retry_after_s, self._max_retry_s)
            if now_s + pause_s > since_s + self._max_retry_s:
                raise MtaError(f"{self.url}: {describe_error(error)}; gave up after {now_s - since_s:.0f} s")
            self._not_before_s = max(self._not_before_s, now_s + pause_s * random.uniform(1, 1.2))


def describe_error(error: mta_client.MtaError) -> str:
    """Return an error as one line; it may come from a proxy."""
    if error.code == "not_understood" and error.status:
        return f"it answered {error.status}: {excerpt(error.message)}"
    return error.message + ("; this command takes the key from MTA_API_KEY" if error.status == 401 else "")


def gateway_client(url: str | None) -> mta_client.Client:
    """Return a client with the key in MTA_API_KEY for the gateway at `url`, by default on this machine."""
    settings = load_settings()
    url = url or f"http://127.0.0.1:{settings.port}"
    try:
        TypeAdapter(HttpUrl).validate_python(url)
    except ValidationError as error:
        raise MtaError(f"{excerpt(url)} is not the URL of a gateway, such as http://127.0.0.1:8000") from error
    key = settings.api_key.get_secret_value() if settings.api_key else None
    # Proxy settings are for hosts outside.
    return mta_client.Client(url, key=key, trust_env=False, verify=ssl.create_default_context())
