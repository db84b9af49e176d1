"""`mta settings`: show every setting, its variable and its current value."""

from __future__ import annotations

import re
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.settings import Settings, load_settings

WIDTH_IN_FILES = 200
_PASSWORD = re.compile(r"(://[^:/@]*:)[^/]+(?=@)")  # of a URL: up to its last @


def settings() -> None:
    """Show every setting: its environment variable, its current value and its purpose. Secrets are hidden."""
    current = load_settings()
    table = Table("variable", "value", "what it is", pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for name, field in Settings.model_fields.items():
        value = getattr(current, name)
        shown = "" if value is None else _PASSWORD.sub(r"\1***", str(value))  # secrets print as asterisks
        table.add_row(f"MTA_{name.upper()}", Text(shown), Text(field.description or ""))
    Console(width=None if sys.stdout.isatty() else WIDTH_IN_FILES).print(table)
