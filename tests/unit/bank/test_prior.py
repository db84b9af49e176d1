"""The smoothed histogram of a person's answers: everybody's shares, the weight, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bank.errors import BankError
from bank.items.tasks import get_task
from bank.lookup.prior import fit_prior, personal_shares, surprise
from bank.manifest import AnswerPrior, read_manifest

FILMS = get_task("movie_rating")
EVEN = AnswerPrior(weight=8, shares=dict.fromkeys("12345", 0.2))


def test_everybodys_shares_are_of_all_answers_and_none_is_zero() -> None:
    prior = fit_prior(FILMS, [["4", "4", "5"], ["4", "not a star"]])
    assert prior is not None
    assert prior.shares == {"1": 1 / 9, "2": 1 / 9, "3": 1 / 9, "4": 4 / 9, "5": 2 / 9}


def test_people_who_always_answer_alike_get_a_small_weight_and_people_who_do_not_a_large_one() -> None:
    stubborn = [[star] * 16 for star in "1245"]
    erratic = [["1", "5", "2", "4", "3"] * 3 + ["5"] for _ in range(4)]
    small, large = fit_prior(FILMS, stubborn), fit_prior(FILMS, [[*h[::-1]] for h in erratic])
    assert small is not None and large is not None
    assert small.weight < 1 < large.weight


def test_labels_are_those_of_the_task_and_free_texts_have_none() -> None:
    assert fit_prior(get_task("chat"), [["a", "b"]]) is None
    prior = fit_prior(get_task("news_category"), [["travel"]])
    assert prior is not None and set(prior.shares) == set(get_task("news_category").labels)


def test_a_persons_shares_are_their_counts_smoothed() -> None:
    shares = personal_shares(EVEN, ["4", "4", "five"])
    assert shares["4"] == pytest.approx((2 + 8 * 0.2) / 10)
    assert sum(shares.values()) == pytest.approx(1)
    assert personal_shares(EVEN, []) == EVEN.shares


def test_surprise_is_the_log_of_a_share_and_another_tasks_answer_is_refused() -> None:
    assert surprise({"4": 0.25}, "4") == pytest.approx(math.log(4))
    with pytest.raises(BankError, match="'6' is not an answer of this task; the answers are 1, 2, 3, 4, 5"):
        surprise(EVEN.shares, "6")


def test_a_prior_is_part_of_a_banks_fingerprint(tiny_bank_folder: Path) -> None:
    manifest = read_manifest(tiny_bank_folder)
    assert manifest.compute_fingerprint() == manifest.fingerprint
    assert manifest.model_copy(update={"prior": EVEN}).compute_fingerprint() != manifest.fingerprint
