"""What a test can turn at the fake engine, and what it keeps of each request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.recipe import FusionMethod


@dataclass(slots=True)
class Knobs:
    """What a test can turn.

    Attributes:
        banks: fingerprints of the banks that it serves.
        anchors: how many anchors each of them has.
        method: how they are fused.
        context: tokens that prompt and answer may have together; a token is a character of the prompt.
        admit_s: pause before it answers at all.
        token_delay_s: pause before each token.
        hold_after: say no more after so many tokens, until it is turned.
        die_after: cut the connection after so many tokens.
        dies: cut the connection before the first token of so many more generations.
        fail_after: send an error event after so many tokens.
        garbage: send this instead of a chunk.
        finish_reasons: how its choices end, in turns over them.
        lacks: models that are answered with 404.
        status: HTTP status of every answer, instead of generating.
        user_adapters: whether it has whatever user adapter it is asked for.
        counts: whether it says how many tokens a conversation has.
        strict: whether it has the chat template of `bench.rig.tiny`, instead of one that takes everything.
        figures: what its status says besides.
    """

    banks: tuple[str, ...] = ()
    anchors: int = 6
    method: FusionMethod = FusionMethod.SHARED
    context: int = 512
    admit_s: float = 0.0
    token_delay_s: float = 0.0
    hold_after: int | None = None
    die_after: int | None = None
    dies: int = 0
    fail_after: int | None = None
    garbage: bytes | None = None
    finish_reasons: tuple[str, ...] = ("length",)
    lacks: Callable[[str], bool] = lambda model: False
    status: int | None = None
    user_adapters: bool = False
    counts: bool = True
    strict: bool = False
    figures: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Seen:
    """One generation request as it arrived, and whether it came to its end or its client left before."""

    body: dict[str, Any]
    headers: dict[str, str]
    peer_port: int
    aborted: bool = False
    ended: bool = False
    tokens: int = 0
