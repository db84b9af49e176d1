"""Test a method against others on several tasks at once, over banks that differ in the seed of their rows.

    python -m evaluation.studies.primary c50=out/c50-0,out/c50-1,out/c50-2 mail=out/mail-0,out/mail-1,out/mail-2

reads folders of `mta eval`: for each task one or more, each of another bank, over the same people. A person's loss is
the mean over banks. Holm's correction is over all differences of the table, which must be chosen before they are seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from bench import script
from bench.page.report import report
from evaluation.intervals import Interval, compare_together
from evaluation.run import RECORDS_FILE, Record, read_records
from evaluation.summary import user_losses

Losses = Mapping[str, Mapping[str, float]]
"""Loss of each person, by method."""

Difference = tuple[str, str, str]
"""Task, method, and the method that it is compared with."""


def main(
    *,
    runs: Annotated[
        list[str], typer.Argument(help="TASK=FOLDER[,FOLDER…] of `mta eval`, a folder for each seed of rows.")
    ],
    method: Annotated[str, typer.Option(help="The method to test.")] = "merged",
    against: Annotated[str, typer.Option(help="Comma-separated methods to test it against.")] = "mean,merged:topic",
    histories: Annotated[
        str, typer.Option(help="Comma-separated endings of all names: past items in the prompt.")
    ] = ",+history@h1",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Report loss less the others' with BCa intervals over people; a star is p < 0.05 after Holm's correction."""
    found = {task: mean_losses(_folders(task, listed)) for task, _, listed in (run.partition("=") for run in runs)}
    pairs = [
        (task, method + history, other + history)
        for task in found
        for history in histories.split(",")
        for other in against.split(",")
    ]
    differences = {pair: _differences(found[pair[0]], pair) for pair in pairs}
    tested = compare_together(differences)
    rows = [(f"{task}: {one} less {other}", _row(tested[task, one, other], less))
            for (task, one, other), less in differences.items()]  # fmt: skip
    report(f"{len(rows)} differences, nats a token", rows, out, losses=found)


def mean_losses(folders: Sequence[Path]) -> Losses:
    """Return each person's loss by method: the mean over folders, of methods that have the same people in all."""
    runs = [user_losses(_records(folder)) for folder in folders]
    methods = [m for m, people in runs[0].items() if all(run.get(m, {}).keys() == people.keys() for run in runs)]
    return {m: {user: fmean(run[m][user] for run in runs) for user in runs[0][m]} for m in methods}


def _records(folder: Path) -> list[Record]:
    """Return a folder's records, the last of each query; refuse a query that two different evaluations have read."""
    found: dict[tuple[str, str, int, str], Record] = {}
    for record in read_records(folder / RECORDS_FILE):
        what = (record.user_id, record.method, record.seed, record.query_id)
        if found.setdefault(what, record).key != record.key:
            raise typer.BadParameter(
                f"{folder / RECORDS_FILE} has {record.method} of {record.user_id} by evaluations with different banks, "
                "settings or data: give each a folder of its own"
            )
        found[what] = record
    return list(found.values())


def _folders(task: str, listed: str) -> list[Path]:
    folders = [Path(name) for name in listed.split(",") if name]
    missing = [folder for folder in folders if not (folder / RECORDS_FILE).exists()]
    if missing or not folders:
        where = ", ".join(map(str, missing)) or repr(listed)
        raise typer.BadParameter(f"{task}: no {RECORDS_FILE} of `mta eval` in {where}")
    return folders


def _differences(losses: Losses, pair: Difference) -> list[float]:
    task, method, other = pair
    for name in (method, other):
        if name not in losses:
            raise typer.BadParameter(f"{task} has no {name}; it has {', '.join(losses)}")
    return [loss - losses[other][user] for user, loss in losses[method].items() if user in losses[other]]


def _row(interval: Interval, less: Sequence[float]) -> str:
    return f"{interval}, lower for {sum(value < 0 for value in less)}; p {interval.p:.3f}"


if __name__ == "__main__":
    script(main)
