"""The last step of any bank's build: write the matrix, the index and the map, then the manifest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapters.lora import RowLayout, serving_rank
from adapters.recipe import FusionMethod, anchor_id
from bank.errors import BankError
from bank.items.profile import Vectors
from bank.lookup.index import AnchorIndex
from bank.lookup.projection import Projection
from bank.manifest import (
    COORDINATES_FILE,
    CURVATURE_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    MAP_FILE,
    MATRIX_FILE,
    ROWS_FILE,
    AnchorEntry,
    AnswerPrior,
    BankManifest,
    BaseModelId,
    Canary,
    EmbedderId,
    PhraseRule,
    WeightRule,
    file_sha256,
    fused_rank,
    write_manifest,
)

if TYPE_CHECKING:
    import torch

    from bank.building.directions import DirectionRows


BASELINES = "baselines"  # subfolder of a bank
_DRAFTS = ".drafts"


def bank_rank(method: FusionMethod, rank: int, rule: WeightRule, common: bool, user_rank: int) -> int:
    """Return the rank of vLLM's slots: the largest fusion plus the rank of user adapters."""
    try:
        return serving_rank(fused_rank(method, rank, rule.anchors, common) + user_rank)
    except ValueError as error:
        raise BankError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Basis:
    """What a bank is made for; `user_rank` is the rank that is left for users' own adapters."""

    task: str
    base_model: BaseModelId
    embedder: EmbedderId
    user_rank: int

    @classmethod
    def of(cls, manifest: BankManifest) -> Basis:
        return cls(manifest.task, manifest.base_model, manifest.embedder, manifest.user_rank)


@dataclass(frozen=True, slots=True)
class BankRows:
    """The anchors' rows, each flat [D], and after them the common one; `directions` are served instead, if given."""

    layout: RowLayout
    rows: Sequence[torch.Tensor]
    shared_a: torch.Tensor | None
    common: bool = True
    directions: DirectionRows | None = None

    @property
    def method(self) -> FusionMethod:
        return FusionMethod.SHARED if self.layout.shared_a else FusionMethod.CAT


@dataclass(frozen=True, slots=True)
class Anchors:
    """What is known of the anchors, in the order of their rows."""

    embeddings: Vectors  # [N, E]
    items: Sequence[int]  # how many each was trained on
    words: Sequence[tuple[str, ...]] = ()

    def entries(self) -> tuple[AnchorEntry, ...]:
        words = self.words or [()] * len(self.items)
        given = enumerate(zip(self.items, words, strict=True))
        return tuple(AnchorEntry(id=anchor_id(i), items=items, words=said) for i, (items, said) in given)


@dataclass(frozen=True, slots=True)
class Rules:
    """What turns a user's evidence into weights and words; `curvature` is H [N, N] along the anchors' rows."""

    weights: WeightRule
    curvature: Vectors | None = None
    prior: AnswerPrior | None = None
    phrases: PhraseRule | None = None


def write_bank(
    out: Path,
    basis: Basis,
    rows: BankRows,
    anchors: Anchors,
    rules: Rules,
    *,
    training: dict[str, int | float | str | bool | None],
    record: Callable[[Path, BankManifest], Canary] | None = None,
) -> BankManifest:
    """Write drafts of a bank's files, then rename them, the manifest last: a folder with a manifest is complete.

    If a draft cannot be written, a bank in the folder stays as it was; engines keep what they have mapped of it.
    `record` reads the canary with what is in a folder.
    """
    serving = bank_rank(rows.method, rows.layout.rank, rules.weights, rows.common, basis.user_rank)
    drafts = out / _DRAFTS
    try:
        shutil.rmtree(drafts, ignore_errors=True)  # of a build that was killed
        drafts.mkdir(parents=True)
        _write_files(drafts, rows, anchors.embeddings, rules.curvature)
        manifest = BankManifest(
            task=basis.task,
            base_model=basis.base_model,
            embedder=basis.embedder,
            user_rank=basis.user_rank,
            method=rows.method,
            common=rows.common,
            rank=rows.layout.rank,
            serving_rank=serving,
            weights=rules.weights,
            target_modules=tuple(sorted({m.name.rsplit(".", 1)[-1] for m in rows.layout.modules})),
            modules=rows.layout.modules,
            anchors=anchors.entries(),
            directions=len(rows.directions.mixing) if rows.directions else None,
            prior=rules.prior,
            phrases=rules.phrases,
            training=training,
            files={path.name: file_sha256(path) for path in sorted(drafts.iterdir())},
        )
        written = write_manifest(drafts, manifest)
        if record is not None:
            written = write_manifest(drafts, written.model_copy(update={"canary": record(drafts, written)}))
        _publish(drafts, out, written)
        return written
    except (OSError, RuntimeError) as error:  # the latter is faiss's
        raise BankError(f"cannot write the bank to {out}: {error}") from error
    finally:
        shutil.rmtree(drafts, ignore_errors=True)


def _write_files(folder: Path, bank: BankRows, embeddings: Vectors, curvature: Vectors | None) -> None:
    """Write all files but the manifest, and wait until they are on the disk."""
    from adapters.matrix import write_matrix

    arrays = {CURVATURE_FILE: curvature}
    served, count = iter(bank.rows), len(bank.rows)
    if (directions := bank.directions) is not None:
        write_matrix(folder / ROWS_FILE, bank.layout, count, bank.rows, bank.shared_a)
        arrays = {CURVATURE_FILE: directions.curvature, COORDINATES_FILE: directions.coordinates}
        served, count = chain(directions.mixed(bank.rows[:-1]), bank.rows[-1:]), len(directions.mixing) + 1
    write_matrix(folder / MATRIX_FILE, bank.layout, count, served, bank.shared_a)
    AnchorIndex.build(embeddings).save(folder / INDEX_FILE)
    Projection.of(embeddings).save(folder / MAP_FILE)
    for name, array in arrays.items():
        if array is not None:
            np.save(folder / name, array)
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _publish(drafts: Path, out: Path, manifest: BankManifest) -> None:
    """Move the drafts to their folder. It takes no room on the disk, and until the end the folder is not a bank."""
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    for stale in {CURVATURE_FILE, COORDINATES_FILE, ROWS_FILE}.difference(manifest.files):
        (out / stale).unlink(missing_ok=True)
    shutil.rmtree(out / BASELINES, ignore_errors=True)
    for name in (*manifest.files, MANIFEST_FILE):
        (drafts / name).replace(out / name)
