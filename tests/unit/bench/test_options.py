"""Options of benchmarks: what cannot be measured together is refused, and no run is too small for its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

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
    measured = {}
    for what, module in (("users", users), ("lookups", anchors), ("recipes", recipes), ("people", importing)):
        measured[what] = MagicMock(return_value=Figures(what, ("figure",), []))
        monkeypatch.setattr(module, "measure", measured[what])

    def numbers() -> list[int]:
        given = {what: measure.call_args.args for what, measure in measured.items()}
        return [given["users"][0].users, given["lookups"][1], given["recipes"][0], given["people"][0]]

    scale.main(users=1000, lookups=100, recipes=100, people=100, quick=True, out=None)
    assert numbers() == [1000, 100, 100, 100]
    scale.main(quick=True, out=None)
    assert numbers() == [20_000, 400, 2000, 200]
