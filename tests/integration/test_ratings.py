"""What models expect of scores, and what they add to a person's habit; on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from adapters.training.example import Example
from bank.evaluation.scoring import Scorer
from bank.lookup.prior import SCORES
from bank.models.load import load_base
from bench.quality import ratings
from bench.rig.people import write_people
from server.cli import app
from tests.support.bank_bench import Bench

RATINGS = [5, 1, 4, 5, 2, 5, 3, 1, 5, 4, 5, 2]


def rater(number: int) -> dict[str, Any]:
    """A dozen ratings to learn from, and two later ones."""
    films = [{"id": f"{number}-{n}", "text": f"Film {n}", "score": str(s)} for n, s in enumerate(RATINGS, number)]
    asked = [{"id": f"q{number}-{n}", "input": f"Film {n}", "gold": "5"} for n in (30, 31)]
    return {"user_id": f"rater-{number}", "profile": films, "query": asked}


def mta(*arguments: object) -> None:
    """The command in this process."""
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_each_method_with_and_without_the_habit(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratings, "mta", mta)
    users, out = write_people(tmp_path / "users.json", [rater(n) for n in range(5)]), tmp_path / "out.json"
    bench.build("ratings", inputs={"users": users}, task="movie_rating")
    folder, model = bench.folder / "ratings", str(bench.model)
    ratings.main(bank=folder, users=users, people=2, methods="common,common+history@h2,merged", model=model, out=out)
    figures = json.loads(out.read_text("utf-8"))["rows"]
    for what in ("loss", "error of the expected score"):
        each = {name: float(figures[f"{name}: {what}"]) for name in ("prior", "common", "common+prior", "merged+prior")}
        assert all(0 < value < 4 for value in each.values())
        assert each["common"] != each["common+prior"]
    assert figures["common: loss"] != figures["common+history@h2: loss"]


def test_chances_are_those_that_losses_are_made_of(tiny_model_folder: Path) -> None:
    scorer = Scorer(*load_base(tiny_model_folder, "float32"))
    ids = [scorer.tokenizer.encode(score, add_special_tokens=False)[0] for score in SCORES]
    prompts = [(9, 8, 7), (6, 5), (9, 9, 9, 9)]
    found = scorer.read(None, [Example((*prompt, 40, 41), len(prompt)) for prompt in prompts], chances=True)
    for prompt, reading in zip(prompts, found, strict=True):
        readings = scorer.read(None, [Example((*prompt, one), len(prompt)) for one in ids])
        assert reading.chances == pytest.approx([math.exp(-each.loss) for each in readings], rel=1e-4)
        assert not any(each.chances for each in readings)
