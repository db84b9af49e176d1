"""A user who moves from the key by one secret to the key by another (fixtures: `tests/contract/conftest.py`)."""

from __future__ import annotations

from server.store.tallies import Cell
from server.store.tenants.user_key import User, UserKeys
from tests.support.store_parts import SECRET, TENANT, StoreParts, change

SECRETS = f"the secret that comes after it,{SECRET}"
BOTH = UserKeys(SECRETS, TENANT)
CELL = Cell(2961, 0, "merged", "full")
WORDS = "words of a person"
MOVE_WRITES = 5  # leave, arrive, add to the bank's set (two), clear


async def put(parts: StoreParts, user: User, name: str, epoch: str) -> str:
    """Add an item at the user's key, and return the key."""
    snapshot = await parts.profiles.read(user.key)
    before = snapshot.profile
    added = change(name, user_id=user.id, adapter=before and before.adapter)
    assert await parts.profiles.commit(user.key, snapshot.version, added, epoch)
    return user.key
