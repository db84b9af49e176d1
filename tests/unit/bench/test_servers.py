"""The servers that benchmarks start: what vLLM's are told, and which settings of the caller reach ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from bank.manifest import read_manifest
from bench.rig.engine import KEY
from bench.rig.servers import vllm_command
from bench.rig.subject import Subject
from bench.rig.up import up_command
from server.engine.command import engine_command
from server.settings import Settings

PORT = 12_345


@pytest.fixture
def subject(tiny_bank_folder: Path, tiny_model_folder: Path) -> Subject:
    return Subject(tiny_bank_folder, tiny_model_folder, read_manifest(tiny_bank_folder))


def test_ours_is_the_product_s_own_command_and_stock_has_vllm_s_own_way_to_load(subject: Subject) -> None:
    settings = Settings(bank=subject.bank, engine_port=PORT, engine_key=KEY, max_num_seqs=16, max_loras=3)  # type: ignore[arg-type]
    ours, _ = made = vllm_command(subject, "ours", PORT, max_loras=3)
    assert made == engine_command(settings, [subject.manifest], subject.model)
    stock, environment = vllm_command(subject, "stock", PORT, max_loras=3)
    assert set(ours) - set(stock) == {
        *("--worker-extension-cls", "server.engine.fusing.manager.WorkerExtension"),
        *("--scheduler-cls", "server.engine.admission.fair_scheduler.FairScheduler"),
    }
    assert set(stock) <= set(ours)
    assert (environment["VLLM_PLUGINS"], environment["MTA_BANK"]) == ("", "")
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_plain_knows_nothing_of_lora_and_may_be_compiled(subject: Subject) -> None:
    ours, _ = vllm_command(subject, "ours", PORT, max_loras=3, max_cpu_loras=77)
    plain, environment = vllm_command(subject, "plain", PORT, max_loras=3, max_cpu_loras=77)
    assert not any("lora" in argument for argument in plain)
    assert "--enforce-eager" not in plain
    assert not {"3", "77", *subject.manifest.target_modules} & set(plain)
    kept = ("--model", "--dtype", "--max-num-seqs", "--port", "--host", "--served-model-name")
    assert all(ours[ours.index(name) :][:2] == plain[plain.index(name) :][:2] for name in kept)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment


def test_only_the_embedder_and_the_cache_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MTA_CACHE_DIR", "MTA_EMBEDDER", "MTA_MODEL", "MTA_SECRET"):
        monkeypatch.setenv(name, "the caller's")
    _, environment = up_command(tmp_path)
    removed = {name for name, value in environment.items() if value is None}
    assert {"MTA_MODEL", "MTA_SECRET"} <= removed
    assert not {"MTA_CACHE_DIR", "MTA_EMBEDDER"} & environment.keys()
