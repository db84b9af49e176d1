"""Writing a bank: drafts first, in little memory, and an old bank that outlives a full disk."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.lora import ModuleShape, RowLayout
from bank.building.assemble import Anchors, BankRows, Basis, Rules, write_bank
from bank.building.directions import make_directions
from bank.building.ranks import Ranks
from bank.building.resume import Workbench
from bank.errors import BankError
from bank.lookup.index import AnchorIndex
from bank.lookup.signature import Curvature
from bank.lookup.summary import summarise
from bank.manifest import MANIFEST_FILE, BaseModelId, EmbedderId, WeightRule, read_manifest
from bank.matrix import open_matrix
from bench.rig.tiny import tiny_bank

MIB = 1 << 20


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """Have the kernel refuse this process more of a resource, in bytes."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("modules", "room"), [(None, 16_384), (["q_proj"], 4_096)], ids=["matrix", "index"])
def test_without_room_for_a_new_bank_the_old_one_is_whole(
    tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path, modules: list[str] | None, room: int
) -> None:
    bank, make = tmp_path / "bank", {"rank": 1, "targets": modules, "signs": True}
    tiny_bank(bank, tiny_model_folder, embedder_folder, anchors=2, seed=1, **make)  # type: ignore[arg-type]
    before = contents(bank)
    with limited(resource.RLIMIT_FSIZE, room), pytest.raises(BankError, match="cannot write the bank"):
        tiny_bank(bank, tiny_model_folder, embedder_folder, anchors=9, seed=2, **make)  # type: ignore[arg-type]
    assert contents(bank) == before
    assert summarise(bank)["fingerprint"] == read_manifest(bank).fingerprint


def test_every_file_is_on_the_disk_before_the_manifest(
    tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = list[str]()
    monkeypatch.setattr("os.fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").readlink().name))
    written = tiny_bank(tmp_path / "bank", tiny_model_folder, embedder_folder, directions=2)
    assert sorted(synced[:-1]) == sorted(read_manifest(written).files)
    assert synced[-1].startswith(MANIFEST_FILE)


def data_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text("utf-8").splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def test_rows_are_kept_mixed_and_written_in_little_memory(tmp_path: Path) -> None:
    layout, count, width = RowLayout((ModuleShape("q", 8, 2 * MIB // 8),), 4, shared_a=True), 48, MIB
    curvature = Curvature.of(np.diag(np.arange(1.0, count + 1)))
    work, embeddings = tmp_path / "work", np.eye(count, 4, dtype=np.float32)
    work.mkdir()
    AnchorIndex.build(embeddings)  # loads FAISS, which has no part in what is limited
    with limited(resource.RLIMIT_DATA, data_bytes() + 40 * MIB):  # all rows have 96 MiB in bf16
        rows = Workbench(work, Ranks()).rows(count + 1, width, lambda place: torch.full((width,), place % 7 + 1.0))
        manifest = write_bank(
            tmp_path / "bank",
            Basis("chat", BaseModelId(name="none", hash="0" * 64), EmbedderId(id="e" * 16, dim=4), user_rank=0),
            BankRows(layout, list(rows), torch.ones(layout.a_numbers), directions=make_directions(curvature, 3, 1.0)),
            Anchors(embeddings, [11] * count),
            Rules(WeightRule()),
            training={},
        )
    found = open_matrix(tmp_path / "bank", manifest).rows
    leading = [(place % 7) + 1.0 for place in (47, 46, 45)]  # the last rows bend most
    assert found[:, 0].tolist() == found[:, -1].tolist() == [*leading, 48 % 7 + 1.0]
