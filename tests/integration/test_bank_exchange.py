"""Banks and PEFT: PEFT loads what is exported, and imports compute what PEFT computes."""

from __future__ import annotations

import json
import operator
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from adapters.fusion import fuse
from adapters.recipe import FusionMethod, FusionRecipe, Term
from adapters.training.example import Acts
from adapters.user_adapter import encode_user_adapter
from bank.errors import BankError
from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.manifest import MATRIX_FILE, BankManifest, read_manifest
from bank.matrix import open_matrix
from bank.peft.exported import export_anchor
from bank.peft.imported import ImportOptions, import_bank
from bench.rig.people import people, write_people
from bench.rig.tiny import tiny_bank
from server.cli import app
from server.gateway.users.privacy import Exporting
from server.store.adapters import StoredAdapter
from tests.support.bank_bench import flip_a_bit
from tests.support.user_adapters import random_user_adapter

Tensors = dict[str, torch.Tensor]


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def peft_delta(model_folder: Path, adapter: Path) -> Tensors:
    """What PEFT itself adds to each weight when it merges the adapter."""
    before = base(model_folder)
    after = PeftModel.from_pretrained(base(model_folder), adapter).merge_and_unload()
    return {
        name: module.weight.detach() - before.get_submodule(name).weight.detach()
        for name, module in after.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def bank_delta(bank: Path, manifest: BankManifest, anchor: int, common: bool = False) -> Tensors:
    recipe = FusionRecipe(manifest.short, manifest.method, common, (Term(anchor, 1000),))
    lora = fuse(open_matrix(bank, manifest), recipe, torch.float32)
    return {name: lora.b[name].bfloat16().float() @ lora.a[name] for name in lora.a}  # as it is served


def assert_equal(one: Tensors, other: Tensors, atol: float = 1e-6) -> None:
    assert set(other) <= set(one)
    for name, delta in one.items():
        torch.testing.assert_close(delta, other.get(name, torch.zeros_like(delta)), rtol=0, atol=atol)


@pytest.mark.parametrize("with_common", [False, True])
@pytest.mark.parametrize("method", list(FusionMethod))
def test_peft_loads_an_exported_anchor_with_the_same_delta(
    tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path, method: FusionMethod, with_common: bool
) -> None:
    bank = tiny_bank(tmp_path / "bank", tiny_model_folder, embedder_folder, method=method)
    export_anchor(bank, "a02", tmp_path / "out", with_common)
    expected = bank_delta(bank, read_manifest(bank), 2, with_common)
    assert_equal(peft_delta(tiny_model_folder, tmp_path / "out"), expected)
    assert max(delta.abs().max() for delta in expected.values()) > 1e-3


def test_an_export_tells_where_it_acts_here(tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path) -> None:
    bank = tiny_bank(tmp_path / "bank", tiny_model_folder, embedder_folder, acts=Acts.AFTER_SYSTEM)
    told = mta("export", bank, "--anchor", "a01", "--out", tmp_path / "a01").output
    assert "here it acts after system; a stock server applies it everywhere" in told
    manifest = read_manifest(bank)
    recipe = FusionRecipe(manifest.short, manifest.method, True, (Term(1, 500),))
    raw = encode_user_adapter(manifest.layout, random_user_adapter(manifest, recipe))
    stores: Any = None
    adapter, says = Exporting(stores, bank, manifest)._load(StoredAdapter("x", recipe.name, "", raw))
    assert adapter is not None
    assert says.endswith("; here it acts after_system, elsewhere everywhere")


def test_missing_or_damaged_rows_are_not_exported(
    tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path
) -> None:
    bank = tiny_bank(tmp_path / "bank", tiny_model_folder, embedder_folder, anchors=3, common=False)
    with pytest.raises(BankError, match="no anchor 'a03'; its anchors are a00 to a02"):
        export_anchor(bank, "a03", tmp_path / "out")
    with pytest.raises(BankError, match="no common row"):
        export_anchor(bank, "a00", tmp_path / "out", with_common=True)
    flip_a_bit(bank / MATRIX_FILE)
    with pytest.raises(BankError, match="damaged"):
        export_anchor(bank, "a00", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def make_adapter(folder: Path, model_folder: Path, seed: int, **config: Any) -> Path:
    """A random adapter, made and saved by PEFT."""
    model = get_peft_model(base(model_folder), LoraConfig(**{"target_modules": "all-linear", "r": 4, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


class Inbox:
    """Three adapters of different shapes with profiles, and the way to import them."""

    def __init__(self, folder: Path, model_folder: Path, embedder_folder: Path) -> None:
        self.folder, self.model, self.embedder = folder, model_folder, Embedder.load(embedder_folder)
        patterns = {
            "rank_pattern": {"q_proj": 6, "layers.1.mlp.up_proj": 3},
            "alpha_pattern": {"q_proj": 5, "layers.0.self_attn.v_proj": 7},
        }
        stabilised = {"lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}
        self.adapters = [
            make_adapter(folder / "plain", model_folder, 0, lora_alpha=8),
            make_adapter(folder / "patterned", model_folder, 1, r=2, lora_alpha=3, **patterns),
            make_adapter(folder / "stabilised", model_folder, 2, **stabilised),
        ]
        self.profiles = self.profiles_of("plain", "patterned", "stabilised")

    def profiles_of(self, *names: str) -> Path:
        everybody = [{**person, "user_id": name} for person, name in zip(people(len(names)), names, strict=True)]
        return write_people(self.folder / f"profiles-{'-'.join(names)}.json", everybody)

    def bring_in(self, out: str, adapters: list[Path] | None = None, profiles: Path | None = None) -> BankManifest:
        return import_bank(
            adapters or self.adapters,
            profiles or self.profiles,
            self.folder / out,
            ImportOptions(task="chat", user_rank=4, k=2),
            model_folder=self.model,
            base_model="tiny",
            embedder=self.embedder,
        )

    def refuse(self, match: str, adapters: list[Path] | None = None, profiles: Path | None = None) -> None:
        with pytest.raises(BankError, match=match):
            self.bring_in("no", adapters, profiles)
        assert not (self.folder / "no").exists()


@pytest.fixture(scope="module")
def inbox(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, embedder_folder: Path) -> Inbox:
    return Inbox(tmp_path_factory.mktemp("inbox"), tiny_model_folder, embedder_folder)


def mta(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bank", *map(str, arguments)])


def test_imported_adapters_are_anchors_with_pefts_own_delta(
    inbox: Inbox, tmp_path: Path, embedder_folder: Path
) -> None:
    """Rank and alpha patterns, rank-stabilised scaling, different ranks and modules; all through the commands."""
    folder = tmp_path / "bank"
    assert "no bank at" in str(mta("info", folder).exception)
    options = ["--profiles", inbox.profiles, "--out", folder, "--model", inbox.model, "--embedder", embedder_folder]
    done = mta("import", *inbox.adapters, *options)
    manifest = read_manifest(folder)
    assert manifest.short in done.stdout
    assert "--force" in str(mta("import", *inbox.adapters, *options).exception)
    assert [entry.id for entry in manifest.anchors] == ["a00", "a01", "a02"]
    assert (manifest.rank, manifest.method, manifest.common) == (6, FusionMethod.CAT, False)
    for index, adapter in enumerate(inbox.adapters):
        delta, expected = bank_delta(folder, manifest, index), peft_delta(inbox.model, adapter)
        assert expected.keys() == delta.keys()
        for name, value in expected.items():
            assert (delta[name] - value).abs().max() <= 0.01 * value.abs().max()  # rows are bf16
    bank = ServingBank.open(folder, inbox.embedder.id)
    weights = bank.personalise(inbox.embedder.embed(["Say 5 on growing roses"])[0]).weights
    assert weights[0].anchor == 2

    shown = json.loads(mta("info", folder, "--json").stdout)
    assert (shown["fingerprint"], shown["index"]["kind"]) == (manifest.fingerprint, "IndexFlatIP")
    assert (shown["fused_rank"], shown["serving_rank"], shown["room"]) == (12, 32, 20)
    assert shown["bytes"][MATRIX_FILE] == (folder / MATRIX_FILE).stat().st_size
    table = mta("info", folder).stdout
    assert all(word in table for word in (manifest.fingerprint, "IndexFlatIP", "a02", "rank 20", "topic"))
    assert mta("export", folder, "--anchor", "a01", "--out", tmp_path / "a01").exit_code == 0
    assert_equal(peft_delta(inbox.model, tmp_path / "a01"), bank_delta(folder, manifest, 1))


def test_imports_that_make_no_bank_are_refused(inbox: Inbox, tmp_path: Path) -> None:
    inbox.refuse(r"no profile for \['stabilised'\]", profiles=inbox.profiles_of("plain", "patterned"))
    inbox.refuse(r"these repeat: \['plain'\]", [inbox.adapters[0], inbox.adapters[0]])
    inbox.refuse("no PEFT adapter at", [tmp_path])
    odd = Path(shutil.copytree(inbox.adapters[0], tmp_path / "odd"))
    for content, message in (("[]", "of type None, not a LoRA"), ("7", "no PEFT adapter at")):
        (odd / "adapter_config.json").write_text(content)
        inbox.refuse(message, [odd])
    config = LlamaConfig.from_pretrained(inbox.model)
    config.intermediate_size = 96
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    adapter = make_adapter(tmp_path / "plain", tmp_path / "other", 0)
    inbox.refuse(r"plain does not fit the base model: .*mlp\..*_proj", [adapter], inbox.profiles_of("plain"))


def number_of(value: float) -> Callable[[Tensors], None]:
    return lambda tensors: operator.setitem(tensors[min(tensors)][0], 0, value)


def without(part: str) -> Callable[[Tensors], None]:
    return lambda tensors: operator.delitem(tensors, next(key for key in tensors if part in key))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "has changed the base model: convert"),
        ({"init_lora_weights": "lora_ga"}, "has changed the base model: convert"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "of type 'IA3'"),
        ({"r": 5}, "has rank 4, but its configuration says 5"),
        ({"lora_alpha": None}, "lora_alpha must be a number"),
        (number_of(float("nan")), "not finite"),
        (number_of(float("inf")), "not finite"),
        (without("lora_A"), "needs one A and one B"),
        (without("lora_B"), "needs one A and one B"),
    ],
)
def test_unsupported_adapters_are_refused(
    inbox: Inbox, tmp_path: Path, change: dict[str, Any] | Callable[[Tensors], None], message: str
) -> None:
    adapter = Path(shutil.copytree(inbox.adapters[0], tmp_path / "plain"))
    if isinstance(change, dict):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
    else:
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")
    inbox.refuse(message, [adapter], inbox.profiles_of("plain"))
