"""How many adapter slots an engine on CPU has, unless it is told: as many as fit a share of the memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bank.manifest import BankManifest

SHARE = 16
"""Slots take at most one part in so many of the memory that this process may use."""

FEWEST, MOST = 8, 64
"""On CPU; beyond `MOST` a batch has fewer requests than there are slots."""

VIEWS, VIEW_BYTES = 9, 600
"""Of each module and slot: the tensors by which a plain and a stacked adapter are written (`fusing/cells.py`)."""

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container's limit stands, in the two versions of control groups."""


def slots_on_cpu(manifests: Sequence[BankManifest], number_bytes: int) -> int:
    """As many slots as fit a share of the memory, within bounds.

    Args:
        manifests: of all banks the engine serves.
        number_bytes: of one number of an adapter.
    """
    fit = memory_bytes() // SHARE // max(1, slot_bytes(manifests, number_bytes))
    return max(FEWEST, min(MOST, fit))


def slot_bytes(manifests: Sequence[BankManifest], number_bytes: int) -> int:
    """Bytes of one slot: A and B of every module that any bank adapts, at the highest serving rank, and their views."""
    rank = max(manifest.serving_rank for manifest in manifests)
    widths = {m.name: m.h_in + m.h_out for manifest in manifests for m in manifest.modules}
    return rank * sum(widths.values()) * number_bytes + len(widths) * VIEWS * VIEW_BYTES


def memory_bytes(limits: Sequence[Path] = LIMITS) -> int:
    """The memory that this process may use: the machine's, or a container's limit below it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in limits:
        text = path.read_text().strip() if path.is_file() else ""
        memory = min(memory, int(text)) if text.isdigit() else memory
    return memory
