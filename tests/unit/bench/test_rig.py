"""What benchmarks measure and start: recipes, random banks, the limits of a model, and servers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.errors import MtaError
from adapters.recipe import parse_recipe
from adapters.training.trainer import linear_modules
from bank.manifest import PosteriorRule, WeightRule, read_manifest
from bank.matrix import open_matrix
from bench.rig.engine import KEY
from bench.rig.limits import BF16_BYTES, Model
from bench.rig.servers import vllm_command
from bench.rig.subject import Subject, configured_subject, random_subject
from bench.rig.tiny import tiny_bank, weightless_model
from bench.rig.up import up_command
from server.engine.command import engine_command
from server.settings import Settings

PORT = 12_345


@pytest.fixture
def subject(tiny_bank_folder: Path, tiny_model_folder: Path) -> Subject:
    return Subject(tiny_bank_folder, tiny_model_folder, read_manifest(tiny_bank_folder))


@pytest.mark.parametrize("rule", [WeightRule(), WeightRule(posterior=PosteriorRule(anchors=4))])
def test_recipes_are_fused_by_the_bank_never_the_same_and_last_as_long_as_a_run_needs(
    subject: Subject, rule: WeightRule
) -> None:
    subject = replace(subject, manifest=subject.manifest.model_copy(update={"weights": rule}))
    names = subject.names(3000)
    assert len(set(names)) == 3000
    assert subject.names(20) == names[:20] != subject.names(20, seed=1)
    for recipe in map(parse_recipe, names[:100]):
        subject.manifest.check(recipe)
        assert len(recipe.terms) == (rule.posterior or rule).anchors


def test_a_bank_with_too_few_anchors_says_so_and_no_bank_names_the_setting(
    tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lonely = tiny_bank(tmp_path, tiny_model_folder, embedder_folder, anchors=1, k=1)
    with pytest.raises(MtaError, match="makes only 1 recipes"):
        Subject(lonely, tiny_model_folder, read_manifest(lonely)).names(2)
    monkeypatch.delenv("MTA_BANK", raising=False)
    with pytest.raises(MtaError, match="MTA_BANK"):
        configured_subject(None, None)


def test_a_random_bank_has_its_rank_and_a_model_may_be_without_weights(
    tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path
) -> None:
    made = random_subject(tmp_path, str(tiny_model_folder), 16, anchors=3)
    assert (made.manifest.rank, made.manifest.serving_rank, made.manifest.user_rank) == (16, 16, 0)
    assert open_matrix(made.bank, made.manifest).rows.shape[0] == 4  # the common row beside them
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    model = weightless_model(tmp_path / "model", num_attention_heads=4, num_key_value_heads=2, **shape)
    manifest = read_manifest(tiny_bank(tmp_path / "bank", model, embedder_folder))
    sizes = {module.name.rpartition(".")[2]: (module.h_in, module.h_out) for module in manifest.modules}
    assert len(manifest.modules) == 3 * 7
    assert (sizes["k_proj"], sizes["down_proj"]) == ((32, 16), (48, 32))


def test_what_a_model_needs_for_a_step_and_a_prompt_is_what_is_counted_on_it(subject: Subject) -> None:
    shape, manifest = Model.read(subject.model), subject.manifest
    layout, model = manifest.layout, AutoModelForCausalLM.from_pretrained(subject.model)
    assert shape.weights == sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    alone, one, two = (shape.step_bytes(10, n, manifest) for n in (0, 1, 2))
    assert alone == shape.step_bytes(10)
    assert one - alone == (layout.a_numbers + layout.b_numbers) * BF16_BYTES
    assert two - one == layout.b_numbers * BF16_BYTES  # a shared A is read once
    assert shape.step_bytes(7) - shape.step_bytes(0) == 7 * 2 * 2 * 2 * 32 * BF16_BYTES  # K and V, layers, heads, size
    body = sum(m.h_in * m.h_out for m in linear_modules(model))
    attention = 4 * 2 * 2 * 32 * 50**2 // 2  # two products of 2 operations, layers, heads, size, half of it masked
    assert shape.prompt_flops(50) == 2 * body * 50 + attention + 2 * (shape.weights - body)  # the head once
    adapter = 2 * 50 * (layout.a_numbers + layout.b_numbers)
    assert shape.prompt_flops(50, manifest) - shape.prompt_flops(50) == adapter


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
    assert not {"--enforce-eager", "3", "77", *subject.manifest.target_modules} & set(plain)
    kept = ("--model", "--dtype", "--max-num-seqs", "--port", "--host", "--served-model-name")
    assert all(ours[ours.index(name) :][:2] == plain[plain.index(name) :][:2] for name in kept)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment


def test_only_the_embedder_and_the_cache_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MTA_CACHE_DIR", "MTA_EMBEDDER", "MTA_MODEL", "MTA_SECRET"):
        monkeypatch.setenv(name, "the caller's")
    _, environment = up_command(tmp_path)
    assert {"MTA_MODEL", "MTA_SECRET"} <= {name for name, value in environment.items() if value is None}
    assert not {"MTA_CACHE_DIR", "MTA_EMBEDDER"} & environment.keys()
