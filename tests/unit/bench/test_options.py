"""Options of benchmarks: what cannot be measured together is refused, and no run is too small for its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from bench.page.report import Figures
from bench.scale import __main__ as scale
from bench.scale import anchors, importing, recipes, users
from bench.serving import cost


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"tiny_model": True, "rank": [32]}, "--tiny"),
        ({"tiny_model": True, "bank": Path("bank")}, "--tiny"),
        ({"tiny_model": True, "model": "default"}, "--tiny"),
        ({"bank": Path("bank"), "rank": [32]}, "--rank"),
        ({"only": ["1 stream", "no such text"]}, "--only"),
        ({"only": ["over 16 recipes"], "slots": [16, 8]}, "--slots"),
    ],
)
def test_cost_refuses_what_it_would_ignore(given: dict[str, Any], hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTA_BANK", raising=False)
    with pytest.raises(typer.BadParameter) as refused:
        cost.main(**given)
    assert refused.value.param_hint == hint


def test_a_quick_run_measures_no_less_than_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: dict[str, int] = {}

    def note(name: str, number: int) -> Figures:
        measured[name] = number
        return Figures(name, ("figure",), [])

    monkeypatch.setattr(users, "measure", lambda wanted, *_: note("users", wanted.users))
    monkeypatch.setattr(anchors, "measure", lambda _, lookups, *__: note("lookups", lookups))
    monkeypatch.setattr(recipes, "measure", lambda count, *_: note("recipes", count))
    monkeypatch.setattr(importing, "measure", lambda count, *_: note("people", count))
    scale.main(users=1000, lookups=100, recipes=100, people=100, quick=True, out=None)
    assert measured == {"users": 1000, "lookups": 100, "recipes": 100, "people": 100}
    scale.main(quick=True, out=None)
    assert measured == {"users": 20_000, "lookups": 400, "recipes": 2000, "people": 200}
