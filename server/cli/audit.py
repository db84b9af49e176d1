"""`mta audit`: search an audit log."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.table import Table

from server.cli.shared import table_console
from server.observability.audit import Act, read_audit
from server.settings import load_settings
from server.store.tenants.user_key import UserKeys
from server.supervisor.data_folder import AUDIT_LOG

_COLUMNS = ("time", "act", "outcome", "tenant", "key", "user", "of_key", "bank", "quota", "copy", "request")


def audit(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Audit logs, oldest first.", show_default="MTA_AUDIT, or that of `mta up`"),
    ] = None,
    act: Annotated[Act | None, typer.Option(help="Only this act.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only acts of this tenant.")] = None,
    key: Annotated[str | None, typer.Option(help="Only acts of the API key with this id, or `cli`.")] = None,
    user: Annotated[
        str | None, typer.Option(help="Only acts on this user id; of the tenant in --tenant, or MTA_TENANT.")
    ] = None,
    since: Annotated[
        datetime | None, typer.Option(help="Only acts from this time on, UTC.", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M"])
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON lines.")] = False,
) -> None:
    """Show who erased, exported, and managed keys, from the files that MTA_AUDIT names on each machine.

    The log has users' keys instead of their ids; to find a user, MTA_SECRET must be the gateways', and
    `NEW,OLD` for what happened before it was exchanged.
    """
    settings = load_settings()
    files = files or [settings.audit or settings.data_dir / AUDIT_LOG]
    wanted = {"act": act and act.value, "tenant": tenant, "key": key}
    sought: dict[str, tuple[str, ...]] = {name: (value,) for name, value in wanted.items() if value is not None}
    if user is not None:
        sought["user"] = UserKeys(settings.user_secret, tenant or settings.tenant).keys(user)
    from_time = since and since.replace(tzinfo=UTC)
    entries = [entry for file in files for entry in read_audit(file.expanduser(), sought, from_time)]
    if json:
        for entry in entries:
            typer.echo(orjson.dumps(entry))
        return
    columns = [name for name in _COLUMNS if any(name in entry for entry in entries)]
    table = Table(*columns, pad_edge=False)
    for entry in entries:
        table.add_row(*(entry.get(name, "") for name in columns))
    table_console().print(table if entries else "no entry matches")
