"""`/users/{user_id}`: write, read, export and erase a user's data."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal, Self

import orjson
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel, Field
from starlette.responses import StreamingResponse

from adapters.errors import excerpt
from adapters.recipe import bank_of, parse_recipe
from bank.errors import ProfileError
from bank.items.profile import Item, item_pair, item_text, parse_item, untaught
from bank.items.tasks import Task
from bank.lookup.phrases import decode_phrases
from server.errors import InvalidRequest, NotFound
from server.gateway.access.keys import caller_name_of
from server.gateway.generation.personalizer import FORGOTTEN
from server.gateway.operating.middleware import notes_of
from server.gateway.parts import Parts, call_of
from server.gateway.routes.answering import AnchorAnswer, anchor_answers
from server.gateway.routes.jobs import JobAnswer, iso
from server.gateway.routes.requests import Strict, UserIdInPath, UserRoute, epoch_of, with_examples
from server.gateway.users.histories import newest_items
from server.gateway.users.profiles import ProfileUpdate, check_size
from server.observability.audit import Act
from server.settings import MAX_INT32
from server.store.adapters import AdapterVersion
from server.store.jobs import Job
from server.store.profile_record import AdapterNote
from server.store.profiles import Erased
from server.store.tenants.user_key import User

MAX_ITEMS = 10_000
SHOWN_CHARS = 300  # of an item in the list
VersionInPath = Annotated[int, Path(ge=1, le=MAX_INT32, description="As `GET /users/{user_id}/adapters` lists it.")]
EXPORTS_AT_ONCE = 4  # of up to 60 MB, for which a gateway takes 160
Teaches = Literal["lesson", "topics", "too_short"]


class ItemsRequest(Strict):
    """Items of a user's history, oldest first."""

    model_config = with_examples(
        {"items": [{"text": "Up at five for the waves again."}, {"text": "Wax on, wetsuit on, gone."}]},
        {"items": [{"id": "n1", "input": "Any plans?", "output": "The sea. Always the sea."}]},
    )

    items: list[dict[str, Any]] = Field(
        fail_fast=True,  # otherwise millions of invalid items would produce millions of errors
        min_length=1,
        max_length=MAX_ITEMS,
        description="Items of the bank's task, `{input, output}` pairs, or plain `{text}`. The default `id` is the "
        "hash of the content. Fields that the task does not use are ignored.",
    )


class ProfileAnswer(BaseModel, frozen=True):
    user_id: str
    received: int = Field(description="Number of items in the request.")
    kept: int = Field(description="Number of items in the profile now.")
    changed: int = Field(description="Number of items that are new or have new content; 0 for a repeated request.")
    recipe: str
    anchors: list[AnchorAnswer]
    hint: str | None = Field(description="Why some of the items teach nothing but topics; null if all teach more.")
    removed: int = Field(description="Number of earlier items that are gone: not in a PUT, or beyond the limit.")


class ItemAnswer(BaseModel, frozen=True):
    id: str
    text: str = Field(description="The beginning of what tells the item's topic, at most 300 characters.")
    teaches: Teaches = Field(
        description="`lesson`: the newest of these are what the user's weights are made from. `topics`: it tells "
        "topics alone. `too_short`: likewise, but a longer text would be a lesson."
    )
    reason: str | None = Field(description="Why it is no lesson, and what would be one.")

    @classmethod
    def of(cls, item: Item, task: Task) -> Self:
        text, pair = item_text(item, task), item_pair(item, task)
        teaches: Teaches = "lesson" if pair else "too_short" if task.begun else "topics"
        return cls(id=item.id, text=text[:SHOWN_CHARS], teaches=teaches, reason=None if pair else untaught(text, task))


class ItemsAnswer(BaseModel, frozen=True):
    user_id: str
    items: list[ItemAnswer] = Field(description="Newest first.")
    hint: str | None = Field(description="Why items are missing, if texts are not kept (`MTA_KEEP_TEXTS`).")


class AdapterAnswer(BaseModel, frozen=True):
    id: str
    recipe: str = Field(description="The recipe it was trained on and is always served with.")
    bytes: int = Field(description="Stored size in bytes.")
    created_at: str = Field(description="UTC, ISO 8601.")
    stale: bool = Field(description="Whether it belongs to another bank and is therefore not served.")

    @classmethod
    def of(cls, note: AdapterNote, parts: Parts, **more: Any) -> Self:
        stale, created_at = bank_of(note.recipe) != parts.bank.manifest.short, iso(note.created_ms)
        own = {"id": note.id, "recipe": note.recipe, "bytes": note.size_bytes, "created_at": created_at, "stale": stale}
        return cls.model_validate(own | more)


class VersionAnswer(AdapterAnswer, frozen=True):
    """A kept version of a user's adapter. What an earlier version of the server did not note is null."""

    version: int = Field(description="Versions are numbered from 1 in the order in which they were made.")
    serving: bool = Field(description="Whether the user is answered with it, unless it is stale.")
    bank: str = Field(description="The bank it was trained on, 8 hex digits.")
    rank: int | None
    samples: int | None = Field(description="Number of samples it was made from, those from feedback included.")
    before: float | None = Field(description="`held_out.before` of its job.")
    after: float | None = Field(description="`held_out.after` of its job.")

    @classmethod
    def of_version(cls, version: AdapterVersion, parts: Parts, *, serving: bool) -> Self:
        known = {name: getattr(version, name) for name in ("rank", "samples", "before", "after")}
        bank = bank_of(version.note.recipe)
        return cls.of(version.note, parts, version=version.number, serving=serving, bank=bank, **known)


class VersionsAnswer(BaseModel, frozen=True):
    adapters: list[VersionAnswer] = Field(description="Newest first; at most `MTA_ADAPTER_VERSIONS`.")


class UserAnswer(BaseModel, frozen=True):
    user_id: str
    items: int
    bytes: int = Field(description="Memory used by the user's data in the store.")
    embedder: str
    updated_at: str = Field(description="UTC, ISO 8601.")
    recipe: str = Field(description="The recipe that serves the user: the adapter's own, if there is one to serve.")
    source: str
    anchors: list[AnchorAnswer]
    at: tuple[float, float] = Field(description="Position on the bank's map (`GET /bank`).")
    phrases: int | None = Field(description="Number of phrases that the user repeats; null until their texts are read.")
    adapter: AdapterAnswer | None = Field(description="The user adapter; null if there is none.")
    keeps_texts: bool = Field(description="Whether the user's texts stay stored (`MTA_KEEP_TEXTS`).")
    reason: str | None = Field(description="Why what is stored does not personalise answers, and what to do.")


class ErasedAnswer(BaseModel, frozen=True):
    user_id: str
    erased: Erased = Field(description="The number of erased records of each kind.")
    log_rewritten_by: str = Field(description="Time by which it is also gone from the store's file. UTC, ISO 8601.")


router = APIRouter(route_class=UserRoute, prefix="/users/{user_id}", tags=["users"])


@router.put("/profile")
async def replace_profile(request: Request, user_id: UserIdInPath, body: ItemsRequest) -> ProfileAnswer:
    """Replace the user's history with these items.

    By default, the newest 512 items within 2 MiB are kept. Repeating the request changes nothing.
    """
    return await _change(request, user_id, body, call_of(request).parts.profiles.replace)


@router.post("/profile/items")
async def add_items(request: Request, user_id: UserIdInPath, body: ItemsRequest) -> ProfileAnswer:
    """Add items to the user's history; an item with an existing `id` is replaced.

    Repeating the request changes nothing.
    """
    return await _change(request, user_id, body, call_of(request).parts.profiles.add)


@router.get("")
async def read_user(request: Request, user_id: UserIdInPath) -> UserAnswer:
    """Return the user's stored data and the anchors of their recipe."""
    call = call_of(request)
    parts = call.parts
    user, profile, _ = await parts.profiles.find(call.user(user_id))
    if profile is None:
        raise _unknown(user_id, "profile")
    adapter = profile.adapter
    personal = parts.bank.personalise(profile.embedding, profile.evidence)
    stale = adapter is not None and bank_of(adapter.recipe) != parts.bank.manifest.short
    recipe = parse_recipe(adapter.recipe) if adapter and not stale else personal.recipe
    return UserAnswer(
        user_id=user_id,
        items=profile.items,
        bytes=(await parts.profiles.store.measure(user.key))[1]["bytes"],
        embedder=profile.embedder,
        updated_at=iso(profile.updated_ms),
        recipe=recipe.name,
        source=personal.source,
        anchors=anchor_answers(recipe, personal.weights),
        at=parts.bank.projection.at(profile.embedding),
        phrases=len(decode_phrases(profile.phrases)) if profile.is_signed(parts.bank.manifest.short) else None,
        adapter=adapter and AdapterAnswer.of(adapter, parts),
        keeps_texts=profile.keeps_texts,
        reason=FORGOTTEN if parts.profiles.is_forgotten(profile) else None,
    )


@router.get("/profile/items")
async def list_items(
    request: Request, user_id: UserIdInPath, limit: Annotated[int, Query(ge=1, le=MAX_ITEMS)] = 100
) -> ItemsAnswer:
    """Return what is known of the user's newest items, without their embeddings."""
    call = call_of(request)
    parts = call.parts
    user, profile, _ = await parts.profiles.find_at_once(call.user(user_id))
    if profile is None:
        raise _unknown(user_id, "profile")
    newest = list((await parts.profiles.store.items(user.key)).items())[: -limit - 1 : -1]
    items = [Item(name, stored.fields) for name, stored in newest]
    hint = (
        None
        if profile.keeps_texts
        else f"{profile.items} items count, whose texts are not kept once a worker read them"
    )
    return ItemsAnswer(user_id=user_id, items=[ItemAnswer.of(item, parts.bank.task) for item in items], hint=hint)


@router.get("/adapters")
async def list_adapters(request: Request, user_id: UserIdInPath) -> VersionsAnswer:
    """List the kept versions of the user's adapter."""
    call = call_of(request)
    parts = call.parts
    kept = await parts.adapting.versions(call.user(user_id))
    if kept.profile is None:
        raise _unknown(user_id, "profile")
    answers = [VersionAnswer.of_version(one, parts, serving=one is kept.serving) for one in kept.versions]
    return VersionsAnswer(adapters=answers)


@router.post("/adapters/{version}/serve")
async def serve_adapter(request: Request, user_id: UserIdInPath, version: VersionInPath) -> VersionAnswer:
    """Let a kept version of the user's adapter serve from the next request on.

    Training that no client asked for (`MTA_REFRESH_SAMPLES`, `mta readapt`) ends, and refreshing counts texts anew. A
    version of another bank is a 409. Repeating the request changes nothing.
    """
    call = call_of(request)
    parts, user = call.parts, call.user(user_id)
    chosen = await parts.adapting.serve(user, version)
    notes_of(request.scope).audited = (Act.SERVE, user.key)
    return VersionAnswer.of_version(chosen, parts, serving=True)


async def _place(request: Request) -> AsyncIterator[None]:
    """Wait for one of the places for exports, and hold it until the response has been sent."""
    async with request.app.state.exports.held(caller_name_of(request)):
        yield


@router.get(
    "/export",
    response_class=Response,
    responses={200: {"content": {"application/json": {}}}},
    dependencies=[Depends(_place)],
)
async def export_user(request: Request, user_id: UserIdInPath) -> Response:
    """Export everything that is stored about the user, as one JSON object.

    It contains the fields of the user's record, `items`, their `vectors`, `samples`, `feedback`, `tally` (counts of
    compared answers), `jobs` (with the idempotency key and trace of each request), `adapters` (what is known of each
    kept version) and `adapter`: the stored user adapter and, in `peft`, the complete adapter that is served, as the
    `config` and `weights` (base64) of a PEFT folder; `says` describes it, or why it is missing. For a user without a
    profile, of whom there is only feedback, the fields of the record are missing.
    """
    call = call_of(request)
    user = call.user(user_id)
    export = await call.parts.exporting.export(user, _exported_job)
    if export is None:
        raise _unknown(user_id)
    notes_of(request.scope).audited = (Act.EXPORT, user.key)
    return StreamingResponse(export, media_type="application/json", headers={"Cache-Control": "no-store"})


@router.delete("")
async def erase_user(request: Request, user_id: UserIdInPath) -> ErasedAnswer:
    """Erase everything stored about the user. Engines drop the user's adapter within 30 seconds.

    No limit applies. But if nothing is stored about the user, the request counts as any request of its API key.
    """
    call, notes = call_of(request), notes_of(request.scope)
    gateway, user = call.gateway, call.user(user_id)
    parts = gateway.default_parts  # the tenant's bank may not be loaded
    if not any([await parts.profiles.store.is_stored(key) for key in user.every_key]):
        await gateway.limiter.take(call.caller, "requests")
    notes.audited = (Act.ERASE, user.key)
    erasure = await parts.erasing.erase(user)
    parts.profiles.quotas.changed(user)
    if erasure is None:
        if not gateway.keys.are_lost:  # else a restore may bring back what this store lost
            notes.audited = None
        raise _unknown(user_id)
    return ErasedAnswer(user_id=user_id, erased=erasure.erased, log_rewritten_by=iso(erasure.rewritten_by_ms))


async def _change(
    request: Request,
    user_id: str,
    body: ItemsRequest,
    change: Callable[[User, Sequence[Item], str, bool | None], Awaitable[ProfileUpdate]],
) -> ProfileAnswer:
    call = call_of(request)
    parts, user = call.parts, call.user(user_id)
    # Parsing megabytes of items takes a large part of a second, too long for the event loop.
    (items, hint), received = await asyncio.to_thread(_items, parts, body.items), len(body.items)
    body.items.clear()  # megabytes, while many such requests may wait for their turn at the embedder
    update = await change(user, items, epoch_of(request), call.caller.policy.keep_texts)
    call.gateway.metrics.profile_changes.inc(update.changed + update.removed)
    personal = parts.bank.personalise(update.profile.embedding, update.profile.evidence)
    return ProfileAnswer(
        user_id=user.id,
        received=received,
        kept=update.profile.items,
        changed=update.changed,
        removed=update.removed,
        recipe=personal.recipe.name,
        anchors=anchor_answers(personal.recipe, personal.weights),
        hint=hint,
    )


def _exported_job(job: Job) -> dict[str, Any]:
    request = {"idempotency_key": job.idempotency_key or None, "traceparent": job.traceparent or None}
    return JobAnswer.of(job).model_dump(mode="json") | request


def _items(parts: Parts, raw_items: Sequence[dict[str, Any]]) -> tuple[list[Item], str | None]:
    """Return the items of a body, without those that the history's limit drops anyway, and a hint about them."""
    items = []
    for position, raw in enumerate(raw_items):
        try:
            item = parse_item(raw, parts.bank.task, position)
        except ProfileError as error:
            raise InvalidRequest(str(error), param=error.param) from error
        fields = dict(item.fields)
        check_size(f"items.{position}", orjson.dumps(fields), fields, code="item_too_large")
        items.append(item)
    kept = newest_items(items, parts.profiles.limit)
    return kept, _hint(kept, parts.bank.task)


def _hint(items: Sequence[Item], task: Task) -> str | None:
    """Return why items teach nothing but topics, and how many do; None if all teach more."""
    untold = [item for item in items if item_pair(item, task) is None]
    if not untold:
        return None
    return f"{len(untold)} of {len(items)} items tell topics alone: {untaught(item_text(untold[0], task), task)}"


def _unknown(user_id: str, missing: str = "data") -> NotFound:
    return NotFound(f"user_id {excerpt(user_id)} is unknown: no {missing} is stored for this user", param="user_id")
