"""What a running gateway is made of, as the routes see it. `server/gateway/app.py` puts it together."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from bank.lookup.serving import ServingBank
from server.gateway.generation.generator import Generator
from server.gateway.generation.personalizer import Personalizer
from server.gateway.operating.health import Health
from server.gateway.operating.metrics import Metrics
from server.gateway.users.adapting import Adapting
from server.gateway.users.erasing import Erasing
from server.gateway.users.exporting import Exporting
from server.gateway.users.profiles import Profiles
from server.settings import Settings
from server.watching.tracing import Tracing


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one gateway."""

    settings: Settings
    bank: ServingBank
    profiles: Profiles
    adapting: Adapting
    erasing: Erasing
    exporting: Exporting
    personalizer: Personalizer
    generator: Generator
    health: Health
    metrics: Metrics
    tracing: Tracing


def parts_of(request: Request) -> Parts:
    """The parts of the gateway that received a request."""
    parts: Parts = request.app.state.parts
    return parts
