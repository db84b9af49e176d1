"""Compare `mta eval` in process with `mta eval` through a running vLLM, query by query.

Both score the same gold answers of the same people in float32: in process with the adapter attached to the model, in
the engine under the recipe's name with vLLM's `prompt_logprobs`. The losses and the ranking of methods must agree.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer

from bank.building.assemble import BASELINES
from bank.evaluation.run import RECORDS_FILE, Record, read_records
from bank.manifest import read_manifest
from bank.models.folders import ensure_base_model
from bench import script
from bench.page.report import marked, report
from bench.quality import methods_of, mta
from bench.rig.engine import KEY, running_engine
from bench.rig.valkey import ValkeyProcess
from server.settings import Settings

AGREE = 0.01
"""Largest accepted difference between two losses, in nats per token."""


def main(
    *,
    bank: Annotated[Path, typer.Option(help="A bank built with --baselines.")],
    users: Annotated[Path, typer.Option(help="People with queries.")],
    people: Annotated[int, typer.Option(help="How many people.", min=2)] = 5,
    methods: Annotated[str | None, typer.Option(help="Comma-separated.", show_default="all of the task's")] = None,
    model: Annotated[str, typer.Option(help="Base model: folder, hub id or `default`.")] = "default",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Report the largest differences in loss, and the ranking of the methods."""
    folder = ensure_base_model(model, Settings().cache_dir)
    chosen = methods or methods_of(read_manifest(bank).task)
    asked = ["--bank", bank, "--users", users, "--people", people, "--methods", chosen, "--model", folder]
    asked += ["--sample", people, "--dtype", "float32", "--no-predict", "--no-curves"]
    with tempfile.TemporaryDirectory() as scratch:

        def run(name: str, *options: object) -> dict[tuple[str, str, str], Record]:
            mta("eval", *asked, "--out", Path(scratch) / name, *options, MTA_ENGINE_KEY=KEY)
            found = read_records(Path(scratch) / name / RECORDS_FILE)
            return {(record.method, record.user_id, record.query_id): record for record in found}

        here = run("in-process")
        valkey = ValkeyProcess(Path(scratch) / "valkey").start()
        try:
            serving = {"dtype": "float32", "next_bank": bank / BASELINES, "redis_url": valkey.url}
            with running_engine(bank, folder, **serving) as engine:
                there = run("in-the-engine", "--engine-url", engine.url, "--redis-url", valkey.url)
        finally:
            valkey.kill()
    gaps: dict[str, float] = defaultdict(float)
    for key, record in here.items():
        gaps[record.method] = max(gaps[record.method], abs(record.loss - there[key].loss))
    one, other = (" > ".join(_ranking(list(found.values()))) for found in (here, there))
    rows = [(f"{name}: largest difference", marked(f"{gap:.1e}", gap <= AGREE)) for name, gap in gaps.items()]
    rows += [("ranking in process", one), ("ranking in the engine", other)]
    rows.append(("the same ranking", marked("yes" if one == other else "no", one == other)))
    report(f"Two evaluators, float32: {people} people of {users.name}, losses in nats per token", rows, out)


def _ranking(records: Sequence[Record]) -> Sequence[str]:
    """Return the methods, best first."""
    losses: dict[str, list[float]] = defaultdict(list)
    for record in records:
        losses[record.method].append(record.loss)
    return sorted(losses, key=lambda name: mean(losses[name]))


if __name__ == "__main__":
    script(main)
