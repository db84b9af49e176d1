"""LaMP's metrics, against cases worked out by hand."""

from __future__ import annotations

import math

import pytest

from bank.evaluation.summary import lamp_metrics
from bank.items.tasks import get_task

TAGS, FILMS, NEWS = (get_task(name) for name in ("movie_tagging", "movie_rating", "news_headline"))


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [("4", 2, 4), (" 3.5\n", 2, 3.5), ("four", 2, 5), ("", 4, 1), ("nan", 5, 1), ("4 stars", 3, 5)],
)
def test_what_is_no_number_is_as_wrong_as_can_be(prediction: str, gold: int, score: float) -> None:
    assert lamp_metrics(FILMS, [prediction], [str(gold)])["mae"] == abs(score - gold)


def test_errors_of_scores_are_means_over_all_queries() -> None:
    found = lamp_metrics(FILMS, ["4", "2", "no idea"], ["5", "2", "1"])
    assert found == {"mae": pytest.approx((1 + 0 + 4) / 3), "rmse": pytest.approx(math.sqrt((1 + 0 + 16) / 3))}


def test_labels_are_those_that_the_instruction_lists_any_other_is_wrong_and_macro_f1_is_over_all() -> None:
    assert TAGS.labels[:2] == ("sci-fi", "based on a book")
    assert len(TAGS.labels) == len(get_task("news_category").labels) == 15
    assert NEWS.labels == FILMS.labels == ()
    found = lamp_metrics(TAGS, [" sci-fi ", "comedy", "comedy", "scifi"], ["sci-fi", "sci-fi", "comedy", "violence"])
    # sci-fi: precision 1, recall 1/2, F 2/3; comedy: 1/2 and 1, F 2/3; violence: 0; twelve others: 0.
    assert found == {"accuracy": 0.5, "f1": pytest.approx((2 / 3 + 2 / 3) / 15)}


@pytest.mark.parametrize(
    ("prediction", "gold", "one", "longest"),
    [
        # Stemmed: {the, cat, sat} against {the, cat, was, sit, on, mat}: 2 of 3 and 2 of 6.
        ("the cats sat", "the cat was sitting on mats", *[2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6)] * 2),
        ("cat the", "the cat", 1.0, 0.5),
        ("", "the cat", 0.0, 0.0),
    ],
)
def test_rouge_stems_and_counts_the_longest_common_subsequence(
    prediction: str, gold: str, one: float, longest: float
) -> None:
    assert lamp_metrics(NEWS, [prediction], [gold]) == {"rouge1": pytest.approx(one), "rougeL": pytest.approx(longest)}
