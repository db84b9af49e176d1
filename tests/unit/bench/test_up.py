"""The settings of who starts a benchmark: which of them reach the servers that it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.rig.up import up_command


def test_only_the_embedder_and_the_cache_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MTA_CACHE_DIR", "MTA_EMBEDDER", "MTA_MODEL", "MTA_SECRET"):
        monkeypatch.setenv(name, "the caller's")
    _, environment = up_command(tmp_path)
    removed = {name for name, value in environment.items() if value is None}
    assert {"MTA_MODEL", "MTA_SECRET"} <= removed
    assert not {"MTA_CACHE_DIR", "MTA_EMBEDDER"} & environment.keys()
