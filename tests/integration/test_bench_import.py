"""`mta bench scale --part import` on a few people: real import, gateway, Valkey and engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from bench.scale import __main__ as scale
from bench.scale import importing


def test_people_are_imported_beside_streams_that_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "ALONE_S", 0.5)
    monkeypatch.setattr(importing, "TURNS", 2)
    scale.main(part=["import"], people=100, out=tmp_path / "scale.json")
    (table,) = json.loads((tmp_path / "scale-import.json").read_text("utf-8"))["tables"]
    found = dict(table["lines"])
    assert found["people imported a second"]["min"] > 0
    assert found["beside over alone"]["n"] == importing.TURNS
    assert found["the same afterwards, MiB"] > 0
