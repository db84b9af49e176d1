"""Which base model a bank is for: its weights, chat template and tokenizer, and the hub's revision."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters.errors import MtaError
from adapters.lora import ModuleShape
from adapters.recipe import FusionMethod
from bank.errors import BankError
from bank.manifest import (
    MANIFEST_FILE,
    MATRIX_FILE,
    AnchorEntry,
    BankManifest,
    EmbedderId,
    WeightRule,
    file_sha256,
    read_manifest,
    write_manifest,
)
from bank.models.folders import base_model_id, check_base_model, ensure_base_model, prompt_hashes
from server.cli import app
from server.engine.command import check_engine
from server.settings import Settings, load_settings

FILES = {
    "config.json": {"model_type": "llama"},
    "tokenizer_config.json": {"bos_token": {"content": "<s>"}, "tokenizer_class": "One"},
    "tokenizer.json": {"model": {"type": "BPE"}},
}
PARTS = {"chat template": "chat_template.jinja", "tokenizer": "tokenizer.json"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def bank(tmp_path: Path, model: Path) -> Path:
    folder = tmp_path / "bank"
    folder.mkdir()
    (folder / MATRIX_FILE).write_bytes(b"")
    manifest = BankManifest(
        task="chat",
        base_model=base_model_id(str(model), model),
        embedder=EmbedderId(id="0" * 16, dim=4),
        method=FusionMethod.SHARED,
        common=True,
        rank=8,
        user_rank=0,
        serving_rank=8,
        weights=WeightRule(anchors=1),
        target_modules=("q_proj",),
        modules=(ModuleShape("layers.0.q_proj", 4, 4),),
        anchors=(AnchorEntry(id="a00", items=12),),
        training={},
        files={MATRIX_FILE: file_sha256(folder / MATRIX_FILE)},
    )
    write_manifest(folder, manifest)
    return folder


def settings_of(bank: Path, model: str) -> Settings:
    return Settings(bank=bank, model=model, engine_key="k" * 32)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.cpu.native.build", lambda cache_dir: False)


def test_who_wrote_the_tokenizer_does_not_matter(model: Path) -> None:
    before = prompt_hashes(model)
    config = {"bos_token": "<s>", "pad_token": None, "tokenizer_class": "Another"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert prompt_hashes(model) == before
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<t>"}))
    assert prompt_hashes(model)["tokenizer"] != before["tokenizer"]


def test_a_template_is_the_same_wherever_it_lies(model: Path) -> None:
    before, template = prompt_hashes(model), model / "chat_template.jinja"
    config = FILES["tokenizer_config.json"] | {"chat_template": template.read_text()}
    template.unlink()
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert prompt_hashes(model) == before


@pytest.mark.parametrize("parts", [("chat template",), ("tokenizer",), ("chat template", "tokenizer")])
def test_an_engine_refuses_other_prompts(parts: tuple[str, ...], bank: Path, model: Path) -> None:
    assert check_engine(settings_of(bank, str(model)))[1] == model
    for part in parts:
        with (model / PARTS[part]).open("a") as file:
            file.write(" ")
    with pytest.raises(BankError, match=f"the bank at {bank} .*{model} has another {' and '.join(parts)}: serve"):
        check_engine(settings_of(bank, str(model)))


def test_a_bank_of_the_version_before_opens_with_any_prompts(bank: Path, model: Path) -> None:
    content = json.loads((bank / MANIFEST_FILE).read_text())
    del content["fingerprint"], content["base_model"]["prompts"]
    covered = json.dumps(content, sort_keys=True, separators=(",", ":"))  # by the fingerprint of that version
    content["fingerprint"] = hashlib.sha256(covered.encode()).hexdigest()
    (bank / MANIFEST_FILE).write_text(json.dumps(content))
    (model / "chat_template.jinja").write_text("{{ another }}")
    manifest = read_manifest(bank)
    assert (manifest.fingerprint, manifest.base_model.revision) == (content["fingerprint"], None)
    check_base_model(model, {bank: manifest})


class Hub:
    """A cache in the hub's own layout, which is read offline, with two revisions of a model."""

    name, first, newest = "org/tiny", "a" * 40, "b" * 40

    def __init__(self, folder: Path, model: Path) -> None:
        self.repository = folder / "models--org--tiny"
        for revision in (self.first, self.newest):
            shutil.copytree(model, self.at(revision))
        (self.at(self.newest) / "chat_template.jinja").write_text("{{ another }}")
        (self.repository / "refs").mkdir()
        self.move_to(self.first)

    def at(self, revision: str) -> Path:
        return self.repository / "snapshots" / revision

    def move_to(self, revision: str) -> None:
        (self.repository / "refs" / "main").write_text(revision)


@pytest.fixture
def hub(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Hub(tmp_path / "hub", model)


@pytest.fixture
def hub_bank(hub: Hub, bank: Path, tmp_path: Path) -> Path:
    """A bank for the hub's first revision, after which the hub has moved on."""
    built_for = base_model_id(hub.name, ensure_base_model(hub.name, tmp_path))
    write_manifest(bank, read_manifest(bank).model_copy(update={"base_model": built_for}))
    hub.move_to(hub.newest)
    return bank


def test_a_hub_id_stays_at_the_revision_of_the_bank(tmp_path: Path, hub: Hub, hub_bank: Path) -> None:
    built_for = read_manifest(hub_bank).base_model
    assert (built_for.name, built_for.revision) == (hub.name, hub.first)
    assert ensure_base_model(hub.name, tmp_path) == hub.at(hub.newest)
    assert ensure_base_model(hub.name, tmp_path, built_for) == hub.at(hub.first)
    assert check_engine(settings_of(hub_bank, hub.name))[1] == hub.at(hub.first)


def test_models_are_fetched_at_the_revision_of_the_bank(
    hub: Hub, hub_bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bank.models.folders.ensure_embedder", lambda folder, cache_dir: None)
    done = CliRunner().invoke(app, ["models", "--bank", str(hub_bank), "--model", hub.name])
    assert re.search(rf"^base model +{hub.at(hub.first)}$", done.stdout, re.MULTILINE), done.output


def test_a_revision_that_is_not_there_is_named(hub: Hub, hub_bank: Path) -> None:
    shutil.rmtree(hub.at(hub.first))
    with pytest.raises(BankError, match=f"{hub.name}.* could not be fetched .*, at revision {hub.first}: "):
        check_engine(settings_of(hub_bank, hub.name))


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ mine }}")
    return path


def test_a_template_of_ones_own_is_another_chat_template(
    tmp_path: Path, bank: Path, model: Path, template: Path
) -> None:
    settings = settings_of(bank, str(model)).model_copy(update={"chat_template": template, "cache_dir": tmp_path / "c"})
    with pytest.raises(BankError, match=r"has another chat template: .*MTA_CHAT_TEMPLATE"):
        check_engine(settings)
    folder = ensure_base_model(str(model), tmp_path / "c", template=template)
    write_manifest(bank, read_manifest(bank).model_copy(update={"base_model": base_model_id(str(folder), folder)}))
    assert check_engine(settings)[1] == folder
    assert ensure_base_model(str(folder), tmp_path / "c", template=template) == folder  # the worker of `mta up`
    with pytest.raises(BankError, match="has another chat template"):
        check_engine(settings_of(bank, str(model)))


def test_a_model_with_another_template_keeps_all_else(tmp_path: Path, hub: Hub, template: Path) -> None:
    (hub.at(hub.first) / "model.safetensors").chmod(0o600)
    own, other = (ensure_base_model(hub.name, tmp_path / "c", template=each) for each in (None, template))
    before, after = base_model_id(hub.name, own), base_model_id(hub.name, other)
    assert (after.name, after.revision, after.hash) == (hub.name, hub.first, before.hash)
    assert after.unlike(before.prompts) == "chat template"
    assert (own / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (own / "model.safetensors").stat().st_mode & 0o777 == 0o600
    template.write_text("{{ messages }}")
    assert ensure_base_model(hub.name, tmp_path / "c", template=template) == own


def test_a_model_without_a_template_can_be_given_one(tmp_path: Path, model: Path, template: Path) -> None:
    (model / "chat_template.jinja").unlink()
    with pytest.raises(BankError, match="MTA_CHAT_TEMPLATE"):
        prompt_hashes(model)
    assert prompt_hashes(ensure_base_model(str(model), tmp_path / "c", template=template))
    with pytest.raises(MtaError, match=r"^MTA_CHAT_TEMPLATE: "):
        load_settings(chat_template=tmp_path / "none")
