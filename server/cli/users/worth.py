"""`mta worth`: what personalisation is worth, by the users that are held out."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from server.cli.users.commands import Url, call_gateway


def worth(
    url: Url = None, json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False
) -> None:
    """Show whether people change, send and discard personal answers differently, and whether that is sure.

    Needs an API key with the scope admin in MTA_API_KEY once keys exist, and users who are held out (MTA_HOLDOUT).
    """
    import orjson

    known = call_gateway(url, lambda client: client.worth())
    if json:
        typer.echo(orjson.dumps(asdict(known), option=orjson.OPT_INDENT_2).decode())
        return
    console = Console(highlight=False)
    if known.comparisons:
        console.print(_comparisons(known.comparisons))
    if known.weeks:
        newest = known.weeks[0]["week"]
        console.print(_week(newest, [row for row in known.weeks if row["week"] == newest]))
    for week in known.running:
        console.print(f"week of {week['week']}: {week['people']} people so far, counted once it is over")
    for sentence in known.says:
        console.print(sentence, markup=False)


def _comparisons(rows: Any) -> Table:
    table = Table("level", "metric", "one level lower", "full", "difference", title="All weeks", title_justify="left")
    for row in rows:
        means = (f"{_percent(row[arm]['mean'])} of {row[arm]['people_weeks']}" for arm in ("lower", "full"))
        difference = "–"
        if interval := row["difference"]:
            difference = (
                f"{100 * interval['estimate']:+.1f} ({100 * interval['low']:+.1f} to {100 * interval['high']:+.1f})"
            )
        table.add_row(row["level"], row["metric"], *means, difference)
    return table


def _week(week: str, rows: Any) -> Table:
    metrics = ("changed", "sent", "discarded", "up", "silent")
    table = Table("level", "arm", "people", "answers", *metrics, title=f"Week of {week}", title_justify="left")
    for row in rows:
        numbers = (str(row[name]) for name in ("people", "answers"))
        known = (_percent(row["shares"].get(metric)) for metric in metrics)
        table.add_row(row["level"], row["arm"], *numbers, *known)
    return table


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f} %"
