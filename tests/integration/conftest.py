"""Banks that are built here, from scratch, for a module at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from bank.manifest import BankManifest
from tests.support.bank_bench import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, embedder_folder: Path) -> Bench:
    return Bench(tmp_path_factory.mktemp("build"), tiny_model_folder, embedder_folder)


@pytest.fixture(scope="module")
def built(bench: Bench) -> BankManifest:
    """The bank of `OPTIONS`, in the folder `plain`."""
    return bench.build("plain")
