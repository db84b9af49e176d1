"""Measure scaling: users in a real store, anchors in a bank, and people who are imported.

    users     un-adapted users in a Valkey started here: bytes per user, p99 of a lookup, memory of a real gateway
    anchors   a bank of 10,000 anchors: time of a topic lookup, and memory
    import    people imported through a real gateway while others are served: rate, memory, and delay of the others

`--quick` takes about a minute. All data is deleted at the end.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from bench import script
from bench.page.report import tabulate
from bench.scale import anchors as anchors_part
from bench.scale import importing as import_part
from bench.scale import users as users_part

PARTS = ("users", "anchors", "import")
QUICK = 50
"""Factor by which a quick run is smaller, down to the minimum."""
MIN_USERS, MIN_COUNT = 1000, 100


def main(
    *,
    part: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(PARTS)}; may be repeated.", show_default="all"),
    ] = None,
    users: Annotated[int, typer.Option(help="Users written to the store.", min=MIN_USERS)] = 1_000_000,
    lookups: Annotated[int, typer.Option(help="Number of timed lookups.", min=MIN_COUNT)] = 20_000,
    anchors: Annotated[int, typer.Option(help="Anchors of the large bank.", min=2)] = 10_000,
    people: Annotated[int, typer.Option(help="People imported during streams.", min=MIN_COUNT)] = 10_000,
    quick: Annotated[bool, typer.Option("--quick", help=f"{QUICK} times fewer of everything but anchors.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the figures as JSON: of scale.json, each part to scale-PART.json.")
    ] = Path("out/bench/scale.json"),
) -> None:
    """Measure bytes and milliseconds per user and anchor at scale."""
    parts = part or PARTS
    for unknown in set(parts) - set(PARTS):
        raise typer.BadParameter(f"{unknown!r} is not one of {', '.join(PARTS)}", param_hint="--part")
    if quick:
        users = max(MIN_USERS, users // QUICK)
        lookups, people = (max(MIN_COUNT, number // QUICK) for number in (lookups, people))
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        for name in parts:
            where = Path(scratch) / name
            if name == "users":
                figures = users_part.measure(users, lookups, where, progress)
            elif name == "anchors":
                figures = anchors_part.measure(anchors, lookups, where, progress)
            else:
                figures = import_part.measure(people, where, progress)
            tabulate([figures], out and out.with_name(f"{out.stem}-{name}.json"), bench="scale")


if __name__ == "__main__":
    script(main)
