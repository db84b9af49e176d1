"""What the vLLM process is started with: enough for all its banks, and no secret that it has no use for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.engine.command import engine_command
from server.settings import Settings


def bank(rank: int, *modules: str) -> Any:
    return SimpleNamespace(serving_rank=rank, target_modules=modules)


def test_slots_fit_every_bank(tmp_path: Path) -> None:
    banks = [bank(8, "q_proj", "v_proj"), bank(32, "v_proj", "gate_proj"), bank(16, "o_proj")]
    argv, _ = engine_command(Settings(bank=tmp_path), banks, tmp_path)
    assert argv[argv.index("--max-lora-rank") + 1] == "32"
    modules = argv[argv.index("--lora-target-modules") + 1 :]
    assert modules[:4] == ["gate_proj", "o_proj", "q_proj", "v_proj"]
    assert not [module for module in modules[4:] if module.endswith("_proj")]


@pytest.mark.parametrize("variable", ["MTA_SECRET", "mta_secret"])
def test_it_gets_no_secret_but_its_own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "s" * 32)
    monkeypatch.setenv("MTA_ENGINE_KEY", "k" * 32)
    argv, environment = engine_command(Settings(bank=tmp_path), [bank(8, "q_proj")], tmp_path)
    assert "s" * 32 not in environment.values()
    assert [name for name, value in environment.items() if value == "k" * 32] == ["VLLM_API_KEY"]
    assert not {"s" * 32, "k" * 32} & set(argv)
