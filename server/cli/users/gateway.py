"""The client with which commands call a gateway, and its errors in words for a terminal."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import HttpUrl, TypeAdapter, ValidationError

import mta_client
from adapters.errors import MtaError, excerpt
from server.settings import load_settings


class RequestRefused(MtaError):
    """The gateway refused this request, not the key; a retry would not help."""


def gateway_client(url: str | None, retry_s: float = 0) -> mta_client.Client:
    """Return a client with the key in MTA_API_KEY for the gateway at `url`, by default on this machine."""
    settings = load_settings()
    url = url or f"http://127.0.0.1:{settings.port}"
    try:
        TypeAdapter(HttpUrl).validate_python(url)
    except ValidationError as error:
        raise MtaError(f"{excerpt(url)} is not the URL of a gateway, such as http://127.0.0.1:8000") from error
    key = settings.api_key.get_secret_value() if settings.api_key else None
    # Proxy settings are for hosts outside.
    return mta_client.Client(url, key=key, retry_s=retry_s, trust_env=False, verify=ssl.create_default_context())


@contextmanager
def gateway_errors(client: mta_client.Client) -> Iterator[None]:
    """Turn a failed call into RequestRefused, or into MtaError if other requests would fail as well."""
    try:
        yield
    except mta_client.MtaError as error:
        if error.is_transient:
            tried = f"gave up (a call is repeated for at most {client.retry_s:.0f} s)"
            raise MtaError(f"{client.url}: {describe_error(error)}; {tried}") from error
        of_key = error.status == 401 or (error.status == 403 and error.code != "quota_exceeded")
        raise (MtaError if of_key else RequestRefused)(describe_error(error)) from error


def describe_error(error: mta_client.MtaError) -> str:
    """Return an error as one line; it may come from a proxy."""
    if error.code == "not_understood" and error.status:
        return f"it answered {error.status}: {excerpt(error.message)}"
    return error.message + ("; this command takes the key from MTA_API_KEY" if error.status == 401 else "")
