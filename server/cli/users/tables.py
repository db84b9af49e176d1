"""`mta users show` as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text


def print_user(user: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `GET /users/{id}` answered."""
    console = console or Console(highlight=False)
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts(user):
        facts.add_row(name, Text(value, overflow="fold"))
    console.print(facts)
    anchors = Table("anchor", "weight", "similarity", "predicted gain", title="Who speaks", title_justify="left")
    for anchor in user["anchors"]:
        numbers = (anchor["weight"], anchor["similarity"], anchor["gain"])
        anchors.add_row(anchor["id"], *("–" if number is None else f"{number:.3f}" for number in numbers))
    console.print(anchors)


def _facts(user: Mapping[str, Any]) -> list[tuple[str, str]]:
    adapter = user["adapter"]
    return [
        ("user", user["user_id"]),
        ("items", f"{user['items']}, with their vectors {decimal(user['bytes'])}"),
        ("updated", user["updated_at"]),
        ("recipe", f"{user['recipe']} (weights by {user['source']})"),
        ("adapter", _adapter(adapter) if adapter else "none"),
    ]


def _adapter(adapter: Mapping[str, Any]) -> str:
    stale = ", of another bank: not served until it is trained again" if adapter["stale"] else ""
    return f"{adapter['id']}, {decimal(adapter['bytes'])}, of {adapter['created_at']}{stale}; on {adapter['recipe']}"
