"""What benchmarks of a running server need besides `mta_client`: its API key, and patience with its worker."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import httpx

from mta_client import Client

PATIENCE_S = 120.0
"""How long the worker may take over one user's items; a job of another user's may be in its way."""

POLL_S = 0.5


def authorization() -> dict[str, str]:
    """The header with the API key in MTA_API_KEY, as `mta_client` sends it; none without a key."""
    key = os.environ.get("MTA_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def until_signed(client: Client, users: Iterable[str]) -> set[str]:
    """Wait until users are served by their signatures, if the server's bank has such: until then their recipes change.

    Those whose items teach nothing, such as plain texts, stay with their topics: when nobody else got a signature for
    `PATIENCE_S`, the wait is over.

    Args:
        client: of the server.
        users: who have a profile.

    Returns:
        Those who are served by topic.

    Raises:
        httpx.HTTPError: when the server does not say what its bank is.
    """
    left, last_s = set(users), time.monotonic()
    answer = httpx.get(f"{client.url}/bank", headers=authorization(), timeout=60)
    if answer.raise_for_status().json()["rule"]["name"] == "topic":
        return left
    while left and time.monotonic() < last_s + PATIENCE_S:
        signed = {user for user in left if client.user(user).source == "signature"}
        if signed:
            left, last_s = left - signed, time.monotonic()
        else:
            time.sleep(POLL_S)
    return left
