"""LaMP's metrics, against cases worked out by hand."""

from __future__ import annotations

import math

import pytest

from bank.evaluation.report.lamp import evaluate, label_of, rouge, score_of
from bank.items.tasks import get_task

TAGS = get_task("movie_tagging")
FILMS = get_task("movie_rating")
NEWS = get_task("news_headline")


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("4", 2.0, 4.0),
        (" 3.5\n", 2.0, 3.5),
        ("four", 2.0, 5.0),
        ("", 4.0, 1.0),
        ("nan", 5.0, 1.0),
        ("4 stars", 3.0, 5.0),
    ],
)
def test_what_is_no_number_is_as_wrong_as_can_be(prediction: str, gold: float, score: float) -> None:
    assert score_of(prediction, gold) == score


def test_errors_of_scores_are_means_over_all_queries() -> None:
    found = evaluate(FILMS, ["4", "2", "no idea"], ["5", "2", "1"])
    assert found["mae"] == pytest.approx((1 + 0 + 4) / 3)
    assert found["rmse"] == pytest.approx(math.sqrt((1 + 0 + 16) / 3))


def test_labels_are_those_that_the_instruction_lists() -> None:
    assert TAGS.labels[:2] == ("sci-fi", "based on a book")
    assert len(TAGS.labels) == len(get_task("news_category").labels) == 15
    assert NEWS.labels == FILMS.labels == ()
    assert label_of(" sci-fi ", TAGS.labels) == 0
    assert label_of("scifi", TAGS.labels) == -1


def test_an_unknown_label_is_wrong_and_macro_f1_is_over_all_labels() -> None:
    golds = ["sci-fi", "sci-fi", "comedy", "violence"]
    found = evaluate(TAGS, ["sci-fi", "comedy", "comedy", "horror"], golds)
    assert found["accuracy"] == 0.5
    # sci-fi: precision 1, recall 1/2, F 2/3; comedy: 1/2 and 1, F 2/3; violence: 0; twelve others: 0.
    assert found["f1"] == pytest.approx((2 / 3 + 2 / 3) / 15)


def test_rouge_stems_and_counts_the_longest_common_subsequence() -> None:
    one, longest = rouge("the cats sat", "the cat was sitting on mats")
    # Stemmed: {the, cat, sat} against {the, cat, was, sit, on, mat}: 2 of 3 and 2 of 6.
    assert one == longest == pytest.approx(2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6))
    assert rouge("cat the", "the cat")[0] == 1.0
    assert rouge("cat the", "the cat")[1] == pytest.approx(0.5)
    assert rouge("", "the cat") == (0.0, 0.0)
