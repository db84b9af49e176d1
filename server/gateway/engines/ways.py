"""Where a request goes, and where else when nothing came of that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from server.gateway.engines.admin import Engines

MOST_DIRECT = 2
"""Engines that are asked directly, one after the other."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to an engine.

    Attributes:
        url: base URL of an engine, or of the router in front of several.
        session: what a router finds an engine by.
    """

    url: str
    session: str


class Ways:
    """The ways to the engines behind one address.

    Args:
        url: base URL of an engine, or of the router in front of several.
        engines: those behind it.
    """

    def __init__(self, url: str, engines: Engines) -> None:
        self._url = url.rstrip("/")
        self._engines = engines

    def to(self, model: str) -> Iterator[Way]:
        """The ways of a request, best first, each engine at most once as far as can be told.

        On the first a router sends the same model to the same engine. Another session leads elsewhere, unless by
        chance it does not; and where the router cannot be reached, or trusts none, engines can be asked directly.
        """
        yield Way(self._url, model)
        if self._url not in self._engines.urls:
            yield Way(self._url, f"{model}~")
        yield from [Way(url, model) for url in self._engines.places(model) if url != self._url][:MOST_DIRECT]
