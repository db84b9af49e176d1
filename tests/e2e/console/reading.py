"""What the pages read and compare, module by module, in the browser that will."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.console.browser import Looking

BEFORE = """# HELP tokens_seconds Between tokens.
tokens_seconds_bucket{le="0.1",level="merged"} 10
tokens_seconds_bucket{le="0.2",level="merged"} 10
tokens_seconds_bucket{le="+Inf",level="merged"} 10
asked_total{route="/a \\"b\\"",level="x"} 7
asked_total{route="/c",level=""} 100
"""
AFTER = """tokens_seconds_bucket{le="0.1",level="merged"} 60
tokens_seconds_bucket{le="0.2",level="merged"} 109
tokens_seconds_bucket{le="+Inf",level="merged"} 110
asked_total{route="/a \\"b\\"",level="x"} 9
asked_total{route="/c",level=""} 3
"""


def _in(look: Looking, module: str, does: str, *values: object) -> Any:
    """What an expression over a module of the console (`m`) and values (`v`) gives."""
    look.visit("users")
    script = f"async ([path, v]) => {{ const m = await import(path); return {does}; }}"
    return look.page.evaluate(script, [f"/console/reading/{module}.js", list(values)])


class TestReading:
    @pytest.mark.parametrize(("q", "seconds"), [(0.5, 0.1), (0.25, 0.05), (0.99, 0.2), (1.0, 0.2)])
    def test_a_quantile_is_of_what_was_observed_in_between(self, look: Looking, q: float, seconds: float) -> None:
        does = "m.quantile(m.parseMetrics(v[0]), m.parseMetrics(v[1]), 'tokens_seconds', v[2])"
        assert _in(look, "metrics", does, BEFORE, AFTER, q) == pytest.approx(seconds)
        assert _in(look, "metrics", does, AFTER, AFTER, q) is None

    def test_growth_counts_from_nothing_when_a_counter_has_begun_anew(self, look: Looking) -> None:
        does = """['x', ''].map((level) =>
            m.growth(m.parseMetrics(v[0]), m.parseMetrics(v[1]), 'asked_total', (labels) => labels.level === level))"""
        assert _in(look, "metrics", does, BEFORE, AFTER) == [2, 3]
        assert _in(look, "metrics", "m.growth(m.parseMetrics(''), m.parseMetrics(''), 'asked_total')") is None

    @pytest.mark.parametrize(
        ("left", "right", "marked"),
        [
            ("the cat sat", "the dog sat", (["cat"], ["dog"])),
            ("one two", "one two", ([], [])),
            ("", "all new", ([], ["all new"])),
            ("a\n\nb c", "b c", (["a"], [])),
            ("x\ny", "z", (["x", "y"], ["z"])),
            ("Same words", "same words", (["Same"], ["same"])),
        ],
    )
    def test_words_that_differ_are_marked_and_no_text_is_lost(
        self, look: Looking, left: str, right: str, marked: tuple[list[str], list[str]]
    ) -> None:
        sides = _in(look, "diff", "m.compared(v[0], v[1])", left, right)
        assert ["".join(text for text, _ in side) for side in sides] == [left, right]
        assert tuple([text for text, differs in side if differs] for side in sides) == marked
