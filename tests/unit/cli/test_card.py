"""How engine and worker share a GPU: a plan that is made of numbers alone, and what `mta up` makes of it."""

from __future__ import annotations

import itertools
import json
import os
from contextlib import closing
from math import floor
from pathlib import Path

import pytest

from adapters.training.example import Acts
from bank.manifest import read_manifest
from bank.models.load import limit_gpu
from server.cli.run import machine
from server.cli.run.machine import MAX_GPU_SHARE, Card, cards, parts_of, plan
from server.cli.run.needs import CUDA_BYTES, GIB, Required, needs_of, rows_bytes, trained_bytes
from server.cli.shared import prepare_to_train
from server.engine import command
from server.settings import Settings
from server.supervisor.data_folder import DataFolder

SMALL = Required(3 * GIB, 3 * GIB, job=2 * GIB, token=1 << 18)
LLAMA = Required(20 * GIB, 21 * GIB, job=4 * GIB, token=9 << 19)  # of 8 billion weights


def card(total_gib: float, free_gib: float | None = None, name: str = "0") -> Card:
    return Card(name, int(total_gib * GIB), int((total_gib if free_gib is None else free_gib) * GIB))


LARGE = card(80, 79)


@pytest.mark.parametrize(
    ("cards", "needs", "settings", "engine", "worker_card"),
    [
        ([card(80)], SMALL, {}, 0.88, "0"),
        ([card(80)], LLAMA, {}, 0.65, "0"),
        ([card(8)], SMALL, {}, 0.54, "0"),
        ([card(6)], SMALL, {}, 0.92, None),
        ([card(24)], LLAMA, {}, 0.92, None),
        ([card(40)], LLAMA._replace(engine=3 * GIB), {}, 0.92, None),  # the engine would keep less than half
        ([card(80, 30)], LLAMA, {}, 0.37, None),  # somebody else has the rest
        ([LARGE, card(80, 79, "1"), card(24, 23, "2")], LLAMA, {"replicas": 2}, 0.92, "2"),  # which no engine has
        ([LARGE, card(8, 8, "1")], LLAMA, {}, 0.65, "0"),  # the other one is too small
        ([LARGE, card(80, 40, "1")], SMALL, {"replicas": 2}, 0.46, "1"),  # each engine gets what all of them can have
        ([card(40), card(80, name="1")], SMALL, {"replicas": 2}, 0.84, "1"),
        ([LARGE], SMALL, {"worker_gpu_share": 0}, 0.92, None),
        ([LARGE], SMALL, {"engine_gpu_share": 0.5}, 0.5, "0"),
        ([LARGE], SMALL, {"engine_gpu_share": 0.91}, 0.91, None),
        ([card(24)], LLAMA, {"worker_gpu_share": 0.25}, 0.62, "0"),
        ([], SMALL, {}, None, None),  # nobody says what there is: vLLM decides, and the worker stays away
    ],
)
def test_who_gets_which_card_and_how_much_of_it(
    cards: list[Card], needs: Required, settings: dict[str, float], engine: float | None, worker_card: str | None
) -> None:
    given = Settings(**settings)  # type: ignore[arg-type]
    shares, place, summary = plan(cards, needs, given)
    share = shares.engine_gpu_share
    assert (share and floor(100 * share + 1e-6) / 100, place) == (engine, worker_card)
    assert shares.worker_gpu_share is not None and (shares.worker_gpu_share > 0) is (worker_card is not None)
    assert ("on the CPU" in summary) is (worker_card is None)
    assert ("not known" in summary) is (not cards)
    if "worker_gpu_share" in settings:
        assert shares.worker_gpu_share == settings["worker_gpu_share"]
    elif worker_card:
        [own] = [one for one in cards if one.name == worker_card]
        most = needs.worker if own in cards[: given.replicas] else own.free
        assert shares.worker_gpu_share * own.total <= most - CUDA_BYTES + 1


@pytest.mark.parametrize(
    ("cards", "needs", "settings", "longest"),
    [
        ([LARGE], SMALL, {}, 4096),
        ([LARGE], LLAMA, {}, 910),
        ([LARGE], LLAMA, {"sample_tokens": 512}, 512),
        ([LARGE], LLAMA, {"worker_gpu_share": 0.4}, 3640),
        ([LARGE, card(80, 40, "1")], LLAMA, {}, 4096),  # all of the other card is the worker's
        ([LARGE], LLAMA, {"worker_gpu_share": 0.1}, 1),  # nothing fits, and the worker says so
        ([LARGE], LLAMA, {"worker_gpu_share": 0}, 4096),
    ],
)
def test_samples_fit_what_the_worker_has(
    cards: list[Card], needs: Required, settings: dict[str, float], longest: int
) -> None:
    planned, place, summary = plan(cards, needs, Settings(**settings))  # type: ignore[arg-type]
    assert planned.sample_tokens == longest
    assert (f"samples of up to {longest} tokens" in summary) is (place is not None)


@pytest.mark.parametrize("needs", [SMALL, LLAMA])
def test_gpu_plan_fits_free_memory_and_engine_keeps_half(needs: Required) -> None:
    for total_gib, free in itertools.product((6, 8, 16, 24, 40, 48, 80, 141), (1.0, 0.97, 0.7, 0.3)):
        one = card(total_gib, free * total_gib)
        shares, usable = plan([one], needs, Settings())[0], min(one.free, MAX_GPU_SHARE * one.total)
        assert shares.engine_gpu_share is not None
        engine, worker = shares.engine_gpu_share * one.total, (shares.worker_gpu_share or 0) * one.total
        assert engine + (worker + CUDA_BYTES if worker else 0) <= usable + 1
        if worker:
            assert engine >= max(needs.engine, usable / 2) - 1


def driver(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_cards_are_as_the_driver_says_and_cuda_orders_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver(tmp_path, monkeypatch, "0, GPU-aa, 81920, 80000", "1, GPU-bb, 24576, 24000")
    one, other = Card("0", 81920 << 20, 80000 << 20), Card("1", 24576 << 20, 24000 << 20)
    assert cards() == [one, other]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert cards() == [other, one]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb")
    assert cards() == [other._replace(name="GPU-bb")]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    driver(tmp_path, monkeypatch, "0, GPU-aa, [N/A], [N/A]")
    assert cards() == []


def test_what_is_needed_follows_the_model(tmp_path: Path, tiny_bank_folder: Path) -> None:
    manifests = [read_manifest(tiny_bank_folder)]
    config = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    config |= {"max_position_embeddings": 8192, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(16 * GIB)
    engine, worker, job, token = needs_of(tmp_path, manifests, Settings())
    assert 18 * GIB < worker < 22 * GIB
    assert (job, token) == (4 * GIB, trained_bytes(manifests[0].layout, 0))
    assert 19 * GIB < engine < 20 * GIB  # the weights, 1 GiB of cache, 2 to compute in, a little for slots
    [manifest] = manifests
    rows = rows_bytes(manifest.layout, len(manifest.anchors) + 1)
    assert needs_of(tmp_path, manifests * 2, Settings()).engine == engine + rows
    sharing = [manifest.model_copy(update={"training": {"acts": Acts.AFTER_SYSTEM}}) for manifest in manifests]
    assert needs_of(tmp_path, sharing, Settings()).worker == worker + GIB // 4  # keys and values that are read once
    assert needs_of(tmp_path, manifests, Settings(dtype="float32")).engine > engine + 16 * GIB
    assert needs_of(tmp_path, manifests, Settings(tensor_parallel_size=2)).engine < engine - 8 * GIB
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    assert needs_of(tmp_path, manifests, Settings()).engine < engine - 7 * GIB


@pytest.fixture
def tiny(tiny_bank_folder: Path, tiny_model_folder: Path, embedder_folder: Path) -> Settings:
    return Settings(bank=tiny_bank_folder, model=str(tiny_model_folder), embedder=embedder_folder)


@pytest.mark.parametrize(("total_mib", "on_card"), [(81920, True), (4096, False)])
def test_up_prints_the_plan_and_starts_both_by_it(
    tmp_path: Path, tiny: Settings, monkeypatch: pytest.MonkeyPatch, total_mib: int, on_card: bool
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for module in (machine, command):
        monkeypatch.setattr(module, "is_cpu_build", lambda: False)
    driver(tmp_path, monkeypatch, f"0, GPU-aa, {total_mib}, {total_mib}")
    said: list[str] = []
    with closing(DataFolder.open(tmp_path / "data")) as data:
        parts = parts_of(tiny, data, said.append)
    assert [("the worker trains on GPU 0" in line) for line in said] == [on_card]
    named = {part.name: part for part in parts}
    argv, worker = named["engine"].command, named["worker"]
    share = float(argv[argv.index("--gpu-memory-utilization") + 1])
    assert f"the engine takes {share:.0%}" in said[0]
    assert ("engine" in (worker.needs or ())) is on_card
    assert worker.environment.get("CUDA_VISIBLE_DEVICES") == ("0" if on_card else None)
    assert (float(worker.environment["MTA_WORKER_GPU_SHARE"]) > 0) is on_card
    assert (share < 0.9) is on_card


def test_worker_keeps_to_its_gpu_share_or_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    prepare_to_train(gpu=True)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    prepare_to_train(gpu=False)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    for share in (None, 0.0, 0.25):
        limit_gpu(share)
    assert limits == [0.25]
