"""What serves a call: the parts that all banks share, and those of the bank of the caller's tenant."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from fastapi import Request

from bank.lookup.serving import ServingBank
from server.errors import Unavailable
from server.gateway.access.keys import Caller, KnownKeys, caller_of
from server.gateway.access.limiter import Limiter, RequestUsage
from server.gateway.experiments.tallies import Tallies
from server.gateway.generation.generator import Generator
from server.gateway.learning.feedback import Feedbacks
from server.gateway.learning.messages import MessageLearner
from server.gateway.operating.health import Health
from server.gateway.operating.metrics import Metrics
from server.gateway.users.adapting import Adapting
from server.gateway.users.privacy import Erasing, Exporting
from server.gateway.users.profiles import Profiles
from server.observability.tracing import Tracing
from server.settings import Settings
from server.store.tenants.user_key import Tenants, User, UserKeys


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that serve one bank."""

    bank: ServingBank
    profiles: Profiles
    adapting: Adapting
    erasing: Erasing
    exporting: Exporting
    feedbacks: Feedbacks
    generator: Generator


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parts that all banks share, and those of each bank."""

    settings: Settings
    metrics: Metrics
    tracing: Tracing
    keys: KnownKeys
    tenants: Tenants
    health: Health
    limiter: Limiter
    learner: MessageLearner
    tallies: Tallies
    banks: Mapping[str, Parts]  # by the first 8 hex digits of the bank; the first entry is the default bank

    @property
    def default_parts(self) -> Parts:
        return next(iter(self.banks.values()))

    def parts_of(self, tenant: str) -> Parts:
        """Return the parts of a tenant's bank; raises Unavailable if it is not served here."""
        if (named := self.keys.bank_of(tenant)) is None:
            return self.default_parts
        if (parts := self.banks.get(named)) is None:
            raise Unavailable(
                f"this tenant's bank, {named}, is not served here, only {', '.join(self.banks)}: set MTA_BANK or "
                "MTA_NEXT_BANK to its folder, or choose another with `mta keys bank`",
                code="no_bank",
            )
        return parts

    def counted(
        self, caller: Caller, user_id: str | None, *, generates: bool
    ) -> AbstractAsyncContextManager[RequestUsage]:
        """Count a request, as `Limiter.counted` does, of the user that its path names."""
        user_key = None if user_id is None else self.tenants.users(caller.tenant).key(user_id)
        return self.limiter.counted(caller, user_key, generates=generates)


@dataclass(frozen=True, slots=True)
class Call:
    """A request's caller, and the gateway that serves them."""

    gateway: Gateway
    caller: Caller

    @property
    def parts(self) -> Parts:
        """The parts of the bank of the caller's tenant; raises Unavailable if it is not served here."""
        return self.gateway.parts_of(self.caller.tenant)

    @property
    def users(self) -> UserKeys:
        """The users of the caller's tenant."""
        return self.gateway.tenants.users(self.caller.tenant)

    @property
    def holdout(self) -> float:
        """The share of users who are answered one level lower, for comparison."""
        own = self.caller.policy.holdout
        return self.gateway.settings.holdout if own is None else own

    def user(self, user_id: str) -> User:
        return self.users.user(user_id)


def gateway_of(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def call_of(request: Request) -> Call:
    return Call(gateway_of(request), caller_of(request))
