"""Predictions and gold answers as LaMP's leaderboard and evaluation code read them: a JSON file for each method."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from bank.evaluation.records import Record
from bank.items.tasks import Task

LAMP_FOLDER, GOLDS = "lamp", "golds"


def write_lamp_files(records: Sequence[Record], task: Task, folder: Path) -> None:
    """Write `golds.json`, and `METHOD.json` for each method that has predictions, of the first seed.

    Args:
        records: of an evaluation; without predictions nothing is written.
        task: the files give its name.
        folder: made if needed.
    """
    answers: dict[str, dict[str, str]] = defaultdict(dict)
    golds: dict[str, str] = {}
    for record in records:
        if record.seed == 0 and record.prediction is not None:
            answers[record.method][record.query_id] = record.prediction
            golds[record.query_id] = record.gold
    if not answers:
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{GOLDS}.json", task, golds)
    for method, outputs in answers.items():
        _write(folder / f"{method.replace(':', '-')}.json", task, outputs)


def _write(path: Path, task: Task, outputs: dict[str, str]) -> None:
    name = (task.lamp or task.name).replace("-", "_")
    golds = [{"id": query_id, "output": output} for query_id, output in outputs.items()]
    path.write_text(json.dumps({"task": name, "golds": golds}, ensure_ascii=False) + "\n", "utf-8")
