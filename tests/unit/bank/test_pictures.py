"""What pictures of an evaluation show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bank.evaluation import pictures
from bank.evaluation.summary import MethodRow


def row(method: str, loss: float, tokens: float = 90.0) -> MethodRow:
    return MethodRow(method, 9, loss, {}, {}, 0.0, tokens, None, 800.0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    figures: list[Any] = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure))
    return figures


def test_the_base_model_does_not_stretch_the_scale_of_losses(drawn: list[Any]) -> None:
    rows = [row("base", 9.0), row("common", 3.6), row("common+history@h1", 3.4, 270), row("merged", 3.5)]
    pictures.draw_prices(rows, Path("unused"))
    panels = drawn[0].axes
    assert all(panel.get_ylim()[0] < 3.4 and 3.6 < panel.get_ylim()[1] < 4 for panel in panels)
    assert [text.get_text() for text in panels[1].texts] == ["9.00 ↑"]
    legend = [text.get_text() for text in panels[1].get_legend().get_texts()]
    assert legend == ["base", "common", "merged", "past items in the prompt: 0", "past items in the prompt: 1"]


def test_a_table_of_the_base_model_alone_is_drawn(drawn: list[Any]) -> None:
    pictures.draw_prices([row("base+history@h1", 8.0), row("base", 9.0)], Path("unused"))
    assert not list(drawn[0].axes[0].texts)
