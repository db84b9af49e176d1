"""Produce the table of docs/quality.md: build a bank of real people, and evaluate every method on unseen users.

    python -m evaluation.studies --data ../data --task news_headline

builds a bank and its baselines from `DATA/TASK/anchors.json` with the defaults, and evaluates all methods on
`DATA/TASK/users.json`. `--folds N` is for tuning: it splits the people of `anchors.json` into N folds, evaluates each
fold on a bank built from the others, and does not touch `users.json`.

`--quick` runs the same two commands on a few made-up people and a tiny random model, in a minute or two. It tests the
code and says nothing about gains.
"""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path
from typing import Annotated

import typer

from bank.items.tasks import get_task
from bench import script
from bench.page.report import console
from bench.rig.people import people, write_people
from bench.rig.tiny import tiny_model
from evaluation.methods import DEFAULT, default_methods
from evaluation.run import RECORDS_FILE
from evaluation.session import TABLE_FILE
from evaluation.studies import mta

TASKS = {"mail": "chat", "c50": "chat", "blogs": "chat"}
"""Tasks of the folders whose name is not a task."""

ANCHORS = {"mail": 10, "c50": 32, "blogs": 216, "news_headline": 12, "movie_rating": 20}
BUILDS = {
    "mail": "--anchors-by longest --common-steps 128 --common-batch-size 8 --steps 4",
    "c50": "--anchors-by longest --common-steps 64 --common-batch-size 8 --steps 6",
    "blogs": "--anchors-by longest --common-steps 48 --common-batch-size 8 --steps 4",
    "movie_rating": "--common-steps 80",
}
"""Options of `mta bank build` for tasks whose figures in docs/quality.md do not use the defaults."""

WRITTEN = "task," + ",".join(f"{name}+history@h1" for name in ("base", "common", "merged", "own", "stacked"))
EVALS = {
    "mail": f"--no-predict --no-curves --write {WRITTEN}",
    "c50": "--no-predict --no-curves",
    "blogs": f"--no-predict --no-curves --write {WRITTEN}",
}
"""Options of `mta eval` for tasks with long answers: their style says more than their word overlap with the gold
answer, and computing both takes too long."""

QUERIES = {"mail": 3, "news_headline": 6, "movie_rating": 8}
PROFILES = {"mail": 6}
"""For folds: a person's last QUERIES items are queries, and the PROFILES items before them are the profile."""


def main(
    *,
    data: Annotated[Path | None, typer.Option(help="Folder of the real histories.", exists=True)] = None,
    task: Annotated[
        str, typer.Option(help="The task, and its folder in --data; `mail`, `c50` and `blogs` are chat.")
    ] = "news_headline",
    out: Annotated[Path, typer.Option(help="Folder for banks and tables.")] = Path("out/quality"),
    seeds: Annotated[int, typer.Option(help="Number of random seeds.", min=1)] = 3,
    folds: Annotated[int, typer.Option(help="Evaluate on N folds of the anchors instead.", min=0)] = 0,
    people: Annotated[int | None, typer.Option(help="At most N people of each part.")] = None,
    bank: Annotated[
        Path | None, typer.Option(help="Evaluate this bank instead of building one.", exists=True, show_default=False)
    ] = None,
    anchors: Annotated[
        int | None,
        typer.Option(help="Number of anchors of each bank.", show_default="12, mails 10, films 20, c50 32, blogs 216"),
    ] = None,
    evaluate: Annotated[str, typer.Option("--eval", help="Further options of `mta eval`, in one string.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Made-up people and a tiny model.")] = False,
) -> None:
    """Build, evaluate, and print the table."""
    if quick:
        _quick(out / "quick", seeds)
        return
    if bank and folds:
        raise typer.BadParameter("each fold builds a bank of its own: leave out --bank or --folds", param_hint="--bank")
    if data is None:
        raise typer.BadParameter("give the folder of the real histories, or --quick", param_hint="--data")
    out = out / task
    name = TASKS.get(task, task)
    everybody = data / task / "anchors.json"
    size = anchors or ANCHORS.get(task, 12)
    build = f"--no-verdict {BUILDS.get(task, '')}"
    methods = ",".join([*(method.name for method in default_methods(get_task(name).kind)), "merged:topic"])
    options = ["--methods", methods, *shlex.split(f"{EVALS.get(task, '')} {evaluate}")]
    options += ["--people", str(people)] if people else []
    if not folds:
        bank = bank or _bank(out / "bank", everybody, name, size, build)
        mta("eval", "--users", data / task / "users.json", "--bank", bank, "--out", out, "--seeds", seeds, *options)
        return
    ids = [str(person["user_id"]) for person in json.loads(everybody.read_text("utf-8"))]
    random.Random(0).shuffle(ids)
    for fold in range(folds):
        folder = out / f"fold-{fold}-of-{folds}"
        folder.mkdir(parents=True, exist_ok=True)
        left_out = folder / "left-out.json"
        left_out.write_text(json.dumps(ids[fold::folds]), "utf-8")
        bank = _bank(folder / "bank", everybody, name, size, f"{build} --exclude {shlex.quote(str(left_out))}")
        split = ("--last", QUERIES.get(task, 6), "--profile", PROFILES.get(task, 10))
        asked = ("--only", left_out, *split, "--seeds", seeds, *options)
        mta("eval", "--users", everybody, "--bank", bank, "--out", folder, *asked)
        console().print(f"fold {fold}: {folder / TABLE_FILE}, {folder / RECORDS_FILE}")


def _quick(out: Path, seeds: int) -> None:
    """Evaluate every method on three people with a tiny bank of five others."""
    out.mkdir(parents=True, exist_ok=True)
    model, everybody = tiny_model(out / "model"), people(8)
    for person in everybody[5:]:
        asked = [{"id": f"{person['user_id']}-{n}", "input": f"Say {n}", "gold": f"{n} indeed"} for n in range(30, 33)]
        person["query"] = asked
    known, new = write_people(out / "known.json", everybody[:5]), write_people(out / "new.json", everybody[5:])
    small = (
        f"--rank 4 --user-rank 4 --steps 3 --common-steps 3 --batch-size 4 --model {shlex.quote(str(model))} --force"
    )
    bank = _bank(out / "bank", known, "chat", 3, small)
    methods = f"{DEFAULT},merged:topic,merged+history@h1"
    mta("eval", "--users", new, "--bank", bank, "--out", out, "--seeds", seeds, "--methods", methods, "--model", model,
         "--sample", 2, "--write", "common,merged+history@h1")  # fmt: skip


def _bank(out: Path, users: Path, task: str, anchors: int, options: str) -> Path:
    mta("bank", "build", "--users", users, "--task", task, "--anchors", anchors, "--out", out, "--baselines",
        *shlex.split(options))  # fmt: skip
    return out


if __name__ == "__main__":
    script(main)
