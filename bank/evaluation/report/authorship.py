"""Does it sound like them? How often a classifier of character n-grams names the right person for a generated text.

It is trained on what the evaluated people wrote in their profiles. Their own later answers (`gold`) are the ceiling;
texts that say nothing of their person are named right once in as many times as there are people.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bank.errors import BankError
from bank.evaluation.people import Person
from bank.evaluation.records import Record
from bank.evaluation.report.intervals import Interval, over_users
from bank.items.tasks import Task

GOLD = "gold"
N_GRAMS = (2, 5)
CERTAINTY = 30.0
"""C of the logistic regression."""

_ROUNDS = 2000


@dataclass(frozen=True, slots=True)
class AuthorshipRow:
    """How one method's texts are attributed.

    Attributes:
        method: its name, or `gold`.
        named: how often the right person comes first, mean over people.
        rank: of the right person among all, from 1, mean over people.
    """

    method: str
    named: Interval
    rank: Interval


def authorship(people: Sequence[Person], records: Sequence[Record], task: Task) -> list[AuthorshipRow]:
    """One row for what the people themselves wrote, and one for each method that wrote texts for all of them.

    Args:
        people: those for whom texts were written; at least two.
        records: with the texts.
        task: turns profile items into what the person wrote.

    Raises:
        BankError: when the profiles have too little text to tell anybody apart.
    """
    texts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    names = [person.user_id for person in people]
    for person in people:
        texts[GOLD][person.user_id] = [query.gold for query in person.queries]
    for record in records:
        if record.written and record.user_id in names:
            texts[record.method][record.user_id] += record.written
    judge = _Judge(people, task)
    rows = [_row(method, names, found, judge) for method, found in texts.items() if len(found) == len(people)]
    return sorted(rows, key=lambda row: row.named.mean)


def markdown(rows: Sequence[AuthorshipRow]) -> str:
    """The rows as a Markdown table, with 95 % intervals over people."""
    lines = ["| method | right person named first, % | mean rank |", "| --- | --- | --- |"]
    for row in rows:
        named, rank = row.named, row.rank
        lines.append(
            f"| {row.method} | {named.mean:.1%} ({named.low:.1%} to {named.high:.1%}) | "
            f"{rank.mean:.2f} ({rank.low:.2f} to {rank.high:.2f}) |"
        )
    title = f"**Whose voice?** {rows[0].named.n} people; chance names {1 / rows[0].named.n:.1%}"
    return "\n".join([title, "", *lines]) + "\n"


class _Judge:
    """The classifier, trained on the profiles of some people."""

    def __init__(self, people: Sequence[Person], task: Task) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        known = [(output, person.user_id) for person in people for _, output in person.history.pairs(task)]
        words = TfidfVectorizer(analyzer="char", ngram_range=N_GRAMS, sublinear_tf=True, min_df=2)
        self._model = make_pipeline(words, LogisticRegression(C=CERTAINTY, max_iter=_ROUNDS))
        try:
            self._model.fit([text for text, _ in known], [name for _, name in known])
        except ValueError as error:
            raise BankError(f"the profiles have too little text to tell their {len(people)} people apart") from error

    def ranks(self, name: str, texts: Sequence[str]) -> list[int]:
        """The place of a person among all, from 1, for each text."""
        shares = self._model.predict_proba(texts)
        own = shares[:, list(self._model.classes_).index(name)]
        return [int(place) for place in 1 + (shares > own[:, None]).sum(axis=1)]


def _row(method: str, names: Sequence[str], texts: Mapping[str, Sequence[str]], judge: _Judge) -> AuthorshipRow:
    ranks = [judge.ranks(name, texts[name]) for name in names]
    named = over_users([float(np.mean([rank == 1 for rank in found])) for found in ranks])
    return AuthorshipRow(method, named, over_users([float(np.mean(found)) for found in ranks]))
