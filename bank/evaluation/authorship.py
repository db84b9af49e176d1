"""Authorship: how often a classifier trained on people's profiles names the right person for a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bank.errors import BankError
from bank.evaluation.intervals import LEVEL, Interval, compare_methods, markdown_table, over_users
from bank.evaluation.run import Record
from bank.items.histories import History
from bank.items.tasks import Task

GOLD = "gold"  # people's own later answers, the upper bound


@dataclass(frozen=True, slots=True)
class AuthorshipRow:
    """Attribution of the texts of one method, or of `gold`; means over people."""

    method: str
    named: Interval  # share of texts for which the right person ranks first
    rank: Interval  # rank of the right person among all, from 1
    against: Mapping[str, Interval]  # `named` minus another method's; empty for `gold`


def authorship(people: Sequence[History], records: Sequence[Record], task: Task) -> list[AuthorshipRow]:
    """Return one row for the people's own texts (at least two people), and one per method with texts for everyone."""
    classifier = _trained_classifier(people, task)
    shares: dict[str, dict[str, float]] = {}  # by method and person: share of texts with rank 1
    mean_ranks: dict[str, list[float]] = {}
    for method, texts in _texts_by_method(people, records).items():
        ranks = {person: _ranks(classifier, person, own) for person, own in texts.items()}
        shares[method] = {person: fmean(rank == 1 for rank in own) for person, own in ranks.items()}
        mean_ranks[method] = [fmean(own) for own in ranks.values()]
    against = compare_methods({method: share for method, share in shares.items() if method != GOLD})
    rows = []
    for method, share in shares.items():
        named, rank = over_users(list(share.values())), over_users(mean_ranks[method])
        rows.append(AuthorshipRow(method, named, rank, against.get(method, {})))
    return sorted(rows, key=lambda row: row.named.mean)


def authorship_table(rows: Sequence[AuthorshipRow]) -> str:
    others = [row.method for row in rows if row.method != GOLD]
    heads = ["method", "right person named first, %", "mean rank", *(f"named, less {name}" for name in others)]
    lines = [
        [row.method, row.named.cell(".1%"), row.rank.cell(".2f")]
        + [row.against[name].cell("+.1%") if name in row.against else "" for name in others]
        for row in rows
    ]
    title = f"**Authorship** of {rows[0].named.n} people; chance level {1 / rows[0].named.n:.1%}; bold: p below {LEVEL}"
    return f"{title}\n\n{markdown_table(heads, lines)}\n"


def _texts_by_method(people: Sequence[History], records: Sequence[Record]) -> dict[str, dict[str, list[str]]]:
    """Return each person's texts, by method: their own as `gold`, and those of methods with texts for everyone."""
    gold = {person.user_id: [query.gold for query in person.queries] for person in people}
    written: dict[str, dict[str, list[str]]] = {}
    for record in records:
        if record.written:
            written.setdefault(record.method, {}).setdefault(record.user_id, []).extend(record.written)
    complete = {method: texts for method, texts in written.items() if texts.keys() >= gold.keys()}
    return {GOLD: gold} | {method: {person: texts[person] for person in gold} for method, texts in complete.items()}


def _trained_classifier(people: Sequence[History], task: Task) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    known = [(output, person.user_id) for person in people for _, output in person.pairs(task)]
    char_ngrams = TfidfVectorizer(analyzer="char", ngram_range=(2, 5), sublinear_tf=True, min_df=2)
    classifier = make_pipeline(char_ngrams, LogisticRegression(C=30.0, max_iter=2000))
    try:
        return classifier.fit([text for text, _ in known], [name for _, name in known])
    except ValueError as error:
        raise BankError(f"the profiles have too little text to distinguish their {len(people)} people") from error


def _ranks(classifier: Any, person: str, texts: Sequence[str]) -> list[int]:
    chances = classifier.predict_proba(texts)
    own = chances[:, list(classifier.classes_).index(person)]
    return [int(rank) for rank in 1 + (chances > own[:, None]).sum(axis=1)]
