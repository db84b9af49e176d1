"""Summarise records as tables: methods' mean losses, LaMP's metrics, and gains over other methods, paired by user."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from bank.items.retrieval import searchable
from bank.items.tasks import Task
from evaluation.intervals import LEVEL, Interval, compare_methods, markdown_table
from evaluation.methods import METHODS
from evaluation.run import Record

COMPARED = ("prior", "common", "task", "mean", "random", "merged:topic", "merged", "own")  # one column each
LOWEST, HIGHEST = 1.0, 5.0
LAMP_FOLDER, GOLDS = "lamp", "golds"
_WORD, _STEMMED = re.compile(r"[^\W_]+"), 3  # ROUGE stems words that are longer
CAPTION = (
    "In brackets: the 95 % interval of each difference (BCa bootstrap over people). Significant differences are bold: "
    f"p is below {LEVEL} in a paired sign-flip test, after Holm's correction for all methods in the column."
)


@dataclass(frozen=True, slots=True)
class MethodRow:
    """The results of one method; means over its users unless stated otherwise."""

    method: str
    users: int  # number of users; differences are over the same users
    loss: float  # nats per gold token
    metrics: Mapping[str, float]  # over all queries and seeds; empty if some have no prediction
    against: Mapping[str, Interval]  # loss minus another method's, by that method's name; negative is better
    rejected: float  # share of users whose training was rejected
    prompt_tokens: float  # mean over queries
    first_token_ms: float | None  # median over users; None if not measured
    kept_bytes: float

    @property
    def first_ms(self) -> str:
        return "" if self.first_token_ms is None else f"{self.first_token_ms:.0f}"


def summarise(records: Sequence[Record], task: Task) -> list[MethodRow]:
    """Return one row per method, in order of decreasing loss."""
    losses = user_losses(records)
    against = compare_methods(losses, {method for method in losses if METHODS[method].on_curve})
    rows = []
    for method, of_users in losses.items():
        own = [record for record in records if record.method == method]
        answers = [record.prediction for record in own if record.prediction is not None]
        times = [record.first_token_ms for record in own if record.first_token_ms is not None]
        row = MethodRow(
            method,
            users=len(of_users),
            loss=fmean(of_users.values()),
            metrics=lamp_metrics(task, answers, [r.gold for r in own]) if len(answers) == len(own) else {},
            against=against[method],
            rejected=fmean(record.rejected for record in own),
            prompt_tokens=fmean(record.prompt_tokens for record in own),
            first_token_ms=median(times) if times else None,
            kept_bytes=fmean(record.kept_bytes for record in own),
        )
        rows.append(row)
    return sorted(rows, key=lambda row: -row.loss)


def user_losses(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Return each user's mean loss over queries and seeds, by method."""
    by_user: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_user[record.method][record.user_id].append(record.loss)
    return {method: {user: fmean(losses) for user, losses in users.items()} for method, users in by_user.items()}


def tables(rows: Sequence[MethodRow], records: Sequence[Record], task: Task) -> dict[str, list[MethodRow]]:
    """Return tables by title: the methods with results for everyone and, if other methods or predictions cover only
    some people, all methods over those. Curve points are excluded; `rows` must be those of all `records`.
    """
    rows = [row for row in rows if not METHODS[row.method].on_curve]
    shown = [record for record in records if not METHODS[record.method].on_curve]
    everyone = max(row.users for row in rows)
    groups = {f"{everyone} people": [row for row in rows if row.users == everyone]}
    users: dict[str, set[str]] = defaultdict(set)
    answered: dict[str, set[str]] = defaultdict(set)
    for record in shown:
        users[record.method].add(record.user_id)
        if record.prediction is not None:
            answered[record.method].add(record.user_id)
    sample = set.intersection(*(answered[method] or groups for method, groups in users.items()))
    if len(sample) < everyone:
        groups[f"{len(sample)} of them"] = summarise([record for record in shown if record.user_id in sample], task)
    return groups


def columns(rows: Sequence[MethodRow]) -> tuple[list[str], list[str]]:
    """Return a table's columns: the metrics, and the rows' methods that are in `COMPARED`."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    return metrics, [name for name in COMPARED if any(row.method == name for row in rows)]


def markdown(found: Mapping[str, Sequence[MethodRow]]) -> str:
    blocks = [f"**{title}**\n\n{_table(rows)}" for title, rows in found.items()]
    return "\n\n".join([*blocks, CAPTION]) + "\n"


def _table(rows: Sequence[MethodRow]) -> str:
    metrics, others = columns(rows)
    heads = ["method", "loss", "prompt tokens", "first token, ms", "bytes stored", *metrics]
    lines = [
        [row.method, f"{row.loss:.4f}", f"{row.prompt_tokens:.0f}", row.first_ms, f"{row.kept_bytes:.0f}"]
        + [f"{row.metrics[name]:.4f}" if name in row.metrics else "" for name in metrics]
        + [row.against[name].cell("+.4f") if name in row.against else "" for name in others]
        for row in rows
    ]
    return markdown_table([*heads, *(f"loss against {name}" for name in others)], lines)


def lamp_metrics(task: Task, predictions: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """Compute LaMP's metrics over all queries, as defined in the paper (Salemi et al., ACL 2024) and its code.

    labels: accuracy and macro-F1 over the task's labels; a prediction that is not a label is always wrong.
    score: MAE and RMSE; a prediction that is not a number counts as the end of the scale farther from the gold.
    text: ROUGE-1 and ROUGE-L, F-measure, with stemming.
    """
    if task.kind == "labels":
        from sklearn.metrics import accuracy_score, f1_score

        every = {label: position for position, label in enumerate(task.labels)}
        wanted, guessed = ([every.get(text.strip(), -1) for text in texts] for texts in (golds, predictions))
        f1 = f1_score(wanted, guessed, labels=list(every.values()), average="macro", zero_division=0)
        return {"accuracy": float(accuracy_score(wanted, guessed)), "f1": float(f1)}
    if task.kind == "score":
        errors = [_error(text, float(gold)) for text, gold in zip(predictions, golds, strict=True)]
        return {"mae": fmean(errors), "rmse": math.sqrt(fmean(error**2 for error in errors))}
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(names := ["rouge1", "rougeL"], tokenizer=_Words())
    scores = [scorer.score(gold, text) for text, gold in zip(predictions, golds, strict=True)]
    return {name: fmean(score[name].fmeasure for score in scores) for name in names}


class _Words:
    """ROUGE's words: its own leave out all letters that are not ASCII."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        words = _WORD.findall(searchable(text.lower()))
        return [self._stem(word) if len(word) > _STEMMED else word for word in words]


def _error(prediction: str, gold: float) -> float:
    try:
        error = abs(float(prediction) - gold)
    except ValueError:
        error = math.nan
    return error if math.isfinite(error) else max(gold - LOWEST, HIGHEST - gold)


def write_lamp_files(records: Sequence[Record], task: Task, folder: Path) -> None:
    """Write the first seed's predictions as LaMP's leaderboard reads them: `golds.json`, and a file per method."""
    outputs: dict[str, dict[str, str]] = defaultdict(dict)
    owners = {(record.query_id, record.user_id) for record in records}
    unique = len({query_id for query_id, _ in owners}) == len(owners)  # as LaMP's are
    for record in records:
        if record.seed == 0 and record.prediction is not None:
            answered = record.query_id if unique else f"{record.user_id}-{record.query_id}"
            outputs[record.method.replace(":", "-")][answered] = record.prediction
            outputs[GOLDS][answered] = record.gold
    name = (task.lamp or task.name).replace("-", "_")
    for file, answers in outputs.items():
        folder.mkdir(parents=True, exist_ok=True)
        golds = [{"id": query_id, "output": output} for query_id, output in answers.items()]
        content = json.dumps({"task": name, "golds": golds}, ensure_ascii=False)
        (folder / f"{file}.json").write_text(content + "\n", "utf-8")
