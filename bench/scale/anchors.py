"""Measure a bank of very many anchors: time of a topic lookup, and memory."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.progress import Progress

from bank.lookup.index import FLAT_LIMIT
from bank.lookup.serving import ServingBank
from bank.manifest import INDEX_FILE
from bench.page.report import Figures, percentile
from bench.rig.subject import tiny

DIM = 384
OPEN = """
import os, sys, faiss
from pathlib import Path
from bank.lookup.serving import ServingBank
from bank.manifest import read_manifest
from bench.rig.processes import memory_mib
before, folder = memory_mib(os.getpid()), Path(sys.argv[1])
bank = ServingBank.open(folder, read_manifest(folder).embedder.id)
print(memory_mib(os.getpid()) - before)
"""
"""A program that opens a bank and prints the memory that it takes, in MiB."""
COLUMNS = (
    "anchors",
    "index",
    "a lookup p50, ms",
    "p99, ms",
    "index on disk, MiB",
    "memory when open, MiB",
)


def measure(anchors: int, lookups: int, folder: Path, progress: Progress) -> Figures:
    """Return a table with rows for 50 anchors, for the limit of exact search, and for `anchors`."""
    counts = sorted({50, min(anchors, FLAT_LIMIT), anchors})
    lines = [_line(count, lookups, folder, progress) for count in counts]
    title = f"Anchors by topic, {DIM} numbers each: from a profile to its recipe"
    return Figures(title, COLUMNS, lines)


def _line(anchors: int, lookups: int, folder: Path, progress: Progress) -> list[object]:
    numbers = np.random.default_rng(0)
    vectors = numbers.standard_normal((anchors, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    subject = tiny(folder / str(anchors), anchors=anchors, embeddings=vectors)
    opened = float(subprocess.check_output([sys.executable, "-c", OPEN, str(subject.bank)]))
    bank = ServingBank.open(subject.bank, subject.manifest.embedder.id)
    profiles = vectors[numbers.integers(anchors, size=lookups)] + 0.02 * numbers.standard_normal((lookups, DIM))
    profiles /= np.linalg.norm(profiles, axis=1, keepdims=True)
    taken = []
    for profile in progress.track(profiles.astype(np.float32), description=f"lookups among {anchors} anchors"):
        start_s = time.perf_counter()
        bank.personalise(profile)
        taken.append((time.perf_counter() - start_s) * 1000)
    size = (subject.bank / INDEX_FILE).stat().st_size / 2**20
    return [anchors, bank.index.kind, percentile(taken, 0.5), percentile(taken, 0.99), size, opened]
