"""Who chooses a bank's decay: people whom the common row was not trained on, where there are enough."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adapters.training.example import Example
from bank.building import build
from bank.building.options import BuildInputs, BuildOptions
from bank.building.rows import RowTrainer
from bank.building.signer import MeasuredPerson
from bank.items.histories import History
from bank.manifest import BaseModelId
from bench.rig.people import people, write_people
from tests.support.bank_bench import Recorder


class Stopped(Exception):
    """Ends a build before it writes a bank."""


class Building:
    """Builds a bank of three anchors without any model, and notes who is trained on and who judges."""

    def __init__(self, folder: Path, patched: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self.common: set[str] = set()
        self.anchors: set[str] = set()
        self.judges: list[str] = []
        self.record: dict[str, Any] = {}
        self.progress = Recorder()
        embedder = SimpleNamespace(id="0" * 16, dim=2)
        for name, stand_in in {
            "ensure_base_model": lambda *_, **__: folder,
            "base_model_id": lambda *_: BaseModelId(name="none", hash="0" * 64),
            "ensure_embedder": lambda *_: folder,
            "Embedder": SimpleNamespace(load=lambda *_: embedder),
            "person_embedding": lambda *_: np.ones(2),
            "load_base": lambda *_: (None, None),
            "Signer": lambda *_: None,
            "measure_curvature": lambda *_: np.eye(3),
            "fit_rule": self._fit_rule,
            "likelier_words": lambda *_: (),
            "fit_phrases": lambda *_, **__: None,
            "write_bank": self._write_bank,
        }.items():
            patched.setattr(build, name, stand_in)
        patched.setattr("bank.building.signer.encode_pair", lambda *_: Example((1, 2), 1))
        patched.setattr(RowTrainer, "rows", self._rows)

    def of(self, count: int) -> None:
        users = write_people(self._folder / "users.json", people(count, items=11))
        options = BuildOptions("chat", anchors=3, anchors_by="longest", verdict=False, dtype="float32")
        with pytest.raises(Stopped):
            build.build_bank(BuildInputs(users, self._folder / "bank", "none", self._folder), options, self.progress)

    def _rows(self, work: object, common: Sequence[History], anchors: Sequence[History]) -> Any:
        self.common, self.anchors = ({person.user_id for person in some} for some in (common, anchors))
        return SimpleNamespace(layout=None, rows=(), shared_a=None)

    def _fit_rule(self, signer: object, curvature: object, judges: Sequence[MeasuredPerson], *_: object) -> Any:
        self.judges = [person.user_id for person in judges]
        return 250.0, np.ones(3)

    def _write_bank(self, *_: object, training: dict[str, Any], **__: object) -> Any:
        self.record = training
        raise Stopped


@pytest.fixture
def building(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Building:
    return Building(tmp_path, monkeypatch)


@pytest.mark.parametrize(("count", "judges"), [(24, 6), (50, 12), (100, 24)])
def test_the_common_row_is_not_trained_on_those_who_judge(building: Building, count: int, judges: int) -> None:
    building.of(count)
    assert not building.common.intersection(building.judges)
    assert (len(building.judges), len(building.common)) == (judges, count - judges)
    assert building.record["unseen_judges"] == judges
    assert f"the common row does not see {judges} people, on whom the decay is chosen" in building.progress.said


def test_a_judge_may_be_an_anchor(building: Building) -> None:
    building.of(24)
    assert building.anchors == {f"secret-person-{i}" for i in (21, 22, 23)}
    first = list(building.judges)
    building.of(24)
    assert building.judges == first  # as on every rank


def test_where_too_few_people_judge_the_build_says_so(building: Building) -> None:
    building.of(23)
    assert len(building.common) == len(building.judges) == 23
    assert building.record["unseen_judges"] == 0
    assert any(said.startswith("too few people to leave any out") for said in building.progress.said)
