"""What the vLLM process is started with: enough for all its banks, and no secret that it has no use for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.lora import ModuleShape
from bank.errors import BankError
from server.engine import sizing
from server.engine.command import Share, check_engine, engine_command
from server.engine.fusing.cells import Cells
from server.settings import Settings


def bank(rank: int, *modules: str) -> Any:
    shapes = [ModuleShape(f"layers.0.{module}", 64, 192) for module in modules]
    return SimpleNamespace(serving_rank=rank, target_modules=modules, modules=shapes)


DENSE = {"model_type": "qwen3", "hidden_size": 64, "num_experts": 1, "vision_config": {"num_experts": None}}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mixtral", "num_local_experts": 8},
        {"model_type": "qwen3_moe", "num_experts": 128},
        {"model_type": "deepseek_v3", "n_routed_experts": 256, "n_shared_experts": 1},
        {"model_type": "ernie4_5_vl_moe", "moe_num_experts": [64, 64]},
        {"model_type": "llama4", "text_config": {"num_local_experts": 16}},
        {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}},
        {"model_type": "nemotron", "block_configs": [{"block_type": "mlp"}, {"n_routed_experts": 128}]},
    ],
    ids=lambda config: config["model_type"],
)
def test_a_mixture_of_experts_is_refused_on_cpus_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    for written, on_cpu, refused in ((config, True, True), (config, False, False), (DENSE, True, False)):
        (tmp_path / "config.json").write_text(json.dumps(written))
        monkeypatch.setattr("server.engine.command.is_cpu_build", lambda answer=on_cpu: answer)
        settings = Settings(bank=tmp_path / "none", model=str(tmp_path), engine_key="k" * 32)  # type: ignore[arg-type]
        with pytest.raises(BankError) as caught:
            check_engine(settings)
        assert ("Mixture of Experts" in str(caught.value)) is refused
        assert refused or "no bank" in str(caught.value)


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


SLOT = 8192 + 2 * sizing.VIEWS * sizing.VIEW_BYTES
"""Bytes of A and B of rank 8, of 64 and 192 numbers, of two modules, and of the views by which they are written."""


@pytest.mark.parametrize(
    ("memory", "slots"), [(0, 8), (16 * SLOT * 9, 9), (16 * SLOT * 31 - 1, 30), (16 * SLOT * 65, 64), (2**50, 64)]
)
def test_slots_fit_a_share_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, slots: int
) -> None:
    monkeypatch.setattr(sizing, "memory_bytes", lambda: memory)
    banks = [bank(8, "q_proj"), bank(4, "q_proj", "v_proj")]
    argv, _ = engine_command(Settings(bank=tmp_path), banks, tmp_path)
    assert argv[argv.index("--max-loras") + 1] == str(slots)
    assert int(argv[argv.index("--max-cpu-loras") + 1]) >= 2 * slots


def test_it_traces_to_where_its_gateway_does_and_logs_as_it_does_only_if_they_are_to(tmp_path: Path) -> None:
    argv, environment = engine_command(Settings(bank=tmp_path), [bank(8, "q_proj")], tmp_path)
    assert "--otlp-traces-endpoint" not in argv
    assert not {"VLLM_LOGGING_CONFIG_PATH", "OTEL_SERVICE_NAME"} & environment.keys()
    chosen = Settings(bank=tmp_path, otlp_endpoint="http://collector:4318/", log_format="json")
    argv, environment = engine_command(chosen, [bank(8, "q_proj")], tmp_path)
    assert argv[argv.index("--otlp-traces-endpoint") + 1] == "http://collector:4318/v1/traces"
    assert environment["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
    assert Path(environment["VLLM_LOGGING_CONFIG_PATH"]).is_file()


def test_as_many_slots_as_one_asks_for(tmp_path: Path) -> None:
    argv, _ = engine_command(Settings(bank=tmp_path, max_loras=3), [bank(8, "q_proj")], tmp_path)
    assert argv[argv.index("--max-loras") + 1] == "3"


def test_a_slots_size_counts_the_views_by_which_it_is_written() -> None:
    """As many as a plain and a stacked adapter need together, and as large as they are."""
    slots, modules = 64, 40
    stacks = [(torch.zeros(slots, 1, 16, 16), torch.zeros(slots, 1, 16, 16)) for _ in range(modules)]
    before = _resident_bytes()
    kept = [Cells.of_slots(stacks, ranks, shares_a=True) for ranks in ((8,), (8, 2))]
    taken = _resident_bytes() - before
    views = sum(len(run.cells) for cells in kept for run in cells[0].runs) + sum(len(cells[0].rest) for cells in kept)
    assert views == modules * sizing.VIEWS
    assert taken / slots < 1.5 * views * sizing.VIEW_BYTES


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("sequences", [4, 32, 100])
def test_on_a_gpu_every_request_of_a_batch_may_have_its_own_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequences: int
) -> None:
    monkeypatch.setattr("server.engine.command.is_cpu_build", lambda: False)
    argv, _ = engine_command(Settings(bank=tmp_path, max_num_seqs=sequences), [bank(8, "q_proj")], tmp_path)
    assert argv[argv.index("--max-loras") + 1] == argv[argv.index("--max-num-seqs") + 1] == str(sequences)
    assert int(argv[argv.index("--max-cpu-loras") + 1]) >= 2 * sequences


@pytest.mark.parametrize(
    ("whole", "of", "parts"),
    [(4, 2, [[0, 1], [2, 3]]), (3, 2, [[0], [1, 2]]), (2, 2, [[0], [1]]), (1, 2, [[0], [0]]), (2, 3, [[0], [0], [1]])],
)
def test_engines_share_out_what_there_is_and_none_goes_without(whole: int, of: int, parts: list[list[int]]) -> None:
    assert [Share(place, of).part(range(whole)) for place in range(of)] == parts


@pytest.mark.parametrize(("threads", "expected"), [(None, "2"), ("1", "1"), ("3", "2"), ("0", "2"), ("two", "2")])
def test_one_of_several_engines_keeps_to_its_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: str | None, expected: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {4, 5, 6, 7})
    monkeypatch.setattr("server.engine.command.is_cpu_build", lambda: True)
    argv, environment = engine_command(Settings(bank=tmp_path), [bank(8, "q_proj")], tmp_path, Share(1, 2))
    assert argv[:3] == ["taskset", "--cpu-list", "6,7"]
    assert environment["OMP_NUM_THREADS"] == expected


@pytest.mark.parametrize(
    ("ranks", "threads", "expected"),
    [
        (1, None, {"OMP_NUM_THREADS": "4"}),
        (1, "3", {"OMP_NUM_THREADS": "3"}),
        (2, None, {"VLLM_CPU_OMP_THREADS_BIND": "4,6|5,7"}),
        (2, "2", {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}),
    ],
)
def test_threads_are_no_more_than_it_is_told_and_then_bound_to_no_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, threads: str | None, expected: dict[str, str]
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {4, 5, 6, 7})
    monkeypatch.setattr("server.engine.command.is_cpu_build", lambda: True)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    _, environment = engine_command(Settings(bank=tmp_path, tensor_parallel_size=ranks), [bank(8, "q_proj")], tmp_path)
    names = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")
    assert {name: environment[name] for name in names if name in environment} == expected


def test_one_of_several_engines_keeps_to_its_share_of_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.command.is_cpu_build", lambda: False)
    settings = Settings(bank=tmp_path, tensor_parallel_size=2)
    seen = [engine_command(settings, [bank(8, "q_proj")], tmp_path, Share(place, 2))[1] for place in range(2)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in seen] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    _, environment = engine_command(settings, [bank(8, "q_proj")], tmp_path, Share(1, 2))
    assert environment["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_a_containers_limit_counts_where_it_is_below_the_machines_memory(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    machine = sizing.memory_bytes([limit])
    limit.write_text("max\n")
    assert sizing.memory_bytes([limit]) == machine
    limit.write_text("123456\n")
    assert sizing.memory_bytes([limit]) == 123456
