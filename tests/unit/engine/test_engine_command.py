"""What the vLLM process is started with: enough for all its banks, and no secret that it has no use for."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.lora import ModuleShape
from bank.errors import BankError
from bank.models.folders import DEFAULT_MODEL, model_path
from bench.rig.tiny import PHRASES
from server.engine import command as engine
from server.engine.command import Share, check_engine, engine_command
from server.engine.cpu.slots import Cells
from server.settings import Settings


def bank(rank: int = 8, *modules: str) -> Any:
    shapes = [ModuleShape(f"layers.0.{module}", 64, 192) for module in modules or ("q_proj",)]
    found = {"serving_rank": rank, "target_modules": modules or ("q_proj",), "modules": shapes}
    return SimpleNamespace(**found, base_model=None, phrases=None, shares_prompts=False)


@dataclass
class Command:
    argv: list[str]
    environment: dict[str, str]

    def __getitem__(self, option: str) -> str:
        return self.argv[self.argv.index(f"--{option}") + 1]


def command(*banks: Any, share: Share | None = None, **settings: Any) -> Command:
    given = Settings(bank=Path("/model"), **settings)
    model = model_path(given.model, given.cache_dir)
    return Command(*engine_command(given, banks or (bank(),), model, share))


@pytest.fixture(params=[True, False], ids=["cpu", "gpu"])
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """On a machine of four cores, where nothing says how many threads to take."""
    monkeypatch.setattr("server.engine.command.is_cpu_build", lambda: request.param)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {4, 5, 6, 7})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return bool(request.param)


cpu = pytest.mark.parametrize("on_cpu", [True], indirect=True)
gpu = pytest.mark.parametrize("on_cpu", [False], indirect=True)
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
def test_mixtures_of_experts_need_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> None:
    for written, on_cpu, refused in ((config, True, True), (config, False, False), (DENSE, True, False)):
        (tmp_path / "config.json").write_text(json.dumps(written))
        monkeypatch.setattr("server.engine.command.is_cpu_build", lambda answer=on_cpu: answer)
        monkeypatch.setattr("server.engine.command.read_manifest", lambda folder: bank(8, "q_proj"))
        settings = Settings(bank=tmp_path / "none", model=str(tmp_path), engine_key="k" * 32)  # type: ignore[arg-type]
        with pytest.raises(BankError) as caught:
            check_engine(settings)
        assert ("Mixture of Experts" in str(caught.value)) is refused
        assert refused or "lacks" in str(caught.value)


def test_gpus_refuse_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    monkeypatch.setattr("server.engine.command.read_manifest", lambda folder: bank(8, "q_proj"))
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    given: dict[str, Any] = {"bank": tmp_path / "none", "model": str(tmp_path), "engine_key": "k" * 32}
    for dtype in ("float32", "auto"):
        refused = dtype == "float32" and not on_cpu
        with pytest.raises(BankError, match="set bfloat16 or float16" if refused else "lacks"):
            check_engine(Settings(**given, dtype=dtype))


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("stored", [{"weight_block_size": [128, 128]}, {"format": "int-quantized"}, {"bits": 4}])
def test_some_quantisations_need_amx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: dict[str, Any], has_amx: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DENSE | {"quantization_config": stored}))
    monkeypatch.setattr("server.engine.command.is_cpu_build", lambda: True)
    monkeypatch.setattr("server.engine.command.read_manifest", lambda folder: bank(8, "q_proj"))
    monkeypatch.setattr("server.engine.command.cpu_flags", lambda: {"amx_tile"} if has_amx else set())
    settings = Settings(bank=tmp_path / "none", model=str(tmp_path), engine_key="k" * 32)  # type: ignore[arg-type]
    with pytest.raises(BankError, match="lacks" if has_amx or "bits" in stored else "only on CPUs with AMX"):
        check_engine(settings)


def test_slots_fit_every_bank() -> None:
    started = command(bank(8, "q_proj", "v_proj"), bank(32, "v_proj", "gate_proj"), bank(16, "o_proj"))
    assert started["max-lora-rank"] == "32"
    modules = started.argv[started.argv.index("--lora-target-modules") + 1 :]
    assert modules[:4] == ["gate_proj", "o_proj", "q_proj", "v_proj"]
    assert not [module for module in modules[4:] if module.endswith("_proj")]


@pytest.mark.parametrize(
    ("settings", "source", "sampling"),
    [
        ({"model": "default"}, "vllm", {"temperature": 0.2, "top_p": 0.9}),
        ({"model": str(model_path(DEFAULT_MODEL, Settings().cache_dir))}, "vllm", {"temperature": 0.2, "top_p": 0.9}),
        ({"model": "/a/folder"}, "auto", {}),
        ({"model": "default", "default_sampling": '{"top_k": 5}'}, "vllm", {"top_k": 5}),
        ({"model": "/a/folder", "default_sampling": "{}"}, "vllm", {}),
    ],
)
def test_sampling_is_what_is_set_or_the_models_own(settings: dict[str, str], source: str, sampling: Any) -> None:
    started = command(**settings)
    assert started["generation-config"] == source
    assert json.loads(started["override-generation-config"]) == {"max_new_tokens": None} | sampling


@pytest.mark.parametrize("variable", ["MTA_SECRET", "mta_secret"])
def test_it_gets_no_secret_but_its_own_key(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "s" * 32)
    monkeypatch.setenv("MTA_ENGINE_KEY", "k" * 32)
    started = command()
    assert "s" * 32 not in started.environment.values()
    assert [name for name, value in started.environment.items() if value == "k" * 32] == ["VLLM_API_KEY"]
    assert not {"s" * 32, "k" * 32} & set(started.argv)


SLOT = 8192 + 2 * engine.VIEWS * engine.VIEW_BYTES  # two modules' A and B of rank 8, of 64 and 192 numbers, and views


@cpu
@pytest.mark.parametrize(
    ("memory", "slots"), [(0, 8), (16 * SLOT * 9, 9), (16 * SLOT * 31 - 1, 30), (16 * SLOT * 65, 64), (2**50, 64)]
)
def test_slots_fit_a_share_of_memory(on_cpu: bool, monkeypatch: pytest.MonkeyPatch, memory: int, slots: int) -> None:
    monkeypatch.setattr(engine, "memory_bytes", lambda: memory)
    started = command(bank(8, "q_proj"), bank(4, "q_proj", "v_proj"))
    assert started["max-loras"] == str(slots)
    assert int(started["max-cpu-loras"]) >= 2 * slots


@gpu
def test_gpu_batch_has_a_recipe_per_request_by_default(on_cpu: bool) -> None:
    for sequences in ("4", "100"):
        started = command(max_num_seqs=sequences)
        assert started["max-loras"] == started["max-num-seqs"] == sequences
        assert int(started["max-cpu-loras"]) >= 2 * int(sequences)
    assert command(max_num_seqs=100, max_loras=3)["max-loras"] == "3"
    sharing = bank()
    sharing.shares_prompts = True
    assert command(sharing, max_loras=3)["max-loras"] == "4"


def test_blocks_are_small_on_cpu_and_vllms_own_on_gpus(on_cpu: bool) -> None:
    assert ("--block-size" in command().argv) is on_cpu
    assert not on_cpu or command()["block-size"] == "32"


def test_phrases_are_mixed_by_the_class_of_the_runner(on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--logits-processors" not in command().argv
    trusting = bank()
    trusting.phrases = PHRASES
    found = [command(bank(), trusting)["logits-processors"]]
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    found += [command(trusting)["logits-processors"]]
    folder = "server.engine.phrases"
    first, second = f"{folder}.processor:PhraseProcessor", f"{folder}.gpu_processor:GpuPhraseProcessor"
    assert found == [first if on_cpu else second, first]


def test_engine_traces_and_logs_like_its_gateway_if_asked() -> None:
    started = command()
    assert "--otlp-traces-endpoint" not in started.argv
    assert not {"VLLM_LOGGING_CONFIG_PATH", "OTEL_SERVICE_NAME"} & started.environment.keys()
    started = command(otlp_endpoint="http://collector:4318/", log_format="json")
    assert started["otlp-traces-endpoint"] == "http://collector:4318/v1/traces"
    assert started.environment["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
    assert Path(started.environment["VLLM_LOGGING_CONFIG_PATH"]).is_file()


def test_a_slots_size_counts_the_views_by_which_it_is_written() -> None:
    slots, modules = 64, 40
    stacks = [(torch.zeros(slots, 1, 16, 16), torch.zeros(slots, 1, 16, 16)) for _ in range(modules)]

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes()
    kept = [Cells.of_slots(stacks, ranks) for ranks in ((8,), (8, 2))]
    taken = resident_bytes() - before
    views = sum(len(one) for cells, *_ in kept for one in (cells.padding, *cells.parts))
    assert views == modules * engine.VIEWS
    assert taken / slots < 1.5 * views * engine.VIEW_BYTES


@pytest.mark.parametrize(
    ("whole", "of", "parts"),
    [(4, 2, [[0, 1], [2, 3]]), (3, 2, [[0], [1, 2]]), (2, 2, [[0], [1]]), (1, 2, [[0], [0]]), (2, 3, [[0], [0], [1]])],
)
def test_engines_share_out_what_there_is_and_none_goes_without(whole: int, of: int, parts: list[list[int]]) -> None:
    assert [Share(place, of).part(range(whole)) for place in range(of)] == parts


BIND, OMP = "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"


@cpu
@pytest.mark.parametrize(
    ("ranks", "share", "threads", "expected"),
    [
        (1, None, None, {OMP: "4"}),
        (1, None, "3", {OMP: "3"}),
        (2, None, None, {BIND: "4,6|5,7"}),
        (2, None, "2", {BIND: "nobind", OMP: "1"}),
        *((1, Share(1, 2), threads, {OMP: "1" if threads == "1" else "2"}) for threads in (None, "1", "3", "0", "two")),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_threads_keep_to_the_share_of_cores_or_given_number(
    monkeypatch: pytest.MonkeyPatch, ranks: int, share: Share | None, threads: str | None, expected: dict[str, str]
) -> None:
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    started = command(share=share, tensor_parallel_size=ranks)
    assert {name: started.environment[name] for name in (BIND, OMP) if name in started.environment} == expected
    assert (started.argv[:3] == ["taskset", "--cpu-list", "6,7"]) is (share is not None)


@gpu
def test_one_of_several_engines_keeps_to_its_share_of_the_gpus(on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def visible(place: int) -> str:
        return command(share=Share(place, 2), tensor_parallel_size=2).environment["CUDA_VISIBLE_DEVICES"]

    assert [visible(place) for place in range(2)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert visible(1) == "6,7"


def test_container_limit_below_the_machine_memory_counts(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    machine = engine.memory_bytes([limit])
    for written, memory in (("max", machine), ("123456", 123456)):
        limit.write_text(f"{written}\n")
        assert engine.memory_bytes([limit]) == memory
