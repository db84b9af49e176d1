"""What commands share: options, the set-up of their process, and access to the store."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import SecretStr
from rich.console import Console

from adapters.errors import MtaError
from server.observability.audit import audit_to
from server.settings import Settings, load_settings

if TYPE_CHECKING:
    from server.store.opening import Stores  # commands start without redis-py

T = TypeVar("T")

MOST_DAYS = 36_500  # far beyond, times have no date any more


def setting(name: str, *flags: str, about: str | None = None, **more: Any) -> Any:
    """Return the option of a setting; if it is not given, the setting's variable or default applies."""
    about = about or Settings.model_fields[name].description
    return typer.Option(*flags, help=about, show_default=f"MTA_{name.upper()}", **more)


Bank = Annotated[Path | None, setting("bank")]
Model = Annotated[str | None, setting("model")]
Embedder = Annotated[Path | None, setting("embedder")]
Data = Annotated[Path | None, setting("data_dir", about="Data folder of `mta up`.")]
RedisUrl = Annotated[str | None, setting("redis_url", about="URL of Redis or Valkey.")]


def table_console() -> Console:
    """Return a console for tables, which are not cut where there is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)


def prepare_to_train(threads: int | None = None, *, gpu: bool = True) -> None:
    """Set the number of torch threads, and whether torch sees a GPU; call this before torch is imported."""
    # Threads spin briefly at each barrier and then sleep: endless spinning, the default, makes training many times
    # slower on a busy machine, and no spinning halves the speed on an idle one.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def end_on_signals() -> None:
    """Let SIGINT and SIGTERM end the process at once until its event loop takes over; nothing needs closing before."""
    # The kernel keeps the default action from process 1 of a container, and the interpreter can swallow an exception.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))


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
