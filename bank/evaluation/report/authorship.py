"""Does it sound like them? How often a classifier of character n-grams names the right person for a generated text.

It is trained on what the evaluated people wrote in their profiles. Their own later answers (`gold`) are the ceiling;
texts that say nothing of their person are named right once in as many times as there are people.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bank.errors import BankError
from bank.evaluation.people import EvalUser
from bank.evaluation.report.intervals import LEVEL, Interval, compared, markdown_table, over_users
from bank.evaluation.run import Record
from bank.items.tasks import Task

GOLD = "gold"
N_GRAMS = (2, 5)
CERTAINTY = 30.0
"""C of the logistic regression."""

_ROUNDS = 2000


@dataclass(frozen=True, slots=True)
class AuthorshipRow:
    """How the texts of one method, or of `gold`, are attributed, mean over people."""

    method: str
    named: Interval  # how often the right person comes first
    rank: Interval  # of the right person among all, from 1
    against: Mapping[str, Interval] = field(default_factory=dict)  # `named` less another method's; not for `gold`


def authorship(people: Sequence[EvalUser], records: Sequence[Record], task: Task) -> list[AuthorshipRow]:
    """One row for what the people themselves wrote, and one for each method that wrote texts for all of them.

    `people` are those for whom texts were written, at least two.
    """
    texts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    names = [person.user_id for person in people]
    for person in people:
        texts[GOLD][person.user_id] = [query.gold for query in person.queries]
    for record in records:
        if record.written and record.user_id in names:
            texts[record.method][record.user_id] += record.written
    rank_all = _classifier(people, task)
    ranks = {
        method: [rank_all(name, found[name]) for name in names]
        for method, found in texts.items()
        if len(found) == len(people)
    }
    named = {method: [float(np.mean([rank == 1 for rank in of])) for of in found] for method, found in ranks.items()}
    by_person = {method: dict(zip(names, shares, strict=True)) for method, shares in named.items() if method != GOLD}
    against = compared(by_person)
    rows = [
        AuthorshipRow(
            method, over_users(named[method]), over_users([float(np.mean(of)) for of in found]), against.get(method, {})
        )
        for method, found in ranks.items()
    ]
    return sorted(rows, key=lambda row: row.named.mean)


def markdown(rows: Sequence[AuthorshipRow]) -> str:
    """The rows as a Markdown table, with 95 % intervals over people."""
    others = [row.method for row in rows if row.method != GOLD]
    lines = [["method", "right person named first, %", "mean rank", *(f"named, less {name}" for name in others)]]
    for row in rows:
        named, rank = row.named, row.rank
        cells = [row.method, f"{named.mean:.1%} ({named.low:.1%} to {named.high:.1%})"]
        cells.append(f"{rank.mean:.2f} ({rank.low:.2f} to {rank.high:.2f})")
        lines.append([*cells, *(row.against[name].cell("+.1%") if name in row.against else "" for name in others)])
    title = f"**Whose voice?** {rows[0].named.n} people; chance names {1 / rows[0].named.n:.1%}; bold: p below {LEVEL}"
    return f"{title}\n\n{markdown_table(lines)}\n"


def _classifier(people: Sequence[EvalUser], task: Task) -> Callable[[str, Sequence[str]], list[int]]:
    """What gives the place of a person among all, from 1, for each of some texts; trained on the people's profiles."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    known = [(output, person.user_id) for person in people for _, output in person.history.pairs(task)]
    words = TfidfVectorizer(analyzer="char", ngram_range=N_GRAMS, sublinear_tf=True, min_df=2)
    model = make_pipeline(words, LogisticRegression(C=CERTAINTY, max_iter=_ROUNDS))
    try:
        model.fit([text for text, _ in known], [name for _, name in known])
    except ValueError as error:
        raise BankError(f"the profiles have too little text to tell their {len(people)} people apart") from error

    def ranks(name: str, texts: Sequence[str]) -> list[int]:
        shares = model.predict_proba(texts)
        own = shares[:, list(model.classes_).index(name)]
        return [int(place) for place in 1 + (shares > own[:, None]).sum(axis=1)]

    return ranks
