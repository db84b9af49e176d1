"""The last step of any bank's build: write the matrix, the index and the map, then the manifest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapters.lora import RowLayout, serving_rank
from adapters.recipe import FusionMethod, anchor_id
from bank.errors import BankError
from bank.items.profile import Vectors
from bank.lookup.atlas import Atlas
from bank.lookup.index import AnchorIndex
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


def write_bank(
    out: Path,
    *,
    task: str,
    base_model: BaseModelId,
    embedder: EmbedderId,
    common: bool,
    user_rank: int,
    weights: WeightRule,
    layout: RowLayout,
    rows: Sequence[torch.Tensor],
    shared_a: torch.Tensor | None,
    embeddings: Vectors,
    items: Sequence[int],
    training: dict[str, int | float | str | bool | None],
    prior: AnswerPrior | None = None,
    curvature: Vectors | None = None,
    words: Sequence[tuple[str, ...]] = (),
    directions: DirectionRows | None = None,
    phrases: PhraseRule | None = None,
    record: Callable[[Path, BankManifest], Canary] | None = None,
) -> BankManifest:
    """Write drafts of a bank's files, then rename them, the manifest last: a folder with a manifest is complete.

    If a draft cannot be written, a bank in the folder stays as it was; engines keep what they have mapped of it. `rows`
    are flat [D], the common row last. `embeddings` [N, E], `items` (how many trained) and `words` are in anchor order;
    `curvature` is H [N, N]. With `directions`, those are served, and the anchors' rows kept beside them. `record` reads
    the canary with what is in a folder.
    """
    from adapters.matrix import write_matrix

    method = FusionMethod.SHARED if layout.shared_a else FusionMethod.CAT
    rank = bank_rank(method, layout.rank, weights, common, user_rank)
    drafts = out / _DRAFTS
    try:
        shutil.rmtree(drafts, ignore_errors=True)  # of a build that was killed
        drafts.mkdir(parents=True)
        arrays = {CURVATURE_FILE: curvature}
        served, count = iter(rows), len(rows)
        if directions is not None:
            write_matrix(drafts / ROWS_FILE, layout, count, rows, shared_a)
            arrays = {CURVATURE_FILE: directions.curvature, COORDINATES_FILE: directions.coordinates}
            served, count = chain(directions.mixed(rows[:-1]), rows[-1:]), len(directions.mixing) + 1
        write_matrix(drafts / MATRIX_FILE, layout, count, served, shared_a)
        AnchorIndex.build(embeddings).save(drafts / INDEX_FILE)
        Atlas.of(embeddings).save(drafts / MAP_FILE)
        for name, array in arrays.items():
            if array is not None:
                np.save(drafts / name, array)
        files = sorted(drafts.iterdir())
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        manifest = BankManifest(
            task=task,
            base_model=base_model,
            embedder=embedder,
            method=method,
            common=common,
            rank=layout.rank,
            user_rank=user_rank,
            serving_rank=rank,
            weights=weights,
            target_modules=tuple(sorted({m.name.rsplit(".", 1)[-1] for m in layout.modules})),
            modules=layout.modules,
            anchors=tuple(
                AnchorEntry(id=anchor_id(i), items=n, words=words[i] if words else ()) for i, n in enumerate(items)
            ),
            directions=len(directions.mixing) if directions is not None else None,
            prior=prior,
            phrases=phrases,
            training=training,
            files={path.name: file_sha256(path) for path in files},
        )
        written = write_manifest(drafts, manifest)
        if record is not None:
            written = write_manifest(drafts, written.model_copy(update={"canary": record(drafts, written)}))
        # From here on nothing takes room on the disk, and until the end the folder is not a bank.
        (out / MANIFEST_FILE).unlink(missing_ok=True)
        for stale in {CURVATURE_FILE, COORDINATES_FILE, ROWS_FILE}.difference(manifest.files):
            (out / stale).unlink(missing_ok=True)
        shutil.rmtree(out / BASELINES, ignore_errors=True)
        for name in (*manifest.files, MANIFEST_FILE):
            (drafts / name).replace(out / name)
        return written
    except (OSError, RuntimeError) as error:  # the latter is faiss's
        raise BankError(f"cannot write the bank to {out}: {error}") from error
    finally:
        shutil.rmtree(drafts, ignore_errors=True)
