"""`mta bank remove`: make a bank without one of its anchors, from the rows that are kept beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from adapters.errors import excerpt
from bank.building.assemble import Anchors, BankRows, Basis, Rules, write_bank
from bank.building.directions import make_directions
from bank.errors import BankError
from bank.lookup.index import AnchorIndex
from bank.lookup.signature import Curvature
from bank.manifest import (
    COORDINATES_FILE,
    CURVATURE_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    BankManifest,
    PosteriorRule,
    read_manifest,
    verify_files,
    write_manifest,
)
from bank.matrix import open_anchor_rows


def remove_anchor(folder: Path, anchor: str, out: Path) -> BankManifest:
    """Write the bank in `folder` to `out` without one anchor; the ids of the anchors after it move down by one.

    Nothing is trained: the common row still knows what it learnt from that person. BankError if it is the only anchor.
    """
    manifest = read_manifest(folder)
    if (out / MANIFEST_FILE).exists():
        raise BankError(f"{out} already holds a bank: choose another --out")
    kept = [i for i, entry in enumerate(manifest.anchors) if entry.id != anchor]
    if not kept or len(kept) == len(manifest.anchors):
        ids = f"{manifest.anchors[0].id} to {manifest.anchors[-1].id}"
        why = f"has no anchor {excerpt(anchor)}" if kept else f"has no other anchor than {anchor}"
        raise BankError(f"the bank at {folder} {why}; its anchors are {ids}")
    verify_files(folder, manifest, tuple(manifest.files.keys() - {manifest.anchor_rows_file}))
    matrix = open_anchor_rows(folder, manifest)
    curvature, directions, weights = None, None, manifest.weights
    if weights.posterior:
        curvature = np.load(folder / CURVATURE_FILE)
        if manifest.directions:
            coordinates = np.load(folder / COORDINATES_FILE).astype(np.float64)
            deviation = float(np.sqrt(manifest.directions / np.square(coordinates).sum()))
            curvature = coordinates[kept] @ curvature @ coordinates[kept].T
            count = min(manifest.directions, len(kept))
            directions = make_directions(Curvature.of(curvature), count, deviation)
            rule = directions.rule
        else:
            prior = weights.posterior.decay * np.diagonal(curvature).mean()
            curvature = curvature[kept][:, kept]
            rule = PosteriorRule(decay=float(prior / np.diagonal(curvature).mean()))
        weights = weights.model_copy(update={"posterior": rule})
    rows = [matrix.rows[i] for i in (*kept, *range(len(manifest.anchors), len(matrix.rows)))]
    weights = weights.model_copy(update={"anchors": min(weights.anchors, len(kept))})
    written = write_bank(
        out,
        Basis.of(manifest),
        BankRows(manifest.layout, rows, matrix.shared_a, manifest.common, directions),
        Anchors(
            AnchorIndex.load(folder / INDEX_FILE).vectors(kept),
            [manifest.anchors[i].items for i in kept],
            [manifest.anchors[i].words for i in kept],
        ),
        Rules(weights, curvature, manifest.prior, manifest.phrases),
        training={**manifest.training, "inputs": None, "removed_from": manifest.fingerprint},
    )
    return write_manifest(out, written.model_copy(update={"verdict": manifest.verdict}))
