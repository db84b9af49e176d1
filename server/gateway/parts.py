"""What a running gateway is made of, as the routes see it. `server/gateway/app.py` puts it together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import Request

from bank.lookup.serving import ServingBank
from server.errors import Unavailable
from server.gateway.access.caller import caller_of
from server.gateway.access.known_keys import KnownKeys
from server.gateway.access.limiter import Limiter
from server.gateway.generation.generator import Generator
from server.gateway.generation.personalizer import Personalizer
from server.gateway.http.json_body import JsonRoute, SamplesRoute
from server.gateway.operating.health import Health
from server.gateway.operating.metrics import Metrics
from server.gateway.users.adapting import Adapting
from server.gateway.users.erasing import Erasing
from server.gateway.users.exporting import Exporting
from server.gateway.users.profiles import Profiles
from server.settings import Settings
from server.store.tenants.user_key import Tenants, User, UserKeys
from server.watching.tracing import Tracing


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one gateway over one bank."""

    settings: Settings
    tenants: Tenants
    bank: ServingBank
    profiles: Profiles
    adapting: Adapting
    erasing: Erasing
    exporting: Exporting
    personalizer: Personalizer
    generator: Generator
    limiter: Limiter
    health: Health
    metrics: Metrics
    tracing: Tracing


@dataclass(frozen=True, slots=True)
class Banks:
    """The parts of one gateway over each bank that it serves.

    Attributes:
        parts: by the bank's 8 hex digits; the first are for tenants that name no bank.
        keys: know which tenant names which.
    """

    parts: Mapping[str, Parts]
    keys: KnownKeys

    @property
    def usual(self) -> Parts:
        """Those for tenants that name no bank."""
        return next(iter(self.parts.values()))

    def of(self, tenant: str) -> Parts:
        """Those for a tenant.

        Raises:
            Unavailable: when it names a bank that is not served here.
        """
        named = self.keys.bank_of(tenant)
        if named is None:
            return self.usual
        if (parts := self.parts.get(named)) is None:
            raise Unavailable(
                f"this tenant's bank, {named}, is not served here, only {', '.join(self.parts)}: set MTA_BANK or "
                "MTA_NEXT_BANK to its folder, or name another with `mta keys bank`",
                code="no_bank",
            )
        return parts


def parts_of(request: Request) -> Parts:
    """The parts of the gateway that received a request, over the bank of the tenant that sent it."""
    banks: Banks = request.app.state.banks
    return banks.of(caller_of(request).tenant)


def usual_parts(request: Request) -> Parts:
    """The parts of the gateway that received a request, whoever sent it."""
    banks: Banks = request.app.state.banks
    return banks.usual


def users_of(request: Request) -> UserKeys:
    """How the users of the tenant that sent a request are named."""
    return parts_of(request).tenants.users(caller_of(request).tenant)


def user_of(request: Request, user_id: str) -> User:
    """The user whom a request names: always one of the tenant's own."""
    return users_of(request).user(user_id)


class UserRoute(JsonRoute):
    """A route that writes what its body says of a user: who is erased while the body arrives stays erased."""

    async def accepted(self, request: Request) -> None:
        user = user_of(request, request.path_params["user_id"])
        request.state.epoch = await parts_of(request).profiles.epoch(user)


class UserSamplesRoute(UserRoute, SamplesRoute):
    """The same, for bodies with samples."""


def epoch_of(request: Request) -> str:
    """The epoch of the user of a `UserRoute` when the request was accepted."""
    epoch: str = request.state.epoch
    return epoch
