"""What a running gateway is made of, as the routes see it. `server/app.py` puts it together."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from bank.lookup.serving import ServingBank
from server.adapting import Adapting
from server.erasing import Erasing
from server.generation import Generator
from server.health import Health
from server.http.bodies import Bodies
from server.metrics import Metrics
from server.personalizer import Personalizer
from server.profiles import Profiles
from server.settings import Settings


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one gateway."""

    settings: Settings
    bank: ServingBank
    bodies: Bodies
    profiles: Profiles
    adapting: Adapting
    erasing: Erasing
    personalizer: Personalizer
    generator: Generator
    health: Health
    metrics: Metrics


def parts_of(request: Request) -> Parts:
    """The parts of the gateway that a request came to."""
    parts: Parts = request.app.state.parts
    return parts
