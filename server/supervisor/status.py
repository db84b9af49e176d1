"""The output of `mta up`: a live table of the parts on a terminal, one line per change otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import StrEnum

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text


class State(StrEnum):
    """State of a part."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    GIVEN_UP = "given up"
    STOPPING = "stopping"
    STOPPED = "stopped"


Report = Callable[[str, State, str], None]
"""Called with the name of a part, its new state, and a detail to display."""

_STYLES = {State.READY: "green", State.DOWN: "bold red", State.GIVEN_UP: "bold red"}


class PipeSafeConsole(Console):
    """A console that drops output after a broken pipe: `mta up | head` must not end the server."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()


class Status:
    """Print a line for each change of a part; on a terminal, update a table in place until `close`."""

    def __init__(self, console: Console, parts: Sequence[str]) -> None:
        self._console = console
        self._states = {part: (State.WAITING, "", time.monotonic()) for part in parts}
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=8)
        if console.is_terminal:
            self._live.start()

    def __call__(self, part: str, state: State, detail: str) -> None:
        if self._live.is_started:
            self._states[part] = (state, detail, time.monotonic())
            self._live.refresh()
        else:
            line = Text(f"  {part:<9}").append(f"{state.value:<9}", _STYLES.get(state, "")).append(f" {detail}")
            self._console.print(line, soft_wrap=True)

    def close(self) -> None:
        """Stop updating the table; later changes are printed as lines."""
        self._live.stop()

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for part, (state, detail, since_s) in self._states.items():
            busy = state in (State.STARTING, State.STOPPING)
            shown = Spinner("dots", f"{state.value} {time.monotonic() - since_s:.0f} s") if busy else Text(state.value)
            table.add_row(f"  {part}", shown, detail, style=_STYLES.get(state, ""))
        return table
