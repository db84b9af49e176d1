"""From a user id to the recipe that speaks for the user."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from adapters.errors import excerpt
from adapters.recipe import FusionRecipe, UserAdapterId, bank_of, parse_recipe
from bank.lookup.serving import AnchorWeight, ServingBank
from server.engine_protocol import BASE_MODEL
from server.errors import ApiError, InvalidRequest, NotFound
from server.gateway.generation.request import GenerationRequest, Personalize
from server.store.profile_record import Profile
from server.store.tenants.user_key import User

if TYPE_CHECKING:
    from server.gateway.users.profiles import Profiles

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
class Personalization:
    """Who speaks in an answer; without a recipe it is the base model."""

    level: Level
    recipe: FusionRecipe | None = None
    source: str | None = None  # the evidence that the weights come from
    weights: tuple[AnchorWeight, ...] = ()  # by the user's profile today; a user adapter keeps its older recipe
    reason: str | None = None  # why the level is not higher
    made_in: str = ""  # traceparent of the job that made the user's adapter

    @property
    def model(self) -> str:
        """The name under which the engine serves it; not for clients, since it may hold the user's key."""
        return self.recipe.name if self.recipe else BASE_MODEL

    @property
    def shown(self) -> str | None:
        """The recipe's name as clients see it, without the user adapter; None for the base model."""
        return self.recipe.plain.name if self.recipe else None


class Personalizer:
    """Finds recipes. All that it knows about a user is in the profile."""

    def __init__(self, bank: ServingBank, profiles: Profiles) -> None:
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

        Runs on the event loop: on one core the whole of it takes 30 µs over 12 anchors and 0.6 ms over 10,000 (the
        most that are searched exhaustively), about what handing it to a thread and back would cost.
        """
        user = request.user
        if user is None or profile is None:
            return (_without_profile(request),)
        if self._bank.manifest.signs and not profile.is_signed(self._bank.manifest.short):
            self._want_signature(user)
        found = self._bank.personalise(profile.embedding, profile.evidence, request.strength)
        merged = Personalization(Level.MERGED, found.recipe, found.source, found.weights)
        if request.personalize is Personalize.MERGED:
            return (merged,)
        base = Personalization(Level.BASE, reason="the engine cannot serve this user's recipe")
        adapter = profile.adapter
        if adapter is None or bank_of(adapter.recipe) != self._bank.manifest.short:
            return merged, base
        if request.strength < 1:
            reason = "strength is below 1, and the user's adapter is served on its own recipe only"
            return replace(merged, reason=reason), base
        trained_on = replace(parse_recipe(adapter.recipe), user_adapter=UserAdapterId(user.key, adapter.id))
        stacked = replace(merged, level=Level.STACKED, recipe=trained_on, made_in=adapter.made_in)
        return stacked, replace(merged, reason="the engine cannot serve this user's adapter"), base

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
    param, insists = request.user_param, request.personalize is Personalize.MERGED
    if request.user is None:
        if insists:
            raise InvalidRequest(f"{param} is required where personalize is merged", param=param, code="missing")
        return Personalization(Level.BASE, reason="the request names no user")
    if insists:
        message = f"{param} {excerpt(request.user.id)} has no profile: PUT /users/{{id}}/profile makes one"
        raise NotFound(message, param=param)
    return Personalization(Level.BASE, reason="unknown user")
