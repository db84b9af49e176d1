"""The last step of any bank's build: write the matrix, the index and the map, then the manifest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    EmbedderId,
    WeightRule,
    file_sha256,
    fused_rank,
    write_manifest,
)

if TYPE_CHECKING:
    import torch

    from bank.building.directions import DirectionRows


BASELINES = "baselines"  # subfolder of a bank
_DRAFT = ".tmp"


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
) -> BankManifest:
    """Write a bank's files, the manifest last, so that a folder with a manifest is complete.

    `rows` are flat, the common row last. `embeddings` [N, E], `items` (number of training items) and `words` are in
    anchor order; `curvature` is H [N, N]. With `directions`, those are served, and the anchors' rows kept beside them.
    """
    from safetensors import SafetensorError

    from adapters.matrix import write_matrix

    method = FusionMethod.SHARED if layout.shared_a else FusionMethod.CAT
    rank = bank_rank(method, layout.rank, weights, common, user_rank)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MANIFEST_FILE).unlink(missing_ok=True)  # from here on the folder is not a bank
        files, arrays = [INDEX_FILE, MAP_FILE, MATRIX_FILE], {CURVATURE_FILE: curvature}
        if directions is not None:
            with _replacing(out / ROWS_FILE) as draft:
                write_matrix(draft, layout, rows, shared_a)
            files.append(ROWS_FILE)
            arrays = {CURVATURE_FILE: directions.curvature, COORDINATES_FILE: directions.coordinates}
            rows = [*directions.rows, rows[-1]]
        with _replacing(out / MATRIX_FILE) as draft:
            write_matrix(draft, layout, rows, shared_a)
        with _replacing(out / INDEX_FILE) as draft:
            AnchorIndex.build(embeddings).save(draft)
        with _replacing(out / MAP_FILE) as draft:
            Atlas.of(embeddings).save(draft)
        for name, array in arrays.items():
            if array is not None:
                with _replacing(out / name) as draft, draft.open("wb") as file:
                    np.save(file, array)
                files.append(name)
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
            directions=len(directions.rows) if directions is not None else None,
            prior=prior,
            training=training,
            files={name: file_sha256(out / name) for name in files},
        )
        # What is left of the bank that this one replaces, or of a write that failed, knows its people.
        for stale in {CURVATURE_FILE, COORDINATES_FILE, ROWS_FILE}.difference(files):
            for left in (stale, f"{stale}{_DRAFT}"):
                (out / left).unlink(missing_ok=True)
        shutil.rmtree(out / BASELINES, ignore_errors=True)
        return write_manifest(out, manifest)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is faiss's
        raise BankError(f"cannot write the bank to {out}: {error}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a draft and rename it to `path`; engines that have mapped the old file keep it intact."""
    draft = path.with_name(f"{path.name}{_DRAFT}")
    yield draft
    draft.chmod(0o644)  # safetensors makes files readable by the owner only
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(path)
