"""`mta eval`'s tables on a terminal: without the intervals, which do not fit on a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from bank.evaluation.methods import Base
from bank.evaluation.report.authorship import AuthorshipRow
from bank.evaluation.report.intervals import LEVEL, Interval
from bank.evaluation.report.summary import MethodRow, columns
from bank.evaluation.session import TABLE_FILE

_ASIDE = (Base.PRIOR, Base.RANDOM, Base.COMMON, Base.MEAN)
"""What is not compared with where there is no room for it, the first one first; each has a row of its own."""


def print_tables(found: Mapping[str, Sequence[MethodRow]], console: Console) -> None:
    """Print rows of methods, each table under its title, and how to read them."""
    for title, rows in found.items():
        console.print(_table(title, rows, console.width))
        console.print()
        console.print(_prices(rows))
        console.print()
    console.print(
        "loss in nats per token, lower is better; then the task's metrics; then the loss less that of another method, "
        f"with a star where the difference is sure: p below {LEVEL} in a paired sign-flip test over people, after "
        f"Holm's correction for all methods in the column. The 95 % intervals are in {TABLE_FILE}."
    )


def print_voices(rows: Sequence[AuthorshipRow], console: Console) -> None:
    """Print whose voice the methods' texts have; nothing where none were written."""
    if not rows:
        return
    table = Table(title=f"whose voice? {rows[0].named.n} people", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for name in ("right person first", "mean rank"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.method, f"{row.named.mean:.1%}", f"{row.rank.mean:.2f}")
    console.print(table)


def _table(title: str, rows: Sequence[MethodRow], width: int) -> Table:
    metrics, compared = columns(rows)
    names = max(len(row.method) for row in rows) + 1
    room = (width - names - len(" 0.000") * (1 + len(metrics))) // len(" -0.000*")
    for aside in _ASIDE:
        compared = [name for name in compared if name != aside or len(compared) <= room]
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for name in ("loss", *metrics, *("less\n" + other.replace(":", ":\n") for other in compared)):
        table.add_column(name, justify="right", vertical="bottom")
    for row in rows:
        values = [f"{row.metrics[name]:.3f}" if name in row.metrics else "" for name in metrics]
        table.add_row(row.method, f"{row.loss:.3f}", *values, *(_gain(row.against.get(name)) for name in compared))
    return table


def _prices(rows: Sequence[MethodRow]) -> Table:
    """What each method has the model read, how long that takes, and what a server keeps of a person."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for name in ("tokens of the prompt", "ms to the first token", "bytes kept"):
        table.add_column(name, justify="right")
    for row in rows:
        first_ms = "" if row.first_token_ms is None else f"{row.first_token_ms:.0f}"
        table.add_row(row.method, f"{row.prompt_tokens:.0f}", first_ms, f"{row.kept_bytes:,.0f}")
    return table


def _gain(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"[bold]{interval.mean:+.3f}*[/bold]" if interval.sure else f"{interval.mean:+.3f} "
