"""LaMP's metrics by LaMP's own definitions (Salemi et al., ACL 2024, and its evaluation code), over all queries.

labels   accuracy and macro-F1 over the task's labels; a prediction that is not a label is always wrong
score    MAE and RMSE; a prediction that is not a number counts as the end of the scale that is farther from the gold
text     ROUGE-1 and ROUGE-L, F-measure, with stemming
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from bank.items.tasks import AnswerKind, Task

LOWEST, HIGHEST = 1.0, 5.0


def evaluate(task: Task, predictions: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """The task's metrics, by LaMP's names.

    Args:
        task: says what kind of answers it has, and which labels there are.
        predictions: one for each gold, as generated.
        golds: at least one.
    """
    return _METRICS[task.kind](task, predictions, golds)


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


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def _labels(task: Task, predictions: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score

    labels = task.labels
    wanted, found = ([label_of(text, labels) for text in texts] for texts in (golds, predictions))
    every = list(range(len(labels)))
    return {
        "accuracy": float(accuracy_score(wanted, found)),
        "f1": float(f1_score(wanted, found, labels=every, average="macro", zero_division=0)),
    }


def _scores(task: Task, predictions: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    errors = [score_of(text, float(gold)) - float(gold) for text, gold in zip(predictions, golds, strict=True)]
    return {
        "mae": sum(map(abs, errors)) / len(errors),
        "rmse": math.sqrt(sum(error * error for error in errors) / len(errors)),
    }


def _texts(task: Task, predictions: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    pairs = [rouge(prediction, gold) for prediction, gold in zip(predictions, golds, strict=True)]
    return {"rouge1": sum(a for a, _ in pairs) / len(pairs), "rougeL": sum(b for _, b in pairs) / len(pairs)}


_METRICS: Mapping[AnswerKind, Callable[[Task, Sequence[str], Sequence[str]], dict[str, float]]] = {
    "labels": _labels,
    "score": _scores,
    "text": _texts,
}
