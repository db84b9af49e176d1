"""The last step in making any bank: write matrix, index and map and, once all are in place, the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    CURVATURE_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    MAP_FILE,
    MATRIX_FILE,
    AnchorEntry,
    BankManifest,
    BaseModelId,
    EmbedderId,
    ModuleEntry,
    file_sha256,
    fused_rank,
    write_manifest,
)
from bank.rules import AnswerPrior, WeightRule

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class BankParts:
    """What a bank is put together from; what the manifest has too is as there.

    Attributes:
        rows: flat rows in anchor order, then the common row where `common` says so.
        shared_a: the one frozen A of method `shared`.
        embeddings: [N, E], in anchor order.
        items: trained items of each anchor.
        curvature: H [N, N] for the posterior, or None.
        words: typical ones of each anchor, or none at all.
    """

    task: str
    base_model: BaseModelId
    embedder: EmbedderId
    method: FusionMethod
    common: bool
    user_rank: int
    weights: WeightRule
    layout: RowLayout
    rows: Sequence[torch.Tensor]
    shared_a: torch.Tensor | None
    embeddings: Vectors
    items: Sequence[int]
    training: dict[str, int | float | str | bool | None]
    prior: AnswerPrior | None = None
    curvature: Vectors | None = None
    words: Sequence[tuple[str, ...]] = ()


def bank_rank(method: FusionMethod, rank: int, rule: WeightRule, common: bool, user_rank: int) -> int:
    """The rank that vLLM's slots are sized for: the largest fusion plus the room for user adapters.

    Raises:
        BankError: when vLLM has no slots that large.
    """
    try:
        return serving_rank(fused_rank(method, rank, rule.anchors, common) + user_rank)
    except ValueError as error:
        raise BankError(str(error)) from error


def write_bank(out: Path, parts: BankParts) -> BankManifest:
    """Write the artifact, the manifest last, so that a folder with a manifest is complete.

    Raises:
        BankError: when the folder cannot be written.
    """
    from adapters.matrix import write_matrix

    rank = bank_rank(parts.method, parts.layout.rank, parts.weights, parts.common, parts.user_rank)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MANIFEST_FILE).unlink(missing_ok=True)  # from here on the folder is not a bank
        with _replacing(out / MATRIX_FILE) as draft:
            write_matrix(draft, parts.layout, parts.rows, parts.shared_a)
        with _replacing(out / INDEX_FILE) as draft:
            AnchorIndex.build(parts.embeddings).save(draft)
        with _replacing(out / MAP_FILE) as draft:
            Atlas.of(parts.embeddings).save(draft)
        files = [INDEX_FILE, MAP_FILE, MATRIX_FILE]
        if parts.curvature is not None:
            with _replacing(out / CURVATURE_FILE) as draft, draft.open("wb") as file:
                np.save(file, np.asarray(parts.curvature, np.float64))
            files.append(CURVATURE_FILE)
        manifest = BankManifest(
            task=parts.task,
            base_model=parts.base_model,
            embedder=parts.embedder,
            method=parts.method,
            common=parts.common,
            rank=parts.layout.rank,
            user_rank=parts.user_rank,
            serving_rank=rank,
            weights=parts.weights,
            target_modules=tuple(sorted({m.name.rsplit(".", 1)[-1] for m in parts.layout.modules})),
            modules=tuple(ModuleEntry(name=m.name, h_in=m.h_in, h_out=m.h_out) for m in parts.layout.modules),
            anchors=tuple(
                AnchorEntry(id=anchor_id(i), items=n, words=words)
                for i, (n, words) in enumerate(zip(parts.items, parts.words or [()] * len(parts.items), strict=True))
            ),
            prior=parts.prior,
            training=parts.training,
            files={name: file_sha256(out / name) for name in files},
        )
        return write_manifest(out, manifest)
    except OSError as error:
        raise BankError(f"cannot write the bank to {out}: {error}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A draft that is renamed to `path`: an engine that has the old file mapped keeps it intact."""
    draft = path.with_name(f"{path.name}.tmp")
    yield draft
    draft.chmod(0o644)  # safetensors lets only the owner read
    draft.replace(path)
