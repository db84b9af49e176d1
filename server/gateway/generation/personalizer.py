"""From a user id to the recipe that speaks for the user."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from adapters.errors import excerpt
from adapters.recipe import PER_MILLE, FusionRecipe, Term, UserAdapterId, anchor_id, bank_of, parse_recipe
from bank.lookup.serving import ServingBank, UserRecipe
from bank.lookup.weights import AnchorWeight
from server.engine_protocol import BASE_MODEL
from server.errors import ApiError, InvalidRequest, NotFound
from server.gateway.generation.request import GenerationRequest, Personalize
from server.store.profiles import AdapterNote, Profile
from server.store.tenants.user_key import User

log = logging.getLogger("mta.gateway")

REQUEST_EVERY_S = 60.0
"""How long a gateway waits before it requests a user's missing signature again."""

_MOST_REMEMBERED = 10_000


class Level(StrEnum):
    """How personal an answer is."""

    BASE = "base"
    MERGED = "merged"
    STACKED = "stacked"


@dataclass(frozen=True, slots=True)
class AnchorShare:
    """One anchor's share in a user's recipe, as answers show it.

    Attributes:
        weight: its weight in the recipe; negative where the recipe steps away from it.
        similarity: how near it is to the user's profile; None if others are nearer by now.
        gain: predicted reduction of the loss on the user's items, nats per token; None without a signature.
    """

    id: str
    weight: float
    similarity: float | None
    gain: float | None = None


@dataclass(frozen=True, slots=True)
class Personalization:
    """Who speaks in an answer.

    Attributes:
        recipe: what the engine fuses; None for the base model.
        source: which evidence the weights come from; None for the base model.
        anchors: largest weight first.
        reason: why the level is not higher, or None.
        made_in: traceparent of the job that made the user's adapter, where that speaks and the job was traced.
    """

    level: Level
    recipe: FusionRecipe | None = None
    source: str | None = None
    anchors: tuple[AnchorShare, ...] = ()
    reason: str | None = None
    made_in: str = ""

    @property
    def model(self) -> str:
        """The name under which the engine serves it; not for clients, since it may hold the user's key."""
        return self.recipe.name if self.recipe else BASE_MODEL

    @property
    def shown(self) -> str | None:
        """The recipe's name as clients see it, without the user adapter; None for the base model."""
        return self.recipe.plain.name if self.recipe else None


class UserProfiles(Protocol):
    """The part of `server.gateway.users.profiles.Profiles` that is needed."""

    async def current(self, user: User) -> Profile | None: ...

    async def want_signature(self, user: User) -> None: ...


class Personalizer:
    """Finds recipes. All that it knows about a user is in the profile."""

    def __init__(self, bank: ServingBank, profiles: UserProfiles) -> None:
        self._bank = bank
        self._profiles = profiles
        self._requested_s: dict[str, float] = {}
        self._requesting: set[asyncio.Task[None]] = set()

    async def profile(self, request: GenerationRequest) -> Profile | None:
        """The profile of the user who asks; None where none is wanted, or known."""
        if request.strength != 1 and not self._bank.manifest.common:
            raise InvalidRequest(
                f"strength must be 1, got {request.strength}: this bank has no common row to take the anchors' place",
                param="strength",
            )
        return await self._profiles.current(request.user) if request.user and request.wants_profile else None

    def candidates(self, request: GenerationRequest, profile: Profile | None) -> tuple[Personalization, ...]:
        """Who may speak, most personal first: the first that the engine can serve does.

        Today's own recipe comes after a stacked adapter, and the base model last, unless the request insists on the
        user's recipe.

        Runs on the event loop: on one core the whole of it takes 30 µs over 12 anchors and 0.6 ms over 10,000 (the
        most that are searched exhaustively), about what handing it to a thread and back would cost.
        """
        user = request.user
        if user is None or profile is None:
            return (_without_profile(request),)
        if self._bank.signs and not profile.is_signed(self._bank.manifest.short):
            self._want_signature(user)
        found = self._bank.personalise(profile.embedding, profile.evidence, request.strength)
        merged = _merged(found)
        if request.personalize is Personalize.MERGED:
            return (merged,)
        base = Personalization(Level.BASE, reason="the engine cannot serve this user's recipe")
        if profile.adapter is None or self.is_stale(profile.adapter):
            return merged, base
        if request.strength < 1:
            reason = "strength is below 1, and the user's adapter is served on its own recipe only"
            return replace(merged, reason=reason), base
        less = replace(merged, reason="the engine cannot serve this user's adapter")
        return _stacked(user, profile.adapter, found), less, base

    def merged(self, profile: Profile) -> Personalization:
        """The recipe of a profile whose embedding is current."""
        return _merged(self._bank.personalise(profile.embedding, profile.evidence))

    def is_stale(self, adapter: AdapterNote) -> bool:
        """Whether a user adapter belongs to another bank: it is never served with this one."""
        return bank_of(adapter.recipe) != self._bank.manifest.short

    def _want_signature(self, user: User) -> None:
        """Request a signature for this bank and profile, at most every `REQUEST_EVERY_S` for each user."""
        now_s = time.monotonic()
        if now_s < self._requested_s.get(user.key, -math.inf) + REQUEST_EVERY_S:
            return
        if len(self._requested_s) >= _MOST_REMEMBERED:
            self._requested_s.clear()
        self._requested_s[user.key] = now_s
        task = asyncio.create_task(self._request_signature(user))
        self._requesting.add(task)
        task.add_done_callback(self._requesting.discard)

    async def _request_signature(self, user: User) -> None:
        try:
            await self._profiles.want_signature(user)
        except ApiError as error:
            log.warning("a signature could not be requested: %s", error.explained)


def _without_profile(request: GenerationRequest) -> Personalization:
    if request.personalize is Personalize.NONE:
        return Personalization(Level.BASE, reason="the request asked for the base model")
    if request.user is None:
        if request.personalize is Personalize.MERGED:
            raise InvalidRequest(
                f"{request.user_param} is required where personalize is merged",
                param=request.user_param,
                code="missing",
            )
        return Personalization(Level.BASE, reason="the request names no user")
    if request.personalize is Personalize.MERGED:
        raise NotFound(
            f"{request.user_param} {excerpt(request.user.id)} has no profile: PUT /users/{{id}}/profile makes one",
            param=request.user_param,
        )
    return Personalization(Level.BASE, reason="unknown user")


def _merged(found: UserRecipe) -> Personalization:
    return Personalization(Level.MERGED, found.recipe, found.source, _shares(found.recipe, found.weights))


def _stacked(user: User, adapter: AdapterNote, found: UserRecipe) -> Personalization:
    """The user's adapter on the recipe that it was trained on, the only one that it is served on."""
    recipe = replace(parse_recipe(adapter.recipe), user_adapter=UserAdapterId(user.key, adapter.id))
    shares = _shares(recipe, found.weights)
    return Personalization(Level.STACKED, recipe, found.source, shares, made_in=adapter.made_in)


def _shares(recipe: FusionRecipe, weights: Sequence[AnchorWeight]) -> tuple[AnchorShare, ...]:
    """The anchors of a recipe, largest weight first, with what the user's profile says of them today."""
    today = {weight.anchor: weight for weight in weights}
    shares = [_share(term, today.get(term.anchor)) for term in recipe.terms]
    return tuple(sorted(shares, key=lambda share: (-abs(share.weight), share.id)))


def _share(term: Term, weight: AnchorWeight | None) -> AnchorShare:
    similarity = round(weight.similarity, 4) if weight else None
    gain = round(weight.gain, 4) if weight and weight.gain is not None else None
    return AnchorShare(anchor_id(term.anchor), term.weight / PER_MILLE, similarity, gain)
