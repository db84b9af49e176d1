"""`mta eval`'s tables for the terminal, without intervals, which do not fit on a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from bank.evaluation.authorship import AuthorshipRow
from bank.evaluation.intervals import LEVEL, Interval
from bank.evaluation.session import TABLE_FILE
from bank.evaluation.summary import MethodRow, columns

_OPTIONAL = ("prior", "random", "common", "mean")
"""Columns that are dropped on narrow terminals, in this order; the methods still have rows."""


def print_tables(found: Mapping[str, Sequence[MethodRow]], console: Console) -> None:
    """Print each table of methods under its title, with a table of their costs, and a legend."""
    for title, rows in found.items():
        prices = [(row.method, f"{row.prompt_tokens:.0f}", row.first_ms, f"{row.kept_bytes:,.0f}") for row in rows]
        heads = ("prompt tokens", "ms to first token", "bytes stored")
        console.print(_losses(title, rows, console.width), "", _table(None, heads, prices), "", sep="\n")
    console.print(
        "Columns: loss in nats per token, lower is better; the task's metrics; the loss minus another method's, with a "
        f"star if the difference is significant: p below {LEVEL} in a paired sign-flip test over people, after "
        f"Holm's correction for all methods in the column. The 95 % intervals are in {TABLE_FILE}."
    )


def print_authorship(rows: Sequence[AuthorshipRow], console: Console) -> None:
    """Print the authorship of the methods' texts; nothing if no texts were written."""
    if rows:
        lines = [(row.method, f"{row.named.mean:.1%}", f"{row.rank.mean:.2f}") for row in rows]
        title = f"authorship, {rows[0].named.n} people"
        console.print(_table(title, ("right person first", "mean rank"), lines))


def _losses(title: str, rows: Sequence[MethodRow], width: int) -> Table:
    metrics, compared = columns(rows)
    names = max(len(row.method) for row in rows) + 1
    room = (width - names - len(" 0.000") * (1 + len(metrics))) // len(" -0.000*")
    for optional in _OPTIONAL:
        compared = [name for name in compared if name != optional or len(compared) <= room]
    lines = [
        (
            row.method,
            f"{row.loss:.3f}",
            *(f"{row.metrics[name]:.3f}" if name in row.metrics else "" for name in metrics),
            *(_gain(row.against.get(name)) for name in compared),
        )
        for row in rows
    ]
    heads = ("loss", *metrics, *("less\n" + other.replace(":", ":\n") for other in compared))
    return _table(title, heads, lines)


def _table(title: str | None, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", vertical="bottom")
    for line in lines:
        table.add_row(*line)
    return table


def _gain(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"[bold]{interval.mean:+.3f}*[/bold]" if interval.significant else f"{interval.mean:+.3f} "
