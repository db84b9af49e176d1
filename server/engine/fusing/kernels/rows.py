"""Which rows of a step have which adapter, and what the slots hold: the kernels' only metadata."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

UNKNOWN_RANK = 1 << 16
"""As many ranks as the slot has."""


class SlotTable:
    """What the kernels know of each slot besides its weights.

    Attributes:
        ranks: of each slot's tenant [S] int32, or `UNKNOWN_RANK`.
        a_slots: for each slot, the first one that holds the same A [S] int32.
    """

    def __init__(self, slots: int) -> None:
        self.ranks = np.full(slots, UNKNOWN_RANK, np.int32)
        self.a_slots = np.arange(slots, dtype=np.int32)
        self._a: list[Hashable] = list(range(slots))

    def note(self, slot: int, rank: int = UNKNOWN_RANK, a: Hashable = None) -> None:
        """Note a slot's new tenant.

        Args:
            slot: its index.
            rank: the tenant's.
            a: equal for tenants that have the same A in every module; None for one that shares its A with nobody.
        """
        self.ranks[slot] = rank
        self._a[slot] = slot if a is None else a
        first: dict[Hashable, int] = {}
        self.a_slots[:] = [first.setdefault(of, index) for index, of in enumerate(self._a)]


@dataclass(frozen=True)  # no slots: `groups` is cached
class Rows:
    """The rows of a step that have an adapter, sorted by slot.

    Attributes:
        places: their indices among all rows [n] int32.
        slots: the slot that holds their adapter [n] int32.
        a_slots: a slot that holds their adapter's A, the same for all adapters that share it [n] int32.
        ranks: the adapter's rank [n] int32.
    """

    places: torch.Tensor
    slots: torch.Tensor
    a_slots: torch.Tensor
    ranks: torch.Tensor

    @classmethod
    def among(cls, slots: torch.Tensor, table: SlotTable) -> Rows:
        """Pick and sort them.

        Args:
            slots: of all rows [N]; -1 is no adapter.
            table: what the slots hold.
        """
        of_all = slots.numpy(force=True)
        places = np.flatnonzero(of_all >= 0)
        places = places[np.argsort(of_all[places], kind="stable")]
        of = of_all[places]
        parts = (places.astype(np.int32), of.astype(np.int32), table.a_slots[of], table.ranks[of])
        return cls(*(torch.from_numpy(part) for part in parts))

    @classmethod
    def none(cls) -> Rows:
        """No row has an adapter."""
        empty = torch.empty(0, dtype=torch.int32)
        return cls(empty, empty, empty, empty)

    def __bool__(self) -> bool:
        return len(self.slots) > 0

    @cached_property
    def groups(self) -> list[tuple[int, int, torch.Tensor]]:
        """Each adapter of the step: its slot, its rank, the indices of its rows [m] int64; found once a step."""
        slots, counts = torch.unique_consecutive(self.slots, return_counts=True)
        ranks = self.ranks[counts.cumsum(0) - counts]
        places = torch.split(self.places.long(), counts.tolist())
        return list(zip(slots.tolist(), ranks.tolist(), places, strict=True))
