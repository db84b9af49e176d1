"""Authorship of generated texts: how often a classifier of character n-grams names the right person.

The classifier is trained on the evaluated people's profiles; their own later answers (`gold`) are the upper bound.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bank.errors import BankError
from bank.evaluation.intervals import LEVEL, Interval, compare_methods, markdown_table, over_users
from bank.evaluation.run import Record
from bank.items.histories import History
from bank.items.tasks import Task

GOLD = "gold"


@dataclass(frozen=True, slots=True)
class AuthorshipRow:
    """Attribution of the texts of one method, or of `gold`; means over people."""

    method: str
    named: Interval  # share of texts for which the right person ranks first
    rank: Interval  # rank of the right person among all, from 1
    against: Mapping[str, Interval] = field(default_factory=dict)  # `named` minus another method's; empty for `gold`


def authorship(people: Sequence[History], records: Sequence[Record], task: Task) -> list[AuthorshipRow]:
    """Return one row for the people's own texts (at least two people), and one per method with texts for everyone."""
    texts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for person in people:
        texts[GOLD][person.user_id] = [query.gold for query in person.queries]
    for record in records:
        if record.written and record.user_id in texts[GOLD]:
            texts[record.method][record.user_id] += record.written
    rank_all = _classifier(people, task)
    ranks = {
        method: {person: rank_all(person, found[person]) for person in texts[GOLD]}
        for method, found in texts.items()
        if len(found) == len(people)
    }
    named = {
        method: {person: float(np.equal(places, 1).mean()) for person, places in found.items()}
        for method, found in ranks.items()
    }
    against = compare_methods({method: shares for method, shares in named.items() if method != GOLD})
    rows = [
        AuthorshipRow(
            method,
            over_users(list(named[method].values())),
            over_users([float(np.mean(places)) for places in found.values()]),
            against.get(method, {}),
        )
        for method, found in ranks.items()
    ]
    return sorted(rows, key=lambda row: row.named.mean)


def markdown(rows: Sequence[AuthorshipRow]) -> str:
    others = [row.method for row in rows if row.method != GOLD]
    heads = ["method", "right person named first, %", "mean rank", *(f"named, less {name}" for name in others)]
    lines = [
        [row.method, row.named.cell(".1%"), row.rank.cell(".2f")]
        + [row.against[name].cell("+.1%") if name in row.against else "" for name in others]
        for row in rows
    ]
    title = f"**Authorship** of {rows[0].named.n} people; chance level {1 / rows[0].named.n:.1%}; bold: p below {LEVEL}"
    return f"{title}\n\n{markdown_table(heads, lines)}\n"


def _classifier(people: Sequence[History], task: Task) -> Callable[[str, Sequence[str]], list[int]]:
    """Train a classifier on the people's profiles; return a function that ranks a person, from 1, for each text."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    known = [(output, person.user_id) for person in people for _, output in person.pairs(task)]
    char_ngrams = TfidfVectorizer(analyzer="char", ngram_range=(2, 5), sublinear_tf=True, min_df=2)
    model = make_pipeline(char_ngrams, LogisticRegression(C=30.0, max_iter=2000))
    try:
        model.fit([text for text, _ in known], [name for _, name in known])
    except ValueError as error:
        raise BankError(f"the profiles have too little text to distinguish their {len(people)} people") from error

    def ranks(person: str, texts: Sequence[str]) -> list[int]:
        shares = model.predict_proba(texts)
        own = shares[:, list(model.classes_).index(person)]
        return [int(place) for place in 1 + (shares > own[:, None]).sum(axis=1)]

    return ranks
