"""The engine ids of recipes: bounded in number, and never changed while anything may still ask for them.

vLLM compares adapters by name but tracks them by integer id, so one name under two ids in one batch is fatal. A name
therefore keeps its id while it is leased (an HTTP request that named it is open) or in flight (the engine still holds
such a request). Of the others, the least recently used are evicted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Set
from typing import Any, Generic, TypeVar

MAX_ID = 2**31 - 1
"""vLLM's kernels index adapters by int32."""

Entry = TypeVar("Entry", bound=Any)  # vLLM's LoRARequest: what it knows an adapter by, with a `lora_int_id`


class AdapterNames(Generic[Entry]):
    """The names an engine knows, least recently used first.

    Nothing else writes `entries`, in which vLLM looks names up. `capacity` counts the names kept when idle; those that
    are leased or `in_flight` come on top.
    """

    def __init__(
        self,
        entries: dict[str, Entry],
        make: Callable[[str, int], Entry],
        *,
        capacity: int,
        in_flight: Callable[[], Set[str]],
        first_id: int = 1,
    ) -> None:
        self._entries = entries
        self._make = make
        self._capacity = capacity
        self.in_flight = in_flight
        self._leases: Counter[str] = Counter()
        self._ids: set[int] = set()
        self._next_id = first_id
        self.shared = 0
        """Leases of a name that another open request held already."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def leased(self) -> int:
        return len(self._leases)

    @property
    def in_use(self) -> Set[str]:
        """Names that an open request holds, or that are in flight."""
        return self.in_flight() | self._leases.keys()

    def lease(self, name: str) -> Entry:
        """Return the entry of a name and keep it until `release`; release each lease once."""
        entry = self._entries.pop(name, None)
        if entry is None:
            entry = self._make(name, self._new_id())
            self._ids.add(entry.lora_int_id)
        self._entries[name] = entry  # now the most recently used
        self.shared += name in self._leases
        self._leases[name] += 1
        if len(self._entries) > self._capacity:
            self._evict()
        return entry

    def release(self, name: str) -> None:
        self._leases[name] -= 1
        if self._leases[name] <= 0:
            del self._leases[name]

    def _evict(self) -> None:
        """Drop the least recently used names that nobody holds, an eighth of the capacity at a time.

        Finding what is in flight costs a pass over the engine's requests; evicting in batches makes that rare.
        """
        held = self.in_use
        surplus = len(self._entries) - self._capacity + self._capacity // 8
        for name in [name for name in self._entries if name not in held][:surplus]:
            self._ids.discard(self._entries.pop(name).lora_int_id)

    def _new_id(self) -> int:
        """The next free id; after MAX_ID they start over at 1."""
        while self._next_id in self._ids:
            self._next_id = self._next_id % MAX_ID + 1
        new = self._next_id
        self._next_id = new % MAX_ID + 1
        return new
