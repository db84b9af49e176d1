"""What a person answers before anything is read: the histogram of their own past answers, smoothed towards everybody's.

A label is first of all a habit. For tasks whose answers are labels or scores this is the rival without a model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from adapters.errors import excerpt
from bank.errors import BankError
from bank.items.tasks import Task
from bank.manifest import AnswerPrior

SCORES = ("1", "2", "3", "4", "5")
WEIGHTS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # how many answers everybody's shares may count for
QUERIES, PROFILE = 6, 10  # the weight is chosen on each person's last answers, from those before them


def allowed_answers(task: Task) -> tuple[str, ...]:
    """The answers that a task allows; none where they are free text."""
    return SCORES if task.kind == "score" else task.labels


def fit_prior(task: Task, histories: Sequence[Sequence[str]]) -> AnswerPrior | None:
    """Everybody's shares, and the weight under which the people's histograms predict their own last answers best.

    Each person's answers come the oldest first. None for a task of free texts.
    """
    allowed = allowed_answers(task)
    if not allowed:
        return None
    known = [[answer for answer in history if answer in allowed] for history in histories]
    counts = Counter(answer for history in known for answer in history)
    total = sum(counts.values()) + len(allowed)  # one more of each, so that no share is zero
    shares = {answer: (counts[answer] + 1) / total for answer in allowed}
    tried = [AnswerPrior(weight=weight, shares=shares) for weight in WEIGHTS]
    return min(tried, key=lambda prior: _loss(prior, [history for history in known if len(history) > QUERIES]))


def personal_shares(prior: AnswerPrior, answers: Sequence[str]) -> Mapping[str, float]:
    """How likely each answer is for a person who has answered so before; the shares sum to 1."""
    counts = Counter(answer for answer in answers if answer in prior.shares)
    total = sum(counts.values()) + prior.weight
    return {answer: (counts[answer] + prior.weight * share) / total for answer, share in prior.shares.items()}


def surprise(shares: Mapping[str, float], answer: str) -> float:
    """−log of an answer's share, nats."""
    if answer not in shares:
        raise BankError(f"{excerpt(answer)} is not an answer of this task; they are {', '.join(shares)}")
    return -math.log(shares[answer])


def _loss(prior: AnswerPrior, histories: Sequence[Sequence[str]]) -> float:
    """Mean over people of the mean surprise of their last answers; 0 where nobody has enough."""
    found = []
    for history in histories:
        profile, asked = history[-QUERIES - PROFILE : -QUERIES], history[-QUERIES:]
        shares = personal_shares(prior, profile)
        found.append(sum(surprise(shares, answer) for answer in asked) / len(asked))
    return sum(found) / len(found) if found else 0.0
