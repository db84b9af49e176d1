"""What tests read of a real engine's answers."""

from __future__ import annotations

import httpx


def text_of(response: httpx.Response) -> str:
    """The text of a chat completion, which must have succeeded."""
    assert response.status_code == httpx.codes.OK, response.text
    return str(response.json()["choices"][0]["message"]["content"])
