"""The table of `bench.learning.predict`: losses by the number of texts learnt from, over those who have as many."""

from __future__ import annotations

from bench.learning.predict import WAYS, Learner, picture, table

TEXTS = [("a question", "an answer")]
LOWER = dict(zip(WAYS, (0.0, 0.25, 0.75, 1.0, 1.125, 1.25), strict=True))


def person(name: str, texts: int, step: float) -> Learner:
    """Somebody whose loss falls by `step` a text, and by `LOWER` in each way."""
    learner = Learner(name, TEXTS * texts)
    for way in WAYS:
        learner.losses[way] = [4.0 - step * place - LOWER[way] for place in range(texts)]
    learner.levels = ["base", *["merged"] * (texts - 1)]
    return learner


def test_losses_are_means_over_people_and_differences_are_within_people() -> None:
    people = [person("ada", 16, 0.1), person("bob", 16, 0.1), person("cai", 6, 0.2)]
    lines = {str(line[0]): line[1:] for line in table(people).lines}
    assert list(lines) == ["1 to 3", "4 to 7", "8 to 11", "12 to 15"]
    assert lines["8 to 11"][:6] == ("3.050", "2.800", "2.300", "2.050", "1.925", "1.800")
    assert lines["8 to 11"][-1] == "100% merged"
    assert lines["4 to 7"][0] == "3.333"  # ada and bob 3.45, cai, of whom there are two such texts, 3.1
    assert lines["12 to 15"][0] == "2.650"  # without cai
    for learnt, people_of_it in (("1 to 3", 3), ("4 to 7", 3), ("12 to 15", 2)):
        common, _, _, served, with_history, _ = map(str, lines[learnt][6:12])
        assert (common[:7], served[:7], with_history[:7]) == ("-0.2500", "-0.5000", "-0.1250")
        assert f"{people_of_it} users" in served
    (axis,) = picture(people).axes
    served, with_history, _ = axis.get_lines()
    assert list(served.get_xdata()) == list(range(1, 16))
    assert [round(float(line.get_ydata()[-1]), 4) for line in (served, with_history)] == [-0.5, -0.125]
