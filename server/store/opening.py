"""The only place that knows which store is used: every process opens its stores here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass

from server.settings import Settings
from server.store.adapters import AdapterStore
from server.store.durability import CheckedStore, ForgetsOnDisk, Span, Timed, untimed
from server.store.jobs import JobStore
from server.store.profiles import ProfileStore
from server.store.redis.access.api_keys import RedisAccessKeys
from server.store.redis.access.rates import RedisRates
from server.store.redis.adapters import RedisAdapters
from server.store.redis.jobs import RedisJobs
from server.store.redis.profiles import RedisProfiles
from server.store.redis.servers.append_only_file import AppendOnlyFile
from server.store.redis.servers.connection import RedisConnection
from server.store.redis.signing import RedisSigning
from server.store.signing import SignQueue
from server.store.tenants.access_keys import AccessKeys
from server.store.tenants.rates import Rates


@dataclass(frozen=True, slots=True)
class Stores:
    """The stores of one process, all on the same server.

    Attributes:
        server: says whether the stores can be used.
        keys: API keys.
        rates: what limits count.
        profiles, jobs, adapters: what is kept about users.
        signing: the queue of users who need a signature for a bank, by the bank's 8 hex digits.
        file: what the server writes to disk.
    """

    server: CheckedStore
    keys: AccessKeys
    rates: Rates
    profiles: ProfileStore
    jobs: JobStore
    adapters: AdapterStore
    signing: Callable[[str], SignQueue]
    file: ForgetsOnDisk


@asynccontextmanager
async def open_stores(
    settings: Settings, *, checked: bool = True, timed: Timed = untimed, span: Span = nullcontext
) -> AsyncIterator[Stores]:
    """The stores that the settings name, for the duration of a `with` block.

    Args:
        settings: the process's.
        checked: whether the server must be reachable, and durable if the settings require it. Otherwise a process
            starts while the store is down, and must write nothing that has to last.
        timed: gets what every call took.
        span: what a write is in a trace.

    Raises:
        MtaError: when the URL cannot be read.
        Unavailable: when a checked server cannot be reached or is not durable.
    """
    must_last = checked and settings.require_durable_store
    connection = RedisConnection(settings.redis_url, require_durable=must_last, timed=timed, span=span)
    try:
        if checked:
            await connection.check()
        yield Stores(
            server=connection,
            keys=RedisAccessKeys(connection),
            rates=RedisRates(connection),
            profiles=RedisProfiles(connection),
            jobs=RedisJobs(connection),
            adapters=RedisAdapters(connection),
            signing=lambda bank: RedisSigning(connection, bank),
            file=AppendOnlyFile(connection),
        )
    finally:
        await connection.close()
