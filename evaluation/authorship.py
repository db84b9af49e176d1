"""Authorship: how often a judge that knows people's profiles names the right person for a text.

Two judges share no features: a classifier of character n-grams, and Burrows' Delta of the commonest words, the mean
difference of their standardised frequencies (J. Burrows, Literary and Linguistic Computing 17:3, 2002).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bank.errors import BankError
from bank.items.histories import History
from bank.items.tasks import Task
from evaluation.intervals import LEVEL, Interval, compare_methods, markdown_table, over_users
from evaluation.run import Record

GOLD = "gold"  # people's own later answers, the upper bound
DELTA_WORDS = 150  # number of the commonest words
Judge = Callable[[Sequence[str]], Any]  # texts → how much each sounds like each person, [texts, people]


@dataclass(frozen=True, slots=True)
class AuthorshipRow:
    """One judge's attribution of the texts of one method, or of `gold`; means over people."""

    judge: str
    method: str
    named: Interval  # share of texts for which the right person ranks first
    rank: Interval  # rank of the right person among all, from 1
    against: Mapping[str, Interval]  # `named` minus another method's; empty for `gold`


def authorship(people: Sequence[History], records: Sequence[Record], task: Task) -> list[AuthorshipRow]:
    """Return rows by judge: the people's own texts (at least two people), and methods with texts for everyone."""
    known = [[output for _, output in person.pairs(task)] for person in people]
    texts = _texts_by_method(people, records)
    try:
        judges = {"n-grams": _n_grams(known), "Delta": _delta(known)}
    except ValueError as error:
        raise BankError(f"the profiles have too little text to distinguish their {len(people)} people") from error
    return [row for name, judge in judges.items() for row in _judged(name, judge, texts)]


def _judged(name: str, judge: Judge, texts: Mapping[str, Mapping[str, Sequence[str]]]) -> list[AuthorshipRow]:
    ranks = {  # by method and person
        method: {person: _ranks(judge(own), position) for position, (person, own) in enumerate(written.items())}
        for method, written in texts.items()
    }
    fractions = {  # of texts with rank 1
        method: {person: fmean(rank == 1 for rank in own) for person, own in each.items()}
        for method, each in ranks.items()
    }
    against = compare_methods({method: fraction for method, fraction in fractions.items() if method != GOLD})
    rows = []
    for method, fraction in fractions.items():
        named, rank = over_users(list(fraction.values())), over_users([fmean(own) for own in ranks[method].values()])
        rows.append(AuthorshipRow(name, method, named, rank, against.get(method, {})))
    return sorted(rows, key=lambda row: row.named.mean)


def authorship_table(rows: Sequence[AuthorshipRow]) -> str:
    """Return a table of one judge's rows."""
    others = [row.method for row in rows if row.method != GOLD]
    heads = ["method", "right person named first, %", "mean rank", *(f"named, less {name}" for name in others)]
    lines = [
        [row.method, row.named.cell(".1%"), row.rank.cell(".2f")]
        + [row.against[name].cell("+.1%") if name in row.against else "" for name in others]
        for row in rows
    ]
    who = f"{rows[0].named.n} people, judged by {rows[0].judge}"
    title = f"**Authorship** of {who}; chance level {1 / rows[0].named.n:.1%}; bold: p below {LEVEL}"
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


def _n_grams(known: Sequence[Sequence[str]]) -> Judge:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    n_grams = TfidfVectorizer(analyzer="char", ngram_range=(2, 5), sublinear_tf=True, min_df=2)
    classifier = make_pipeline(n_grams, LogisticRegression(C=30.0, max_iter=2000))
    whose = [position for position, own in enumerate(known) for _ in own]
    judge: Judge = classifier.fit([text for own in known for text in own], whose).predict_proba
    return judge


def _delta(known: Sequence[Sequence[str]]) -> Judge:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.metrics import pairwise_distances
    from sklearn.preprocessing import StandardScaler, normalize

    joined = ["\n".join(own) for own in known]
    words = CountVectorizer(max_features=DELTA_WORDS, token_pattern=r"[\w']+").fit(joined)

    def frequencies(texts: Sequence[str]) -> Any:
        return normalize(words.transform(texts), "l1").toarray()

    scaler = StandardScaler().fit(frequencies(joined))
    people = scaler.transform(frequencies(joined))
    return lambda texts: -pairwise_distances(scaler.transform(frequencies(texts)), people, "manhattan")


def _ranks(alike: Any, position: int) -> list[int]:
    return [int(rank) for rank in 1 + (alike > alike[:, position, None]).sum(axis=1)]
