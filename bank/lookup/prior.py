"""Predict labels or scores, which are largely habits, by the histogram of a person's past answers, smoothed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from bank.items.tasks import Task
from bank.manifest import AnswerPrior

SCORES = ("1", "2", "3", "4", "5")
WEIGHTS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # candidates for the weight of everybody's shares, in answers
QUERIES, PROFILE = 6, 10  # number of each person's last answers to predict, and of earlier answers, to fit the weight


def allowed_answers(task: Task) -> tuple[str, ...]:
    """Return the answers that a task allows; empty if they are free text."""
    return SCORES if task.kind == "score" else task.labels


def fit_prior(task: Task, histories: Sequence[Sequence[str]]) -> AnswerPrior | None:
    """Fit the prior that best predicts people's last answers, oldest first; None if answers are free text."""
    allowed = allowed_answers(task)
    if not allowed:
        return None
    known = [[answer for answer in history if answer in allowed] for history in histories]
    counts = Counter(answer for history in known for answer in history)
    total = sum(counts.values()) + len(allowed)  # add-one smoothing, so that no share is zero
    fractions = {answer: (counts[answer] + 1) / total for answer in allowed}
    tried = [AnswerPrior(weight=weight, shares=fractions) for weight in WEIGHTS]
    return min(tried, key=lambda prior: _loss(prior, [history for history in known if len(history) > QUERIES]))


def personal_shares(prior: AnswerPrior, answers: Sequence[str]) -> Mapping[str, float]:
    """Return the probability of each answer for a person with these past answers; they sum to 1."""
    counts = Counter(answer for answer in answers if answer in prior.shares)
    total = sum(counts.values()) + prior.weight
    return {answer: (counts[answer] + prior.weight * fraction) / total for answer, fraction in prior.shares.items()}


def surprise(fractions: Mapping[str, float], answer: str) -> float:
    """Return −log of an answer's share, in nats."""
    return -math.log(fractions[answer])


def _loss(prior: AnswerPrior, histories: Sequence[Sequence[str]]) -> float:
    """Return the mean over people of the mean surprise of their last answers; 0 if there are no people."""
    surprises = []
    for history in histories:
        profile, asked = history[-QUERIES - PROFILE : -QUERIES], history[-QUERIES:]
        fractions = personal_shares(prior, profile)
        surprises.append(sum(surprise(fractions, answer) for answer in asked) / len(asked))
    return sum(surprises) / len(surprises) if surprises else 0.0
