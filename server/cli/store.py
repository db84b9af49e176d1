"""Access to the store for commands: that of a running `mta up`, or the one that the settings name."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import SecretStr

from adapters.errors import MtaError
from server.settings import Settings, load_settings
from server.watching.audit import audit_to

if TYPE_CHECKING:
    from server.store.opening import Stores  # commands start without redis-py

T = TypeVar("T")


def store_settings(data: Path | None) -> Settings:
    """Load the settings; without another store, use that of a running `mta up`, its secret and its audit log."""
    from server.supervisor.data_folder import AUDIT_LOG
    from server.supervisor.services import valkey_url

    settings = load_settings(data_dir=data)
    if data is None and "redis_url" in settings.model_fields_set:
        audit_to(settings.audit)
        return settings
    folder = settings.data_dir.expanduser()
    try:
        url = valkey_url(folder)
        if url is None:
            remedy = "set its folder with --data, or the store with MTA_REDIS_URL"
            raise MtaError(f"no `mta up` runs in {settings.data_dir}: {remedy}")
        secret = settings.secret or SecretStr((folder / "secret").read_text("ascii").strip())
    except OSError as error:
        raise MtaError(f"cannot read {error.filename}: {error.strerror}. Be the user who runs `mta up`") from error
    audit_to(settings.audit or folder / AUDIT_LOG)
    return settings.model_copy(update={"redis_url": url, "secret": secret})


def with_stores(settings: Settings, command: Callable[[Stores], Awaitable[T]], *, checked: bool = True) -> T:
    from server.errors import Unavailable
    from server.store.opening import open_stores

    async def run() -> T:
        async with open_stores(settings, checked=checked) as stores:
            return await command(stores)

    try:
        return asyncio.run(run())
    except Unavailable as error:
        raise MtaError(f"{error.explained}. Check that `mta up` is running or that MTA_REDIS_URL is correct") from error
