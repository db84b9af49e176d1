"""Find the recipe for a user."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from adapters.errors import excerpt
from adapters.recipe import FusionRecipe, UserAdapterId, bank_of, parse_recipe
from bank.lookup.phrases import NO_PHRASES, TrustedPhrases, decode_phrases
from bank.lookup.serving import AnchorWeight, ServingBank
from server.engine_protocol import BASE_MODEL
from server.errors import InvalidRequest, NotFound, Unavailable
from server.gateway.experiments.arms import Arm, Level, arm_of
from server.gateway.generation.request import GenerationRequest, Personalize
from server.gateway.users.profiles import Profiles
from server.store.profile_record import Profile
from server.store.tenants.user_key import User

SIGNATURE_REQUEST_INTERVAL_S = 60.0  # until a gateway requests a user's missing signature again
_MAX_REMEMBERED_USERS = 10_000
_NOT_EMBEDDED = "the user's items are being embedded anew since the embedder was changed"
_UNTAUGHT = "none of the user's items can be learnt from, so their topics decide"
FORGOTTEN = "what was made of the user's texts, which are not kept, is of another embedder or bank: send texts again"
_HELD_OUT = "this week the user is answered one level lower, for comparison (MTA_HOLDOUT)"


@dataclass(frozen=True, slots=True)
class Personalization:
    """The adapter that generates an answer; without a recipe the base model answers."""

    level: Level
    recipe: FusionRecipe | None = None
    source: str | None = None  # the evidence that the weights come from
    weights: tuple[AnchorWeight, ...] = ()  # by the current profile; a user adapter keeps the recipe it was trained on
    reason: str | None = None  # why no higher level applies
    phrases: TrustedPhrases = NO_PHRASES  # the user's, to be mixed in
    made_in: str = ""  # traceparent of the job that made the user's adapter
    arm: Arm = Arm.NONE

    @property
    def model(self) -> str:
        """The engine's model name. Do not show it to clients: it may contain the user's key."""
        return self.recipe.name if self.recipe else BASE_MODEL

    @property
    def public_recipe(self) -> str | None:
        """The recipe name shown to clients, without the user adapter; None for the base model."""
        return self.recipe.plain.name if self.recipe else None


@dataclass
class Personalizer:
    """Finds recipes. It knows nothing about a user beyond the profile."""

    bank: ServingBank
    profiles: Profiles
    _last_request_s: dict[str, float] = field(default_factory=dict)  # by user key
    _request_tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def profile(self, request: GenerationRequest) -> tuple[User | None, Profile | None, str]:
        """Return the user as stored, the profile, None if there is none or the request needs none, and the epoch."""
        if request.strength != 1 and not self.bank.manifest.common:
            raise InvalidRequest(
                f"strength must be 1, got {request.strength}: this bank has no common row to replace the anchors",
                param="strength",
            )
        if request.user is None or not request.wants_profile:
            return request.user, None, ""
        user, profile, epoch = await self.profiles.find_at_once(request.user)
        if request.learnt and profile is None:
            with suppress(Unavailable):  # the message is not learnt then
                epoch = await self.profiles.rotation.begin_write(user)
        return user, profile, epoch

    def candidates(
        self, request: GenerationRequest, user: User | None, profile: Profile | None
    ) -> tuple[Personalization, ...]:
        """Return the possible personalizations, most personal first; the first one that the engine can serve is used.

        Runs on the event loop: one core needs 30 µs for 12 anchors and 0.6 ms for 10,000 (the maximum for exhaustive
        search), about as much as a round trip to a thread.
        """
        if user is None or profile is None:
            return (_without_profile(request),)
        reads_items, is_signed = self.bank.manifest.has_signatures, profile.is_signed(self.bank.manifest.short)
        forgotten = self.profiles.is_forgotten(profile)
        if reads_items and not is_signed and not forgotten:
            self._schedule_signature_request(user)
        if profile.embedder != self.profiles.embedder.id:
            evidence = profile.evidence if reads_items else None
            if not evidence or not evidence.is_usable_for(self.bank.manifest.short):
                if forgotten:
                    base, manifest = Personalization(Level.BASE, reason=FORGOTTEN), self.bank.manifest
                    common = replace(base, level=Level.COMMON, recipe=manifest.common_recipe)
                    return (common, base) if manifest.common else (base,)
                if request.personalize is Personalize.MERGED:
                    raise Unavailable(f"{_NOT_EMBEDDED}: send the request again", code="not_embedded")
                return (Personalization(Level.BASE, reason=_NOT_EMBEDDED),)
            profile = replace(profile, embedding=np.zeros(self.profiles.embedder.dim, np.float32))  # not comparable
        personal = self.bank.personalise(profile.embedding, profile.evidence, request.strength)
        phrases = self._phrases(request, profile)
        untaught = reads_items and is_signed and personal.source == "topic"
        why = FORGOTTEN if forgotten else _UNTAUGHT if untaught else None
        merged = Personalization(Level.MERGED, personal.recipe, personal.source, personal.weights, why, phrases)
        if request.personalize is Personalize.MERGED:
            return (merged,)
        base = Personalization(Level.BASE, reason="the engine cannot serve this user's recipe")
        adapter = profile.adapter
        ladder: tuple[Personalization, ...] = merged, base
        if adapter is None or bank_of(adapter.recipe) != self.bank.manifest.short:
            pass
        elif request.strength < 1:
            reason = "strength is below 1, and the user's adapter is served on its own recipe only"
            ladder = replace(merged, reason=reason), base
        else:
            trained_on = replace(parse_recipe(adapter.recipe), user_adapter=UserAdapterId(user.key, adapter.id))
            stacked = replace(merged, level=Level.STACKED, recipe=trained_on, reason=None, made_in=adapter.made_in)
            ladder = stacked, replace(merged, reason="the engine cannot serve this user's adapter"), base
        is_compared = request.holdout > 0 and request.strength == 1
        return self._in_arm(ladder, arm_of(user.key, request.holdout), profile) if is_compared else ladder

    def _in_arm(self, ladder: tuple[Personalization, ...], arm: Arm, profile: Profile) -> tuple[Personalization, ...]:
        """Return the personalizations for a user in an arm; below merged is the common row, if the bank has one."""
        if arm is Arm.FULL:
            return replace(ladder[0], arm=arm), *ladder[1:]
        lower = ladder[1]
        if lower.level is Level.BASE and self.bank.manifest.common:
            common = self.bank.personalise(profile.embedding, profile.evidence, 0)
            lower = Personalization(Level.COMMON, common.recipe, common.source)
        return replace(lower, arm=arm, reason=_HELD_OUT), ladder[-1]

    def _phrases(self, request: GenerationRequest, profile: Profile) -> TrustedPhrases:
        """Return what to mix in; nothing if the request wants none, or continues a text and begins no answer."""
        manifest, signed = self.bank.manifest, profile.evidence
        by_default = manifest.words_default and "tools" not in request.sampling  # a greeting, where a call is due
        wanted = by_default if request.words == "auto" else request.words
        is_ours = signed is not None and signed.bank == manifest.short
        if not (wanted and is_ours and manifest.phrases) or request.prompt is not None:
            return NO_PHRASES
        return TrustedPhrases(decode_phrases(profile.phrases), manifest.phrases.trust)

    def _schedule_signature_request(self, user: User) -> None:
        """Request a signature in the background, at most once per user and `SIGNATURE_REQUEST_INTERVAL_S`."""
        now_s = time.monotonic()
        if now_s < self._last_request_s.get(user.key, -math.inf) + SIGNATURE_REQUEST_INTERVAL_S:
            return
        if len(self._last_request_s) >= _MAX_REMEMBERED_USERS:
            self._last_request_s.clear()
        self._last_request_s[user.key] = now_s
        task = asyncio.create_task(self.profiles.request_signature(user))
        self._request_tasks.add(task)
        task.add_done_callback(self._request_tasks.discard)


def _without_profile(request: GenerationRequest) -> Personalization:
    user, param = request.user, request.user_param
    if request.personalize is Personalize.NONE:
        return Personalization(Level.BASE, reason="the request asked for the base model")
    if request.personalize is Personalize.AUTO:
        return Personalization(Level.BASE, reason="unknown user" if user else "the request names no user")
    if user is None:
        raise InvalidRequest(f"{param} is required if personalize is merged", param=param, code="missing")
    message = f"{param} {excerpt(user.id)} has no profile: create one with PUT /users/{{id}}/profile"
    raise NotFound(message, param=param)
