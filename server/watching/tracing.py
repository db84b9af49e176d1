"""What a process traces. Without a collector: nothing, by code that imports nothing.

A trace is named by W3C's `traceparent`, which travels in headers and in the records of jobs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

TRACES_PATH = "/v1/traces"
"""Where collectors take spans, by OTLP over HTTP."""


class Tracing:
    """Traces nothing; `spans.py` and `otlp.py` have those that do, and `opening.py` chooses."""

    def watch_app(self, app: FastAPI) -> None:
        """Have every request to an application traced, but for those that only ask how it is."""

    def session_options(self) -> dict[str, Any]:
        """Arguments for an aiohttp session whose requests are traced, and carry the trace on."""
        return {}

    def current(self) -> str:
        """The traceparent of what runs now; empty outside of any trace."""
        return ""

    def span(self, name: str, *, follows: str = "") -> AbstractContextManager[None]:
        """What runs in the block, as a part of the trace that it runs in, or of the one that it follows."""
        return nullcontext()

    def note(self, **attributes: str | int | float) -> None:
        """Say something about what runs now. Never ids of users, or anything that they wrote."""

    def link(self, traceparent: str) -> None:
        """Say that what runs now came to be by something in another trace."""

    def close(self) -> None:
        """Send what was not sent yet."""
