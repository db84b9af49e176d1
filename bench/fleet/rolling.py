"""`mta bench fleet rolling`: replace every part and the bank under load, without a failed request.

Two gateways, a router and two engines are separate processes, each stopped (SIGTERM) and restarted one at a time:
engines with the current and the next bank, gateways with the next one, engines with only the next one, and the router.
Clients act like a load balancer: if one gateway takes no connection, they ask the other.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import httpx
import typer

from bank.manifest import read_manifest
from bench import script
from bench.fleet.exercise.claims import Claim
from bench.fleet.exercise.processes import ProcessFleet
from bench.fleet.exercise.replacing import know_people, person, recipe_in, replace_all
from bench.page.report import report


def main(out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None) -> None:
    """Replace every part and the bank under load; exit status 1 if a request failed."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as ended:
        fleet = ProcessFleet(Path(scratch), ended)
        know_people(fleet)
        claims = replace_all(fleet)
        asked = {"user_id": person(0), "prompt": "Well?", "max_tokens": 1}
        last = httpx.post(f"{fleet.urls[0]}/generate", json=asked).raise_for_status().text
        moved = recipe_in(last).startswith(f"mta3:{read_manifest(fleet.next_bank).short}")
    claims.append(Claim("the next bank serves", "yes" if moved else "no", moved))
    title = "two gateways, a router and two engines, all exchanged under load"
    report(title, [claim.row for claim in claims], out)


if __name__ == "__main__":
    script(main)
