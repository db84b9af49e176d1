"""LaMP's metrics by LaMP's own definitions (Salemi et al., ACL 2024, and its evaluation code), over all queries; and
predictions as its leaderboard reads them.

labels   accuracy and macro-F1 over the task's labels; a prediction that is not a label is always wrong
score    MAE and RMSE; a prediction that is not a number counts as the end of the scale that is farther from the gold
text     ROUGE-1 and ROUGE-L, F-measure, with stemming
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bank.evaluation.run import Record
from bank.items.tasks import Task

LOWEST, HIGHEST = 1.0, 5.0
LAMP_FOLDER, GOLDS = "lamp", "golds"


def evaluate(task: Task, predictions: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """The task's metrics, by LaMP's names, of one prediction for each gold, as generated."""
    if task.kind == "labels":
        return _labels(task.labels, predictions, golds)
    if task.kind == "score":
        errors = [score_of(text, float(gold)) - float(gold) for text, gold in zip(predictions, golds, strict=True)]
        squares = sum(error * error for error in errors)
        return {"mae": sum(map(abs, errors)) / len(errors), "rmse": math.sqrt(squares / len(errors))}
    pairs = [rouge(prediction, gold) for prediction, gold in zip(predictions, golds, strict=True)]
    return {"rouge1": sum(one for one, _ in pairs) / len(pairs), "rougeL": sum(long for _, long in pairs) / len(pairs)}


def score_of(prediction: str, gold: float) -> float:
    """A predicted score; what is not a number is as wrong as can be."""
    try:
        value = float(prediction.strip())
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return value
    return LOWEST if abs(LOWEST - gold) > abs(HIGHEST - gold) else HIGHEST


def label_of(prediction: str, labels: Sequence[str]) -> int:
    """The place of a prediction among the labels; -1 when it is not one."""
    text = prediction.strip()
    return labels.index(text) if text in labels else -1


def rouge(prediction: str, gold: str) -> tuple[float, float]:
    """F-measures of ROUGE-1 and ROUGE-L, stemmed."""
    scores = _scorer().score(gold, prediction)
    return scores["rouge1"].fmeasure, scores["rougeL"].fmeasure


def write_lamp_files(records: Sequence[Record], task: Task, folder: Path) -> None:
    """Write `golds.json`, and `METHOD.json` for each method that has predictions, of the first seed, into a folder.

    It is made if needed; without predictions nothing is written.
    """
    outputs: dict[str, dict[str, str]] = defaultdict(dict)
    for record in records:
        if record.seed == 0 and record.prediction is not None:
            outputs[record.method.replace(":", "-")][record.query_id] = record.prediction
            outputs[GOLDS][record.query_id] = record.gold
    name = (task.lamp or task.name).replace("-", "_")
    for file, answers in outputs.items():
        folder.mkdir(parents=True, exist_ok=True)
        golds = [{"id": query_id, "output": output} for query_id, output in answers.items()]
        content = json.dumps({"task": name, "golds": golds}, ensure_ascii=False)
        (folder / f"{file}.json").write_text(content + "\n", "utf-8")


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def _labels(labels: Sequence[str], predictions: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score

    wanted, found = ([label_of(text, labels) for text in texts] for texts in (golds, predictions))
    every = list(range(len(labels)))
    return {
        "accuracy": float(accuracy_score(wanted, found)),
        "f1": float(f1_score(wanted, found, labels=every, average="macro", zero_division=0)),
    }
