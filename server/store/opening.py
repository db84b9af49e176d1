"""Opens the stores of a process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from server.settings import Settings
from server.store.adapters import AdapterStore
from server.store.append_only_file import AppendOnlyFile
from server.store.backup.copying import StoreCopying
from server.store.durability import CheckedStore
from server.store.feedback import FeedbackStore
from server.store.figures import ServerFigures, read_figures
from server.store.jobs import JobStore
from server.store.profiles import ProfileStore
from server.store.queue import UserQueue
from server.store.redis.servers.connection import RedisConnection, Span, Timed, untimed
from server.store.rotation import Rotation
from server.store.tenants.access_keys import AccessKeys
from server.store.tenants.holdings import HoldingStore
from server.store.tenants.rates import Rates
from server.store.worth import WorthStore


@dataclass(frozen=True, slots=True)
class Stores:
    """The stores of one process, all on the same server. `signing` takes a bank's 8 hex digits."""

    server: CheckedStore
    keys: AccessKeys
    rates: Rates
    holdings: HoldingStore
    profiles: ProfileStore
    jobs: JobStore
    feedback: FeedbackStore
    worth: WorthStore
    adapters: AdapterStore
    signing: Callable[[str], UserQueue]
    file: AppendOnlyFile
    figures: Callable[[], Awaitable[list[ServerFigures]]]
    copying: StoreCopying
    rotation: Rotation


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
        yield Stores(
            server=connection,
            keys=AccessKeys(connection),
            rates=Rates(connection),
            holdings=HoldingStore(connection),
            profiles=ProfileStore(connection),
            jobs=JobStore(connection),
            feedback=FeedbackStore(connection),
            worth=WorthStore(connection),
            adapters=AdapterStore(connection),
            signing=lambda bank: UserQueue(connection, "sign", bank),
            file=AppendOnlyFile(connection),
            figures=partial(read_figures, connection),
            copying=StoreCopying(connection),
            rotation=Rotation(connection, settings.user_secret),
        )
    finally:
        await connection.close()
