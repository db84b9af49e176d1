"""What a bank gains for people left out of it: the figures, the words, and where they are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon

from bank.evaluation.verdict import difference, verdict
from bank.lookup.summary import verdict_text
from bank.manifest import Verdict, read_manifest, write_manifest
from tests.unit.bank.test_weights import manifest

PEOPLE = (0.0, 0.1, -0.1, 0.05, -0.05, 0.02)


def measured(
    *, merged: float, recalled: float, both: float, prior: float | None = None, further: float = 0.0
) -> Verdict:
    """The verdict over a few people whose losses are about these."""
    people = [
        {
            "common": 3.0 + own,
            "common+history@h1": recalled + 1.02 * own,
            "common+history@h3": recalled - further + 1.02 * own,
            "merged": merged + 1.01 * own,
            "merged+history@h1": both + 0.99 * own,
            "merged+history@h3": both - further + 0.98 * own,
        }
        | ({"prior": prior + 0.98 * own} if prior is not None else {})
        for own in PEOPLE
    ]
    return verdict(people, (1, 3))


def test_an_interval_says_what_the_signed_ranks_of_the_differences_say() -> None:
    found = difference([0.1, 0.2, 0.3, 0.4, 0.5, 0.7])
    assert (found.mean, found.low, found.high) == pytest.approx((0.35, 0.1, 0.7))
    assert found.is_higher
    assert difference([-0.1, -0.11, -0.09, -0.12, -0.08, -30]).is_lower, "one who gains much makes nobody unsure"
    assert not difference([-0.1, -0.11, -0.09, -0.12, -0.08]).is_lower, "five people cannot show anything"
    chance = np.random.default_rng(0)
    for people in (6, 7, 11, 16):
        for shift in (0.0, 0.4, 0.8):
            values = chance.normal(shift, 1, people).tolist()
            found = difference(values)
            assert (found.is_lower or found.is_higher) == (wilcoxon(values, method="exact").pvalue <= 0.05)


@pytest.mark.parametrize(
    ("losses", "judgement", "history"),
    [
        ({"merged": 2.9, "recalled": 3.1, "both": 3.0}, "Worth serving.", 0),
        ({"merged": 3.0, "recalled": 2.8, "both": 2.7}, "Worth serving.", 1),
        ({"merged": 3.0, "recalled": 2.8, "both": 2.7, "further": 0.1}, "Worth serving.", 3),
        ({"merged": 3.0, "recalled": 2.8, "both": 2.7, "further": -0.1}, "Worth serving.", 1),
        ({"merged": 3.0, "recalled": 3.2, "both": 3.2, "further": 0.1}, "Not shown to be worth serving", 0),
        ({"merged": 3.0, "recalled": 3.1, "both": 3.1, "further": 0.3}, "Worth serving with 3 past items", 3),
        ({"merged": 2.9, "recalled": 2.7, "both": 2.7}, "Worth serving with one past item in the prompt;", 1),
        ({"merged": 3.0, "recalled": 3.0, "both": 3.0}, "Not shown to be worth serving: its gain", 0),
        ({"merged": 3.2, "recalled": 3.2, "both": 3.3}, "Not worth serving: the common row alone", 0),
        ({"merged": 2.9, "recalled": 3.0, "both": 3.0, "prior": 2.5}, "Not worth serving: the histogram", 0),
        ({"merged": 2.9, "recalled": 3.0, "both": 3.0, "prior": 3.5}, "Worth serving.", 0),
    ],
)
def test_the_words_say_whether_to_serve_it_and_what_would_do_better(
    losses: dict[str, float], judgement: str, history: int
) -> None:
    found = measured(**losses)  # type: ignore[arg-type]
    words = verdict_text(found)
    assert words.startswith(judgement)
    assert "6 people" in words
    assert f"{found.merged.mean:+.3f}" in words
    assert found.history == history
    assert ("by default" in words) == bool(history)
    assert ("histogram" in words) == ("prior" in losses)


def test_a_verdict_is_kept_in_the_manifest_and_decides_how_much_history_prompts_get(tmp_path: Path) -> None:
    found = measured(merged=2.9, recalled=2.8, both=2.7)
    plain = manifest(3)
    kept = write_manifest(tmp_path, plain.model_copy(update={"verdict": found, "training": {"history_share": 0.5}}))
    read = read_manifest(tmp_path)
    assert (read, read.verdict, read.history_default, read.history_share) == (kept, found, 1, 0.5)
    assert (plain.history_default, plain.history_share) == (0, 0)
