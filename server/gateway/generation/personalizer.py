"""From a user id to the recipe that speaks for the user: the first step of every request."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from adapters.errors import excerpt
from adapters.recipe import PER_MILLE, FusionRecipe, Term, UserAdapterId, anchor_id, bank_of, parse_recipe
from bank.lookup.serving import ServingBank
from bank.lookup.weights import AnchorWeight
from server.engine_protocol import BASE_MODEL
from server.errors import ApiError, InvalidRequest, NotFound
from server.gateway.generation.asked import Asked
from server.gateway.generation.timings import Timings
from server.gateway.http.requests import Personalize
from server.gateway.users.profiles import Profiles
from server.store.profiles import AdapterNote, Profile
from server.store.tenants.user_key import User

log = logging.getLogger("mta.gateway")

ASK_EVERY_S = 60.0
"""How long a gateway waits before it requests a user's missing signature again."""

MOST_ASKED = 10_000


class Level(StrEnum):
    """How personal an answer is."""

    BASE = "base"
    MERGED = "merged"
    STACKED = "stacked"


@dataclass(frozen=True, slots=True)
class AnchorShare:
    """One anchor's share in a user's recipe, as answers show it.

    Attributes:
        id: its public id, e.g. `a03`.
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
        level: how personal it is.
        recipe: what the engine fuses; None for the base model.
        source: which evidence the weights come from; None for the base model.
        anchors: largest weight first.
        reason: why the level is not higher, or None.
        profile: the record that it was made from; None if no user was looked up, or found.
        less: who speaks where the engine cannot serve it; None for the base model.
    """

    level: Level
    recipe: FusionRecipe | None = None
    source: str | None = None
    anchors: tuple[AnchorShare, ...] = ()
    reason: str | None = None
    profile: Profile | None = field(default=None, compare=False, repr=False)
    less: Personalization | None = field(default=None, compare=False, repr=False)

    @property
    def made_in(self) -> str:
        """Traceparent of the job that made the user's adapter, where that speaks and the job was traced."""
        note = self.profile.adapter if self.level is Level.STACKED and self.profile else None
        return note.made_in if note else ""

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
        self._asked: dict[str, float] = {}
        self._asking: set[asyncio.Task[None]] = set()

    async def resolve(self, asked: Asked, timings: Timings) -> Personalization:
        """Find out who speaks for a user.

        Args:
            asked: names the user, and says how personal the answer is to be.
            timings: gets `profile` (store) and `recipe` (index and weights).

        Raises:
            InvalidRequest: when a merged answer is asked for without a user, or a strength that the bank cannot give.
            NotFound: when a merged answer is asked for and the user is unknown.
            Unavailable: when the store is down.
        """
        user, wanted = asked.user, asked.personalize
        if asked.strength != 1 and not self._bank.manifest.common:
            raise InvalidRequest(
                f"strength must be 1, got {asked.strength}: this bank has no common row to take the anchors' place",
                param="strength",
            )
        if wanted is Personalize.NONE:
            return Personalization(Level.BASE, reason="the request asked for the base model")
        if user is None:
            if wanted is Personalize.MERGED:
                raise InvalidRequest(
                    f"{asked.user_param} is required where personalize is merged",
                    param=asked.user_param,
                    code="missing",
                )
            return Personalization(Level.BASE, reason="the request names no user")
        start_s = time.perf_counter()
        profile = await self._profiles.current(user)
        timings.record("profile", start_s)
        if profile is None:
            if wanted is Personalize.MERGED:
                raise NotFound(
                    f"{asked.user_param} {excerpt(user.id)} has no profile: PUT /users/{{id}}/profile makes one",
                    param=asked.user_param,
                )
            return Personalization(Level.BASE, reason="unknown user")
        if self._bank.signs and not profile.is_signed(self._bank.manifest.short):
            self._want_signature(user)
        start_s = time.perf_counter()
        personalization = self.speaking_for(user, profile, stacked=wanted is Personalize.AUTO, strength=asked.strength)
        timings.record("recipe", start_s)
        return personalization

    def _want_signature(self, user: User) -> None:
        """Request a signature for this bank and profile, at most every `ASK_EVERY_S` for each user."""
        now_s = time.monotonic()
        if now_s < self._asked.get(user.key, -math.inf) + ASK_EVERY_S:
            return
        if len(self._asked) >= MOST_ASKED:
            self._asked.clear()
        self._asked[user.key] = now_s
        task = asyncio.create_task(self._ask(user))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _ask(self, user: User) -> None:
        try:
            await self._profiles.want_signature(user)
        except ApiError as error:
            log.warning("a signature could not be requested: %s", error.explained)

    def speaking_for(
        self, user: User, profile: Profile, *, stacked: bool = False, strength: float = 1.0
    ) -> Personalization:
        """The recipe of a user's profile whose embedding is current, or the one that its user adapter was trained on.

        The latter only at full strength: a user adapter is served on its own recipe alone.

        Runs on the event loop: on one core the whole of it takes 30 µs over 12 anchors and 0.6 ms over 10,000 (the
        most that are searched exhaustively), about what handing it to a thread and back would cost.
        """
        found = self._bank.personalise(profile.embedding, profile.evidence, strength)
        weights = {weight.anchor: weight for weight in found.weights}
        base = Personalization(Level.BASE, reason="the engine cannot serve this user's recipe", profile=profile)
        merged = Personalization(
            Level.MERGED, found.recipe, found.source, _shares(found.recipe, weights), profile=profile, less=base
        )
        if not stacked or profile.adapter is None or self.is_stale(profile.adapter):
            return merged
        if strength < 1:
            return replace(
                merged, reason="strength is below 1, and the user's adapter is served on its own recipe only"
            )
        trained_on = parse_recipe(profile.adapter.recipe)
        recipe = replace(trained_on, user_adapter=UserAdapterId(user.key, profile.adapter.id))
        less = replace(merged, reason="the engine cannot serve this user's adapter")
        return Personalization(
            Level.STACKED, recipe, found.source, _shares(recipe, weights), profile=profile, less=less
        )

    def is_stale(self, adapter: AdapterNote) -> bool:
        """Whether a user adapter belongs to another bank: it is never served with this one."""
        return bank_of(adapter.recipe) != self._bank.manifest.short


def _shares(recipe: FusionRecipe, weights: Mapping[int, AnchorWeight]) -> tuple[AnchorShare, ...]:
    """The anchors of a recipe, largest weight first, with what the user's profile says of them today."""
    shares = [_share(term, weights.get(term.anchor)) for term in recipe.terms]
    return tuple(sorted(shares, key=lambda share: (-abs(share.weight), share.id)))


def _share(term: Term, weight: AnchorWeight | None) -> AnchorShare:
    similarity = round(weight.similarity, 4) if weight else None
    gain = round(weight.gain, 4) if weight and weight.gain is not None else None
    return AnchorShare(anchor_id(term.anchor), term.weight / PER_MILLE, similarity, gain)


def may_speak(personalization: Personalization, wanted: Personalize) -> Iterator[Personalization]:
    """Who may speak, most personal first; the first that the engine can serve does.

    Today's own recipe comes after a stacked adapter, and the base model last, unless the request insists on the user's
    recipe.
    """
    speaking: Personalization | None = personalization
    while speaking:
        yield speaking
        speaking = None if wanted is Personalize.MERGED else speaking.less
