"""Opens the stores of a process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, nullcontext
from functools import partial

from server.settings import Settings
from server.store.adapters import AdapterStore
from server.store.append_only_file import AppendOnlyFile
from server.store.backup.copying import StoreCopying
from server.store.durability import CheckedStore
from server.store.feedback import FeedbackStore
from server.store.figures import read_figures
from server.store.jobs import JobStore
from server.store.profiles import ProfileStore
from server.store.queue import UserQueue
from server.store.redis.servers.connection import RedisConnection, Span, Timed, untimed
from server.store.rotation import Rotation
from server.store.tallies import TallyStore
from server.store.tenants.access_keys import AccessKeys
from server.store.tenants.holdings import HoldingStore
from server.store.tenants.rates import Rates


class Stores:
    """The stores of one process, all on the same server; `secret` is MTA_SECRET."""

    def __init__(self, connection: RedisConnection, secret: str | None) -> None:
        self.server: CheckedStore = connection
        self.keys = AccessKeys(connection)
        self.rates = Rates(connection)
        self.holdings = HoldingStore(connection)
        self.profiles = ProfileStore(connection)
        self.jobs = JobStore(connection)
        self.feedback = FeedbackStore(connection)
        self.tallies = TallyStore(connection)
        self.adapters = AdapterStore(connection)
        self.signing = partial(UserQueue, connection, "sign")  # by a bank's 8 hex digits
        self.file = AppendOnlyFile(connection)
        self.figures = partial(read_figures, connection)
        self.copying = StoreCopying(connection)
        self.rotation = Rotation(connection, secret)

    async def leave_shared_keys(self, user_key: str, tenant: str, banks: Iterable[str] = ()) -> None:
        """Remove an erased user from the sets and queues of these banks, and of all banks that were used so far."""
        await self.adapters.remove_adapted(user_key)
        await self.tallies.remove_erased(user_key, tenant)
        for bank in {*banks, *await self.adapters.banks()}:
            await self.jobs.remove_erased(user_key, bank)
            await self.signing(bank).remove_erased(user_key)


@asynccontextmanager
async def open_stores(
    settings: Settings, *, checked: bool = True, timed: Timed = untimed, span: Span = nullcontext
) -> AsyncIterator[Stores]:
    """Open the configured stores for the duration of a `with` block.

    Raises `MtaError` if the URL is invalid, and `Unavailable` if the server cannot be reached or is not durable. With
    `checked=False` the server is not checked, and the process must not make writes that need to be durable.
    """
    must_last = checked and settings.require_durable_store
    connection = RedisConnection(settings.redis_url, require_durable=must_last, timed=timed, span=span)
    try:
        if checked:
            await connection.check()
        yield Stores(connection, settings.user_secret)
    finally:
        await connection.close()
