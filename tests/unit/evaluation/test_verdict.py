"""What a bank gains for people left out of it: figures, words, and the histogram of answers it is compared with."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon

from bank.items.tasks import get_task
from bank.lookup.prior import fit_prior, personal_shares, surprise
from bank.lookup.summary import verdict_text
from bank.manifest import (
    LONGEST_SUFFIX,
    AnswerPrior,
    LossDifference,
    PhraseRule,
    Verdict,
    read_manifest,
    write_manifest,
)
from evaluation.verdict import verdict
from tests.unit.bank.test_weights import manifest

FILMS = get_task("movie_rating")
EVEN = AnswerPrior(weight=8, shares=dict.fromkeys("12345", 0.2))
PEOPLE = (0.0, 0.1, -0.1, 0.05, -0.05, 0.02)


def measured(
    merged: float, recalled: float, both: float, further: float = 0.0, prior: float | None = None, **more: float
) -> Verdict:
    """The verdict over a few people whose losses are about these."""
    means = {"common": 3.0, "common+history@h1": recalled, "common+history@h3": recalled - further}
    means |= {"merged": merged, "merged+history@h1": both, "merged+history@h3": both - further}
    means |= more | ({"prior": prior} if prior is not None else {})
    people = [
        {name: mean + (1 + place / 100) * own for place, (name, mean) in enumerate(means.items())} for own in PEOPLE
    ]
    return verdict(people, (1, 3))


def test_interval_agrees_with_signed_ranks_of_differences() -> None:
    found = LossDifference.of([0.1, 0.2, 0.3, 0.4, 0.5, 0.7])
    assert (found.mean, found.low, found.high) == pytest.approx((0.35, 0.1, 0.7))
    assert found.is_higher
    assert LossDifference.of([-0.1, -0.11, -0.09, -0.12, -0.08, -30]).is_lower, "one who gains much makes nobody unsure"
    assert not LossDifference.of([-0.1, -0.11, -0.09, -0.12, -0.08]).is_lower, "five people cannot show anything"
    chance = np.random.default_rng(0)
    for people in (6, 7, 11, 16):
        for shift in (0.0, 0.4, 0.8):
            values = chance.normal(shift, 1, people).tolist()
            found = LossDifference.of(values)
            assert (found.is_lower or found.is_higher) == (wilcoxon(values, method="exact").pvalue <= 0.05)


@pytest.mark.parametrize(
    ("losses", "judgement", "history"),
    [
        ((2.9, 3.1, 3.0), "Worth serving.", 0),
        ((3.0, 2.8, 2.7), "Worth serving.", 1),
        ((3.0, 2.8, 2.7, 0.1), "Worth serving.", 3),
        ((3.0, 2.8, 2.7, -0.1), "Worth serving.", 1),
        ((3.0, 3.2, 3.2, 0.1), "Not shown to be worth serving", 0),
        ((3.0, 3.1, 3.1, 0.3), "Worth serving with 3 past items", 3),
        ((2.9, 2.7, 2.7), "Worth serving with one past item in the prompt;", 1),
        ((3.0, 3.0, 3.0), "Not shown to be worth serving: its gain", 0),
        ((3.2, 3.2, 3.3), "Not worth serving: the common row alone", 0),
        ((2.9, 3.0, 3.0, 0.0, 2.5), "Not worth serving: the histogram", 0),
        ((2.9, 3.0, 3.0, 0.0, 3.5), "Worth serving.", 0),
    ],
)
def test_the_words_say_whether_to_serve_it(losses: tuple[float, ...], judgement: str, history: int) -> None:
    found = measured(*losses)
    words = verdict_text(found)
    assert words.startswith(judgement)
    assert "6 people" in words
    assert f"{found.merged.mean:+.3f}" in words
    assert found.history == history
    assert ("by default" in words) == bool(history)
    assert ("histogram" in words) == (found.prior is not None) == (len(losses) == 5)


def test_verdict_is_kept_in_the_manifest_and_sets_the_history(tmp_path: Path) -> None:
    found = measured(2.9, 2.8, 2.7)
    plain = manifest(3)
    kept = write_manifest(tmp_path, plain.model_copy(update={"verdict": found, "training": {"history_share": 0.5}}))
    read = read_manifest(tmp_path)
    assert (read, read.verdict, read.history_default, read.history_share) == (kept, found, 1, 0.5)
    assert (plain.history_default, plain.history_share) == (0, 0)
    assert plain.model_copy(update={"prior": EVEN}).compute_fingerprint() != plain.compute_fingerprint()


def test_words_are_the_default_where_they_surely_helped() -> None:
    plain, helped = manifest(3), LossDifference(mean=-0.2, low=-0.3, high=-0.1)
    rule = PhraseRule(trust=(0.1,) * LONGEST_SUFFIX, people=7, gain=helped)
    trusting = plain.model_copy(update={"phrases": rule})
    unsure = rule.model_copy(update={"gain": LossDifference(mean=-0.2, low=-0.3, high=0.1)})
    before = [plain, trusting, plain.model_copy(update={"phrases": unsure})]
    assert [each.words_default for each in before] == [False, True, False]
    for loss, helps in ((2.7, True), (3.1, False)):  # who was left out knows better
        judged = measured(2.9, 3.1, 3.0, **{"merged+words": loss})
        assert trusting.model_copy(update={"verdict": judged}).words_default is helps
        assert f"phrases {judged.words.mean:+.3f}" in verdict_text(judged)
    assert trusting.model_copy(update={"verdict": measured(2.9, 3.1, 3.0)}).words_default


def test_prior_weighs_less_for_alike_answers_and_smooths_counts() -> None:
    prior = fit_prior(FILMS, [["4", "4", "5"], ["4", "not a star"]])
    assert prior is not None
    assert prior.shares == {"1": 1 / 9, "2": 1 / 9, "3": 1 / 9, "4": 4 / 9, "5": 2 / 9}
    labels = fit_prior(get_task("news_category"), [["travel"]])
    assert labels is not None and set(labels.shares) == set(get_task("news_category").labels)
    assert fit_prior(get_task("chat"), [["a", "b"]]) is None  # free texts have none
    stubborn = [[star] * 16 for star in "1245"]
    erratic = [["1", "5", "2", "4", "3"] * 3 + ["5"] for _ in range(4)]
    small, large = fit_prior(FILMS, stubborn), fit_prior(FILMS, [[*h[::-1]] for h in erratic])
    assert small is not None and large is not None
    assert small.weight < 1 < large.weight
    shares = personal_shares(EVEN, ["4", "4", "five"])
    assert shares["4"] == pytest.approx((2 + 8 * 0.2) / 10)
    assert sum(shares.values()) == pytest.approx(1)
    assert personal_shares(EVEN, []) == EVEN.shares
    assert surprise({"4": 0.25}, "4") == pytest.approx(math.log(4))
