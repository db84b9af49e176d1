"""`mta keys`: manage API keys in the store, which every gateway reloads within five seconds."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from adapters.errors import MtaError, excerpt
from server.cli.shared import MOST_DAYS, Data, setting, store_settings, table_console, with_stores
from server.observability.audit import Act, note
from server.store.tenants import access_keys
from server.store.tenants.access_keys import CREATE, AccessKey, KeyRing, Policy, Scope
from server.store.tenants.rates import Allowance, Quota

if TYPE_CHECKING:
    from server.store.opening import Stores  # commands start without redis-py

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
MOST = 10**15  # which the store's numbers hold exactly

app = typer.Typer(help="Keys for a gateway's HTTP API; each belongs to a tenant.", no_args_is_help=True)


def _parse_amount(text: str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,12})?)([KMGT]?)", text.upper())
    amount = round(float(match[1]) * 1000.0 ** " KMGT".index(match[2] or " ")) if match else MOST + 1
    if amount > MOST:
        raise typer.BadParameter(
            f"{text!r} is not an amount: write a number up to {MOST:,}, or one with k, M, G or T, such as 2.5G"
        )
    return amount


def _amount(about: str, *flags: str) -> Any:
    return typer.Option(*flags, help=about, parser=_parse_amount, metavar="N", show_default="as is")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Name of the key, for example the app that uses it.")],
    tenant: Annotated[str | None, setting("tenant", about="Tenant of the key's users.")] = None,
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="Allowed operations; may be repeated.", show_default="generate, write, adapt; --first: all"),
    ] = None,
    requests: Annotated[int | None, setting("key_requests", min=0, max=MOST)] = None,
    tokens: Annotated[int | None, setting("key_tokens", min=0, max=MOST)] = None,
    concurrent: Annotated[int | None, setting("key_concurrent", min=0, max=MOST)] = None,
    jobs: Annotated[int | None, setting("key_jobs", min=0, max=MOST)] = None,
    learn: Annotated[
        bool, typer.Option("--learn", help="Learn from users' messages, unless a request says otherwise.")
    ] = False,
    history: Annotated[
        bool,
        typer.Option(
            "--history", help="Add past items to OpenAI's conversations too, unless a request says otherwise."
        ),
    ] = False,
    holdout: Annotated[float | None, setting("holdout", min=0, max=0.5)] = None,
    refresh: Annotated[int | None, setting("refresh_samples", min=0, max=MOST)] = None,
    keep_texts: Annotated[bool | None, setting("keep_texts", "--keep-texts/--no-keep-texts")] = None,
    days: Annotated[
        int | None, typer.Option(help="Days until the key expires.", show_default="never", min=1, max=MOST_DAYS)
    ] = None,
    remark: Annotated[str, typer.Option("--note", help="What the key is for, or whose it is.")] = "",
    first: Annotated[bool, typer.Option("--first", help="Create the key only if the store never had one.")] = False,
    given: Annotated[bool, typer.Option("--given", help="Store MTA_FIRST_KEY, if set; do not print it.")] = False,
    data: Data = None,
) -> None:
    """Create a key and print it once; only its SHA-256 is stored.

    After the first key, gateways refuse requests without a key.
    """
    settings = store_settings(data)
    supplied = settings.first_key.get_secret_value() if given and settings.first_key else ""
    if given and not supplied:
        typer.echo(f"MTA_FIRST_KEY is empty, so no key was stored: `{CREATE} {name} --first` creates one", err=True)
        return
    secret = access_keys.checked_secret(supplied) if given else access_keys.new_secret()
    owner = settings.tenant if tenant is None else tenant
    scopes = scope or (Scope if first else (Scope.GENERATE, Scope.WRITE, Scope.ADAPT))
    policy = Policy(Allowance(requests, tokens, jobs, concurrent), learn, history, refresh, holdout, keep_texts)
    key = access_keys.access_key(secret, name, owner, scopes, policy)
    expires_ms = None if days is None else key.created_ms + days * DAY_MS
    key = replace(key, expires_ms=expires_ms, note=access_keys.checked_note(remark))
    if not with_stores(settings, lambda stores: stores.keys.add(key, only_first=first)):
        typer.echo(f"the store has had a key before, so none was created: `{CREATE} NAME` creates another", err=True)
        return
    note(Act.KEY_CREATED, "done", key="cli", tenant=key.tenant, of_key=key.id)
    if given:
        said = f"the key in MTA_FIRST_KEY is stored as {key.id} ({name}, tenant {key.tenant})"
    else:
        typer.echo(secret)
        said = (
            f"key {key.id} ({name}, tenant {key.tenant}: {', '.join(sorted(key.scopes))}) is valid within 5 s. It is "
            "shown only once. Send it as `Authorization: Bearer KEY`; `mta` commands take it from MTA_API_KEY"
        )
    typer.echo(said, err=True)


@app.command("list")
def list_(data: Data = None) -> None:
    """List all keys, including revoked ones, without their secrets."""
    names = ("ends in", "name", "tenant", "bank", "quotas", "scopes", "limits")
    when = ("made", "last used", "expires", "revoked")
    table = Table(Column("id", no_wrap=True), *names, *when, "note", pad_edge=False)

    async def read(stores: Stores) -> tuple[KeyRing, dict[str, int], dict[str, str]]:
        ring = await stores.keys.all()
        quotas = {tenant: await _used(stores, tenant, quota) for tenant, quota in ring.quotas.items()}
        return ring, await stores.keys.used(), quotas

    ring, used, quotas = with_stores(store_settings(data), read)
    for key in ring.keys:
        scopes, bank = ", ".join(sorted(key.scopes)), ring.banks.get(key.tenant, "")
        limits = ", ".join(f"{what} {most or 'any'}" for what, most in key.policy.allowance.overrides.items())
        used_ms = used[key.digest] * HOUR_MS if key.digest in used else None
        times = map(_date, (key.created_ms, used_ms, key.expires_ms, key.revoked_ms))
        quota = quotas.get(key.tenant, "")
        table.add_row(key.id, key.last, key.name, key.tenant, bank, quota, scopes, limits, *times, key.note)
    table_console().print(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="Id from `mta keys list`.", metavar="ID")], data: Data = None
) -> None:
    """Revoke a key; gateways refuse it within five seconds."""

    async def find_and_revoke(stores: Stores) -> tuple[AccessKey, bool]:
        for key in (await stores.keys.all()).keys:
            if key.id == key_id:
                return key, await stores.keys.revoke(key.digest, time.time_ns() // 1_000_000)
        raise MtaError(f"no key has the id {excerpt(key_id)}: `mta keys list` lists all")

    key, was_valid = with_stores(store_settings(data), find_and_revoke)
    # Also if it was revoked before: that command may have failed after the store had done it, and left no line.
    note(Act.KEY_REVOKED, "done", key="cli", tenant=key.tenant, of_key=key.id)
    typer.echo(f"key {key.id} ({key.name}) " + ("is refused within 5 s" if was_valid else "was revoked before"))


@app.command()
def bank(
    tenant: Annotated[str, typer.Argument(help="A tenant that has keys.")],
    bank: Annotated[
        str | None, typer.Argument(help="The bank's 8 hex digits (`mta bank info`).", show_default="gateways' MTA_BANK")
    ] = None,
    data: Data = None,
) -> None:
    """Choose the bank that serves a tenant's users: MTA_BANK or MTA_NEXT_BANK of gateways and engines.

    Users' adapters belong to a bank, so `mta readapt` must retrain them for the new one.
    """
    if bank is not None and not re.fullmatch(r"[0-9a-f]{8}", bank):
        raise MtaError(f"the name of a bank has 8 hex digits, got {excerpt(bank)}: `mta bank info FOLDER` shows them")

    async def name_bank(stores: Stores) -> None:
        _check_tenant(tenant, await stores.keys.all())
        await stores.keys.set_bank(tenant, bank or "")

    with_stores(store_settings(data), name_bank)
    note(Act.BANK_CHOSEN, "done", key="cli", tenant=tenant, bank=bank or "")
    typer.echo(f"tenant {tenant} is served by {f'the bank {bank}' if bank else 'the gateways’ own bank'} within 5 s")


@app.command()
def quota(
    tenant: Annotated[str, typer.Argument(help="A tenant that has keys.")],
    people: Annotated[int | None, _amount("Users with a profile.")] = None,
    size_bytes: Annotated[int | None, _amount("Memory of their data in the store.", "--bytes")] = None,
    adapters: Annotated[int | None, _amount("Users with an adapter of their own, or a job that trains one.")] = None,
    tokens: Annotated[int | None, _amount("Prompt and answer, over all keys.", "--tokens-per-day")] = None,
    data: Data = None,
) -> None:
    """Set quotas of a tenant, and show what it has used of them.

    N may end in k, M, G or T, powers of 1,000; 0 removes a quota. Requests beyond one get 403 `quota_exceeded`; what is
    stored stays, and erasing users makes room.
    """
    given = Quota(people, size_bytes, adapters, tokens).limits

    async def set_and_read(stores: Stores) -> str:
        ring = await stores.keys.all()
        _check_tenant(tenant, ring)
        changed = replace(ring.quotas.get(tenant, Quota()), **{name: most or None for name, most in given.items()})
        if given:
            await stores.keys.set_quota(tenant, changed)
        return await _used(stores, tenant, changed)

    used = with_stores(store_settings(data), set_and_read)
    if given:
        note(Act.QUOTA_SET, "done", key="cli", tenant=tenant, quota=", ".join(f"{a} {b}" for a, b in given.items()))
    told = f"has used {used}" if used else "has no quota"
    typer.echo(f"tenant {tenant} {told}" + (": this holds within 5 s" if given else ""))


async def _used(stores: Stores, tenant: str, quota: Quota) -> str:
    used = await stores.holdings.count(tenant, quota)
    return ", ".join(f"{used[what]:,} of {most:,} {what}" for what, most in quota.limits.items())


def _check_tenant(tenant: str, ring: KeyRing) -> None:
    tenants = sorted({key.tenant for key in ring.keys})
    if tenant not in tenants:
        raise MtaError(f"no key belongs to the tenant {excerpt(tenant)}, only to {', '.join(tenants) or 'none'}")


def _date(ms: int | None) -> str:
    return "" if ms is None else datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
